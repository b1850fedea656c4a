"""What is written of a prediction: masks on the files' own grids, probabilities, a table and pictures."""

import csv
import io

import nibabel
import numpy as np
from PIL import Image

from config import VOLUMES, class_name
from rounds.checkpoint import save
from scoring.pictures import RED, contact_sheet, draw_classes, fullest_slice, image_tile, legend
from sites.volumes import as_labels_of

ROWS = 8  # inputs on a sheet of pictures
COLUMNS = ("file", "class", "size", "unit", "share", "statistics")


def write_mask(target, labels, source, config):
    """Write classes (S, H, W) as PNG, of two classes as 0 and 255, or as NIfTI with the input's header."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if config.task in VOLUMES:
        save_nifti(target, as_labels_of(source, labels))
    else:
        content = io.BytesIO()
        Image.fromarray(labels[0] * np.uint8(255 if config.classes == 2 else 1)).save(content, "png")
        save(target, content.getvalue())


def save_nifti(target, image):
    """Write a NIfTI image, compressed, whole or not at all."""
    part = target.with_name(f".{target.name.removesuffix('.nii.gz')}.part.nii.gz")
    nibabel.save(image, part)
    part.replace(target)


def write_probabilities(target, logits):
    """Write the probabilities of logits (S, C, H, W) as float16, in the order of slices, rows, columns.

    Of two classes `foreground` (S, H, W), of more `classes` (C, S, H, W), background first.
    """
    p = logits.softmax(1).cpu().numpy()
    maps = {"foreground": 1 - p[:, 0]} if p.shape[1] == 2 else {"classes": p.swapaxes(0, 1)}
    content = io.BytesIO()
    np.savez_compressed(content, **{name: values.astype(np.float16) for name, values in maps.items()})
    save(target, content.getvalue())


def table_rows(file, labels, spacing, config, statistics):
    """Return the rows of prediction.csv on a file, one a foreground class, in pixels or mm^3."""
    rows = []
    for j in range(1, config.classes):
        number = int((labels == j).sum())
        size, unit = (round(number * float(np.prod(spacing)), 3), "mm^3") if config.task in VOLUMES else \
            (number, "pixels")
        rows.append((file, class_name(config, j), size, unit, f"{number / labels.size:.6f}", statistics))
    return rows


def write_table(target, rows):
    """Write prediction.csv."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    save(target, table.getvalue().encode("utf-8", "backslashreplace"))


def tiles(sample, labels, classes):
    """Return two tiles of the slice with most foreground: plain, and with the prediction's outlines."""
    s = fullest_slice(labels)
    image = image_tile(sample, s)
    return [image, draw_classes(image, labels[s], classes, RED)]


def write_sheet(target, rows, config):
    """Write a sheet of pictures of rows (label, tiles)."""
    (label, images), *rest = rows
    rows = [(label + legend([class_name(config, j) for j in range(config.classes)]), images), *rest]
    content = io.BytesIO()
    title = "prediction: red" if config.classes == 2 else "prediction"
    contact_sheet(rows, ("image", title)).save(content, "png")
    save(target, content.getvalue())
