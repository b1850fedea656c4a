"""What is written of a prediction: masks on the files' own grids, probabilities, a table and pictures."""

import csv
import io

import nibabel
import numpy as np
from PIL import Image

from rounds.checkpoint import save
from scoring.pictures import contact_sheet, draw_outline, image_tile
from sites.volumes import as_labels_of

ROWS = 8  # inputs on a sheet of pictures
COLUMNS = ("file", "class", "size", "unit", "share", "statistics")


def write_mask(target, labels, source, task):
    """Write labels (S, H, W) as PNG of 0 and 255, or as NIfTI with the input's affine and header."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if task == "nuclei":
        content = io.BytesIO()
        Image.fromarray(np.uint8(255) * (labels[0] > 0)).save(content, "png")
        save(target, content.getvalue())
    else:
        save_nifti(target, as_labels_of(source, labels))


def save_nifti(target, image):
    """Write a NIfTI image, compressed, whole or not at all."""
    part = target.with_name(f".{target.name.removesuffix('.nii.gz')}.part.nii.gz")
    nibabel.save(image, part)
    part.replace(target)


def write_probabilities(target, probabilities):
    """Write probabilities of foreground (S, H, W) as float16, in the order of slices, rows, columns."""
    content = io.BytesIO()
    np.savez_compressed(content, foreground=probabilities.astype(np.float16))
    save(target, content.getvalue())


def table_row(file, labels, spacing, task, statistics):
    """Return the row of prediction.csv on the foreground of a file, in pixels or mm^3."""
    number = int((labels > 0).sum())
    unit = "pixels" if task == "nuclei" else "mm^3"
    size = number if task == "nuclei" else round(number * float(np.prod(spacing)), 3)
    return file, 1, size, unit, f"{number / labels.size:.6f}", statistics


def write_table(target, rows):
    """Write prediction.csv."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([COLUMNS, *rows])
    save(target, table.getvalue().encode("utf-8", "backslashreplace"))


def tiles(sample, labels):
    """Return two tiles of the slice with most foreground: plain, and with the prediction's outline."""
    s = int((labels > 0).sum((1, 2)).argmax())
    image = image_tile(sample, s)
    return [image, draw_outline(image, labels[s] > 0, (255, 0, 0))]


def write_sheet(target, rows):
    """Write a sheet of pictures of rows (label, tiles)."""
    content = io.BytesIO()
    contact_sheet(rows, ("image", "prediction: red")).save(content, "png")
    save(target, content.getvalue())
