"""What predict.py writes: a folder in which no other file is replaced and no two files share a name;
masks on the files' own grids, probabilities, a table and pictures."""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from nibabel import orientations
from PIL import Image

from config import VOLUMES, BadInput, class_name
from rounds.checkpoint import save
from scoring import pictures
from scoring.evaluate import classes_of
from scoring.pictures import RED, as_png
from sites.layouts import look, stem_of
from sites.volumes import load, lps_sizes, slice_order

PREDICTION_COLUMNS = ("file", "class", "size", "unit", "share", "threshold", "statistics")
LIST = "prediction_files.json"  # {file below the folder: SHA-256 of what was written, null while a call runs}
TABLE, STATISTICS = "prediction.csv", "statistics.pt"
SHEET = re.compile(r"sheet_\d+\.png")
RESERVED = re.compile("|".join([SHEET.pattern, *map(re.escape, (LIST, STATISTICS, TABLE))]))
ROWS = 8  # inputs on a sheet of pictures


# ---- The folder ----

class OutputFolder:
    """A folder of predictions, new or of an earlier call, which is gone on with, also after a kill."""

    def __init__(self, path, inputs, names):
        """Make the folder. inputs: the files to predict; names: what may be written, below the folder. Raises
        BadInput, before anything is written, if that could replace a file that predict.py did not write."""
        self.path, self.written = path, {}
        self.earlier, self.names = listed_in(path), {STATISTICS, TABLE, *map(str, names)}
        check_targets(path, self.earlier, {file.resolve() for file in inputs}, self.names)
        path.mkdir(parents=True, exist_ok=True)
        self.write_list(self.earlier | dict.fromkeys(sorted(self.names)))
        for part in path.rglob("*.part"):  # what a killed call left half written
            if part.name.startswith(LIST) or str(part.relative_to(path)).rsplit(".", 2)[0] in self.earlier:
                part.unlink(missing_ok=True)
        (path / TABLE).unlink(missing_ok=True)  # it comes last, so a folder with a table is complete

    def write_list(self, listed):
        """Write the list of the files that are predict.py's own."""
        save(self.path / LIST, (json.dumps(listed, indent=1) + "\n").encode())

    def save(self, name, content):
        """Write bytes to the file `name` below the folder, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target, content)
        self.written[str(name)] = hashlib.sha256(content).hexdigest()

    def finish(self):
        """Remove what earlier calls wrote of these inputs and this one did not, and old sheets of pictures.
        Return the names of what they wrote of other inputs, which stays."""
        of_call = self.names | set(filter(SHEET.fullmatch, self.earlier))
        for name in of_call - self.written.keys() - {STATISTICS}:
            (self.path / name).unlink(missing_ok=True)
        others = {name: mark for name, mark in self.earlier.items()
                  if name not in of_call and os.path.lexists(self.path / name)}
        self.write_list(others | self.written | {STATISTICS: None})
        return list(others)


def listed_in(folder):
    """Return {file below a folder: SHA-256 or None} as predict.py listed it there, {} if there is no list;
    raises BadInput for a list that is damaged or leads out of the folder."""
    file = folder / LIST
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        listed = dict(json.loads(file.read_bytes())) if file.is_file() else {}
        if not any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
            return listed
    raise BadInput(f"{file}: is no list that predict.py wrote, choose another out=FOLDER")


def check_targets(path, listed, inputs, names):
    """Raise BadInput if a folder is none or holds files and no list, if one of `names` below it is an input,
    or a file that is not listed, or if a listed file is not what was written any more. inputs: resolved."""
    other = "choose another out=FOLDER"
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file, {other}")
    held = [file.name for file in path.glob("*") if not file.name.startswith((".", LIST))]
    if held and not (path / LIST).is_file():
        raise BadInput(f"{path}: holds other files, such as {min(held)}; {other}")
    for name in sorted(names | listed.keys()):
        target, mark = path / name, listed.get(name)
        if name in names and target.resolve() in inputs:
            raise BadInput(f"{target}: is an input and would be replaced; {other}")
        if name not in listed and os.path.lexists(target):
            raise BadInput(f"{target}: was not written by predict.py; move it away, or {other}")
        if mark and target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() != mark:
            raise BadInput(f"{target}: was changed since predict.py wrote it; move it away, or {other}")


# ---- Names ----

def output_names(files, path, ending):
    """Return {file: its mask's path below the output folder}: the input's with another ending. Inputs that
    differ in their endings alone keep them; what would still share a name gets a number."""
    top, names = path if path.is_dir() else path.parent, {}
    full = {file: file.relative_to(top) for file in files}
    short = {file: str(name.parent / stem_of(name)) for file, name in full.items()}
    number = Counter(map(look, short.values()))
    taken = {look(str(folder)) for name in full.values() for folder in name.parents}  # names of folders
    for file, name in full.items():
        stems = [short[file]] if number[look(short[file])] == 1 else []
        for stem in itertools.chain(stems, [name], (f"{name}_{i}" for i in itertools.count(2))):
            names[file] = Path(f"{stem}{ending}")
            used = {look(str(one)) for one in companions(names[file])}
            if used.isdisjoint(taken) and not any(map(RESERVED.fullmatch, used)):
                break
        taken |= used
    return names


def companions(mask):
    """Return the paths of all that may be written of an input: mask, probabilities, a picture of them."""
    return mask, Path(f"{mask}.npz"), mask.with_name(f"{mask.stem}_probability.png")


def sheet_name(number):
    """Return the name of the sheet of pictures on which input `number`, from 1, is."""
    return f"sheet_{-(-number // ROWS):03}.png"


def names_of(masks):
    """Return all that may be written of inputs, by their masks' paths: what lies beside these, and sheets."""
    return [*itertools.chain(*map(companions, masks)), *map(sheet_name, range(1, len(masks) + 1))]


# ---- Contents ----

def as_mask(labels, source, config):
    """Return a file's content: classes (S, H, W) as PNG, of two classes as 0 and 255, or as NIfTI with the
    input's header, on the input's grid, uint8."""
    if config.task not in VOLUMES:
        return as_png(Image.fromarray(labels[0] * np.uint8(255 if config.classes == 2 else 1)))
    volume = load(source)[0]
    in_lps = labels.transpose(np.argsort(slice_order(lps_sizes(volume.affine))))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("LPS"),
                                       orientations.io_orientation(volume.affine))
    turned = orientations.apply_orientation(in_lps, turn).astype(np.uint8)
    mask = type(volume)(turned.reshape(volume.shape), volume.affine, volume.header)
    mask.header.set_data_dtype(np.uint8)
    mask.header.set_slope_inter(1, 0)
    mask.header["cal_max"] = mask.header["cal_min"] = 0
    return gzip.compress(mask.to_bytes(), 1, mtime=0)


