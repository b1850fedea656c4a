"""What is written of a prediction: masks on the files' own grids, probabilities, a table and pictures."""

import gzip
import io

import numpy as np
import torch
from nibabel import orientations
from PIL import Image

from config import VOLUMES, class_name
from rounds.checkpoint import save
from scoring.pictures import as_png, contact_sheet, legend
from sites.volumes import load, lps_sizes, slice_order

ROWS = 8  # inputs on a sheet of pictures
PREDICTION_COLUMNS = ("file", "class", "size", "unit", "share", "statistics")


def write_mask(target, labels, source, config):
    """Write classes (S, H, W) as PNG, of two classes as 0 and 255, or as NIfTI with the input's header."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if config.task in VOLUMES:
        save(target, gzip.compress(as_labels_of(source, labels).to_bytes(), 1, mtime=0))
    else:
        save(target, as_png(Image.fromarray(labels[0] * np.uint8(255 if config.classes == 2 else 1))))


def as_labels_of(file, found):
    """Return labels found (S, H, W) as a NIfTI image on the grid of the volume in `file`, uint8."""
    volume = load(file)[0]
    in_lps = found.transpose(np.argsort(slice_order(lps_sizes(volume.affine))))
    turn = orientations.ornt_transform(orientations.axcodes2ornt("LPS"),
                                       orientations.io_orientation(volume.affine))
    turned = orientations.apply_orientation(in_lps, turn).astype(np.uint8)
    labels = type(volume)(turned.reshape(volume.shape), volume.affine, volume.header)
    labels.header.set_data_dtype(np.uint8)
    labels.header.set_slope_inter(1, 0)
    labels.header["cal_max"] = labels.header["cal_min"] = 0
    return labels


def labels_and_probabilities(parts, config, wanted):
    """Return the classes (S, H, W) uint8 of a sample whose logits come in parts, and the probabilities that
    `write_probabilities` takes, None unless wanted. No part is kept longer than it is needed."""
    labels, maps, axis = [], [], 1 if config.tiles else 0  # tiles: parts are strips, else slices
    for logits in parts:
        labels.append(logits.argmax(1).to(torch.uint8).cpu().numpy())
        if wanted:
            p = logits.softmax(1)
            p = 1 - p[:, :1] if config.classes == 2 else p
            maps.append(p.swapaxes(0, 1).cpu().numpy().astype(np.float16))
    return np.concatenate(labels, axis), np.concatenate(maps, axis + 1) if wanted else None


def write_probabilities(target, p):
    """Write probabilities (C, S, H, W) float16: of two classes `foreground` (S, H, W), of more `classes`
    (C, S, H, W), background first."""
    content = io.BytesIO()
    np.savez_compressed(content, **({"foreground": p[0]} if len(p) == 1 else {"classes": p}))
    save(target, content.getvalue())


def table_rows(file, labels, spacing, config, statistics):
    """Return the rows of prediction.csv on a file, one a foreground class, in pixels or mm^3."""
    voxel, unit = (float(np.prod(spacing)), "mm^3") if config.task in VOLUMES else (1, "pixels")
    rows = []
    for j in range(1, config.classes):
        number = int((labels == j).sum())
        values = (file, class_name(config, j), round(number * voxel, 3), unit, f"{number / labels.size:.6f}",
                  statistics)
        rows.append(dict(zip(PREDICTION_COLUMNS, values)))
    return rows


def write_sheet(target, rows, config):
    """Write a sheet of pictures of rows (label, tiles)."""
    (label, images), *rest = rows
    rows = [(label + legend([class_name(config, j) for j in range(config.classes)]), images), *rest]
    title = "prediction: red" if config.classes == 2 else "prediction"
    save(target, as_png(contact_sheet(rows, ("image", title))))
