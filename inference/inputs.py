"""The images or volumes to predict, and reading them beside the network."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import VOLUMES, BadInput
from inference.known_masks import is_of_masks, named_masks, split_by_name
from inference.output_folder import listed_in
from sites.advice import DATA_KINDS, format_advice, is_dicom
from sites.files import check_regular, enough_memory
from sites.layouts import HIDDEN, IMAGE_KINDS, VOLUME_KINDS
from sites.readers import Sample, as_input, reader_of


class Inputs(NamedTuple):
    """What lies at or below an INPUT."""

    files: list   # to predict, sorted
    left: list    # masks, by their folders, their names or a list that names them; predictions; run folders
    unread: dict  # {file or folder that could be data and is not read: why, and what to do}


def list_inputs(path, task):
    """Return the Inputs at or below `path` for a run of `task`; raises BadInput if there is nothing to
    predict."""
    if not path.is_dir():
        check_regular(path)
        return Inputs([path], [], {})
    kinds, written = (VOLUME_KINDS, ".nii.gz") if task in VOLUMES else (IMAGE_KINDS, ".png")
    found, unread, left = walk(path)
    named = {file for place in {file.parent for file in found} | {*path.resolve().parents[:2]}
             for file in named_masks(place)}
    left |= {file for file in found
             if is_of_masks(file.relative_to(path).parts[:-1]) or file.resolve() in named}
    rest = sorted({*found} - left)
    files, masks, of_none = split_by_name([file for file in rest if file.name.lower().endswith(kinds)], path)
    unread |= dict.fromkeys(of_none, "has the name of a mask, but no picture has that name; if it is a "
                                     "picture, give it alone as INPUT")
    for file in (file for file in rest if not file.name.lower().endswith(kinds)):
        if known := format_advice("x.dcm" if is_dicom(file) else file.name):
            unread[file] = f"is {known}"
        elif file.name.lower().endswith(DATA_KINDS):
            unread[file] = f"is of a kind that is not read for this task, save it as {written}"
    if not files:
        more = "".join(f"; {what} {min(of)}" + f" and {len(of) - 1} others" * (len(of) > 1) for of, what in
                       ((left, "left out as masks, predictions or runs:"), (unread, "not read:")) if of)
        raise BadInput(f"{path}: has no {' or '.join(kinds)} files to predict, give a file or a folder of "
                       f"such{more}")
    return Inputs(files, [*left, *masks], unread)


def walk(path):
    """Return the visible files below a folder, {folder that is not looked into: why}, and what this project
    wrote there: run folders, and the files that predict.py lists."""
    found, unread, own = [], {}, set()

    def note(problem):
        unread[Path(problem.filename)] = f"cannot be looked into ({problem.strerror}), check its permissions"

    for place, folders, names in os.walk(path, onerror=note):
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
    return found, unread, {file for file in own if file.exists()}


def read_unlabelled(file, task, size, window=None, tiles=False):
    """Return the Sample of an image or volume without a mask: its truth is empty, on the file's own grid.
    size, window, tiles: as for `read_sample`."""
    with enough_memory(file):
        image, spacing, found = reader_of(task, tiles).read_alone(file, window)
        truth = np.broadcast_to(np.uint8(0), (len(image), *image.shape[2:]))
        return Sample("", "", file.name, as_input(image, task, size, tiles), None, truth, spacing,
                      tuple(found), tile=size if tiles else 0)


def read_ahead(files, config):
    """Yield (file, Sample or the BadInput it raised); meanwhile the next one is read, and no other."""
    def read(file):
        try:
            return read_unlabelled(file, config.task, config.image_size, config.window, config.tiles)
        except BadInput as problem:
            return problem

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, files[0])
        for file, following in zip(files, [*files[1:], None]):
            found = coming.result()
            coming = following and reader.submit(read, following)
            yield file, found
