"""The images or volumes to predict, without the masks beside them, and whose statistics normalise them."""

import contextlib
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import VOLUMES, BadInput, method_module
from inference.export import OF_CASE
from inference.outputs import STATISTICS, listed_in
from rounds.checkpoint import as_bytes, save
from rounds.reading import load_whole
from scoring.norm_statistics import choose_slices, statistics_like, statistics_of
from sites.advice import DATA_KINDS, format_advice, is_dicom
from sites.files import check_regular, enough_memory
from sites.layouts import HIDDEN, IMAGE_KINDS, VOLUME_KINDS, look
from sites.names import PREFIX, SUFFIX, Name, find_image, index_of, role_of
from sites.readers import Sample, as_input, reader_of, slice_of, slices_of
from sites.table import find_file, is_class, read_rows


class Inputs(NamedTuple):
    """What lies at or below an INPUT."""

    files: list   # to predict, sorted
    left: list    # masks, by their folders, their names or a list that names them; predictions; run folders
    unread: dict  # {file or folder that could be data and is not read: why, and what to do}


def list_inputs(path, task):
    """Return the Inputs at or below `path` for a run of `task`; raises BadInput if there are none."""
    if not path.is_dir():
        check_regular(path)
        return Inputs([path], [], {})
    kinds, written = (VOLUME_KINDS, ".nii.gz") if task in VOLUMES else (IMAGE_KINDS, ".png")
    found, unread, left = walk(path)
    places = {file.parent for file in found} | {*path.resolve().parents[:2]}
    named = {mask for place in places for mask in named_masks(place)}
    left |= {file for file in found
             if is_of_masks(file.relative_to(path).parts[:-1]) or file.resolve() in named}
    rest = sorted({*found} - left)
    of_task = [file for file in rest if file.name.lower().endswith(kinds)]
    files, masks, of_none = split_by_name(of_task, path)
    unread |= dict.fromkeys(of_none, "has the name of a mask, but no picture has that name; if it is a "
                                     "picture, give it alone as INPUT")
    for file in {*rest} - {*of_task}:
        if known := format_advice("x.dcm" if is_dicom(file) else file.name):
            unread[file] = f"is {known}"
        elif file.name.lower().endswith(DATA_KINDS):
            unread[file] = f"is of a kind that is not read for this task, save it as {written}"
    left = [*left, *masks]
    if not files:
        more = [f"; {what} {first_of(of)}" for what, of in (
            ("left out as masks, predictions or runs:", left), ("not read:", unread)) if of]
        raise BadInput(f"{path}: has no {' or '.join(kinds)} files to predict, give a file or a folder of "
                       f"such{''.join(more)}")
    return Inputs(files, left, unread)


def first_of(files):
    """Return the name of the first of some files, and how many more there are."""
    return f"{min(files)} and {len(files) - 1} others" if len(files) > 1 else str(*files)


def walk(path):
    """Return the visible files below a folder, {folder that is not looked into: why}, and what this project
    wrote there: run folders, and the files that predict.py lists."""
    found, unread, own, problems = [], {}, set(), []
    for place, folders, names in os.walk(path, onerror=problems.append):
        place = Path(place)
        own |= {place / name for name in listed_in(place)}
        if {"best.pt", "config.yaml"} <= {*names}:
            folders.clear()
            own.add(place)
            continue
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        unread |= {place / name: "is a link to a folder, give that folder as INPUT"
                   for name in folders if (place / name).is_symlink()}
        found += [place / name for name in names if not name.startswith(HIDDEN)]
    unread |= {Path(problem.filename): f"cannot be looked into ({problem.strerror}), check its permissions"
               for problem in problems}
    return found, unread, {file for file in own if file.exists()}


# ---- Masks ----

def split_by_name(files, top):
    """Return (pictures, masks, masks of no picture) of files below `top`, by their names alone."""
    names = [Name(file, top) for file in files]
    suspects = {name for name in names if SUFFIX.fullmatch(name.stem) or PREFIX.fullmatch(name.stem)}
    pictures = [name for name in names if name not in suspects]
    known = index_of(pictures)
    masks = {name for name in suspects if find_image(name, known)}
    return [[name.path for name in part] for part in (pictures, masks, suspects - masks)]


def is_of_masks(folders):
    """Return whether files in such folders, a path's parts, are masks. Those that nnU-Net calls imagesTs are
    for a prediction, so they are not."""
    last = look(folders[-1]) if folders else ""
    return role_of(folders) == "mask" or last == "labelsts" or re.match("gt_", last) is not None