def labels_and_probabilities(parts, config, threshold, wanted):
    """Return the classes (S, H, W) uint8 of a sample whose logits come in parts, none of which is kept, and
    the probabilities (C, S, H, W) float16, of two classes of foreground alone (C = 1), None unless wanted."""
    maps = []

    def passing():
        for logits in parts:
            if wanted:
                p = logits.softmax(1)
                p = 1 - p[:, :1] if config.classes == 2 else p
                maps.append(p.swapaxes(0, 1).cpu().numpy().astype(np.float16))
            yield at_threshold(logits, threshold)

    labels = classes_of(passing(), config).cpu().numpy()
    return labels, np.concatenate(maps, 2 if config.tiles else 1) if wanted else None


def as_files(labels, p, mask, source, config):
    """Return {path: content} of what is written of an input: its mask, and unless p is None probabilities p
    (C, S, H, W), NAME.npz with `foreground` (S, H, W) or `classes`, background first, and of images of two
    classes a grey PNG too."""
    mask, arrays, picture = companions(mask)
    files, content = {mask: as_mask(labels, source, config)}, io.BytesIO()
    if p is not None:
        np.savez_compressed(content, **({"foreground": p[0]} if config.classes == 2 else {"classes": p}))
        files[arrays] = content.getvalue()
    if p is not None and config.classes == 2 and config.task not in VOLUMES:
        grey = (255 * p[0, 0].astype(np.float32)).round().astype(np.uint8)
        files[picture] = as_png(Image.fromarray(grey))
    return files


def at_threshold(logits, threshold):
    """Return logits of two classes (S, 2, H, W) moved so that class 1 is the larger one where its probability
    is above the threshold; None: as they are, which is a threshold of 0.5."""
    if threshold is None:
        return logits
    shift = torch.tensor([0.0, -math.log(threshold / (1 - threshold))], device=logits.device)
    return logits + shift.view(1, 2, 1, 1)


def table_rows(file, labels, spacing, config, threshold, statistics):
    """Return the rows of prediction.csv on a file, one a foreground class, in pixels or mm^3."""
    voxel, unit = (float(np.prod(spacing)), "mm^3") if config.task in VOLUMES else (1, "pixels")
    rows = []
    for j in range(1, config.classes):
        number = int((labels == j).sum())
        values = (file, class_name(config, j), round(number * voxel, 3), unit, f"{number / labels.size:.6f}",
                  (threshold or 0.5) if config.classes == 2 else "none", statistics)
        rows.append(dict(zip(PREDICTION_COLUMNS, values)))
    return rows


def sheet_row(file, sample, labels, config):
    """Return label and tiles of an input: an image, plain and with outlines, or slices with outlines."""
    if config.task not in VOLUMES:
        return file.name, pictures.outlined_tiles(sample, labels, config.classes, RED)
    chosen, words = pictures.slices_through(labels > 0)
    return f"{file.name}, {words}", [
        pictures.draw_classes(pictures.image_tile(sample, s), labels[s], config.classes, RED) for s in chosen]


def as_sheet(rows, config):
    """Return the PNG content of a sheet of pictures of rows (label, tiles)."""
    (label, images), *rest = rows
    label += pictures.legend([class_name(config, j) for j in range(config.classes)])
    title = "prediction: red" if config.classes == 2 else "prediction"
    titles = (title,) if config.task in VOLUMES else ("image", title)
    return as_png(pictures.contact_sheet([(label, images), *rest], titles))