def named_masks(folder):
    """Return the files that the lines 'image mask' of a folder's list.txt, or its tables, name as masks."""
    names, pairs = [], folder / "list.txt"
    if pairs.is_file():
        for line in pairs.read_text("utf-8-sig", "surrogateescape").splitlines():
            words = line.strip().split("\t" if "\t" in line else None)
            names += words[1:] if len(words) == 2 and not line.startswith("#") else []
    for file in folder.glob("*.[cC][sS][vV]"):
        with contextlib.suppress(BadInput):  # it is another kind of table
            names += [name for _, row in read_rows(file) for column, cell in row.items()
                      if column == "mask" or is_class(column) for name in cell.split(";")]
    return [find_file(folder, name.strip()).resolve() for name in names if name.strip() and "\0" not in name]


# ---- Reading ----

def read_unlabelled(file, config):
    """Return the Sample of an image or volume without a mask, or the BadInput that says why there is none.
    Its truth is empty, on the file's own grid."""
    task, size, tiles = config.task, config.image_size, config.tiles
    try:
        with enough_memory(file):
            image, spacing, found = reader_of(task, tiles).read_alone(file, config.window)
            truth = np.broadcast_to(np.uint8(0), (len(image), *image.shape[2:]))
            return Sample("", "", file.name, as_input(image, task, size, tiles), None, truth, spacing,
                          tuple(found), tile=size if tiles else 0)
    except BadInput as problem:
        return problem


def read_ahead(files, config):
    """Yield (file, what `read_unlabelled` returns); meanwhile the next one is read, and no other."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read_unlabelled, files[0], config)
        for file, following in zip(files, [*files[1:], None]):
            found = coming.result()
            coming = following and reader.submit(read_unlabelled, following, config)
            yield file, found


# ---- Whose batch-norm statistics normalise them ----

def choose(site, model, checkpoint, config):
    """Return (statistics, what was chosen) without looking at any input; None: those of the hospital. site: a
    site of the run, or None. {} normalises each case by itself. Raises BadInput."""
    known = checkpoint["statistics"].keys() | checkpoint["local"].keys()
    if site is not None and site not in known:
        raise BadInput(f"site: the run has no {site} to take the statistics of, "
                       + (f"name one of {', '.join(sorted(known))}" if known else "leave it out"))
    if config.method == "local":
        method_module("local")[0].check_trained(checkpoint["local"], [site])
    if not statistics_like(model):
        return {}, "none: the network has no batch norm"
    if config.test_stats == "case":
        if site is not None and not checkpoint["local"].get(site):
            raise BadInput("site: with test_stats: case each image is normalised by itself, whatever its "
                           "site; leave site out")
        return {}, OF_CASE
    if site is None:
        return None, ""
    if site not in checkpoint["statistics"]:
        raise BadInput("site: the run was trained with test_stats: case and has no statistics of "
                       f"{site}; leave site out, for those of the input images, or test_stats")
    return checkpoint["statistics"][site], f"of the run's site {site}"


def of_hospital(out, weights, model, files, name, config, device):
    """Return (statistics, what they are) of a hospital that took no part: those that an earlier call with the
    same weights left in the folder `out`, else, left there, those of up to 64 slices of the inputs, chosen as
    eval.py does for a site of this name. Raises BadInput if no file can be read."""
    kept, mark = out / STATISTICS, hashlib.sha256(as_bytes(weights)).hexdigest()
    with contextlib.suppress(BadInput, KeyError, TypeError):  # of a file that is missing or damaged
        stored = load_whole(kept)
        if stored["weights"] == mark:
            whose = f"of the input images of an earlier call, kept in {kept}"
            print(f"statistics {whose}; for another hospital give another out=FOLDER", flush=True)
            return stored["statistics"], whose
    whose = "of the input images themselves, unlabelled"
    print(f"collecting statistics {whose}", flush=True)
    slices = [(file, s) for file, sample in read_ahead(files, config) if not isinstance(sample, BadInput)
              for s in slices_of(sample)]
    if not slices:
        raise BadInput(f"{files[0]}: no input can be read, so there is nothing to take statistics of")
    chosen, images = choose_slices(slices, name, config), {}
    for file in {file for file, _ in chosen}:
        sample = read_unlabelled(file, config)
        images |= {(file, s): slice_of(sample, s)[0].clone() for of, s in chosen if of == file}
    statistics = statistics_of(model, [images[place] for place in chosen], config, device)
    save(kept, as_bytes({"weights": mark, "statistics": statistics}))
    return statistics, whose
