"""What is written of a prediction: masks on the files' own grids, probabilities, a table and pictures."""

import gzip
import io
import math

import numpy as np
import torch
from nibabel import orientations
from PIL import Image

from config import VOLUMES, class_name
from inference.output_folder import companions
from scoring import pictures
from scoring.evaluate import classes_of
from scoring.pictures import RED, as_png
from sites.volumes import load, lps_sizes, slice_order

PREDICTION_COLUMNS = ("file", "class", "size", "unit", "share", "threshold", "statistics")


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


def as_files(p, mask, config):
    """Return {path: content} of probabilities (C, S, H, W), to be written beside a mask: NAME.npz with
    `foreground` (S, H, W) or `classes`, background first; of images of two classes a grey PNG too."""
    content = io.BytesIO()
    np.savez_compressed(content, **({"foreground": p[0]} if config.classes == 2 else {"classes": p}))
    _, arrays, picture = companions(mask)
    files = {arrays: content.getvalue()}
    if config.classes == 2 and config.task not in VOLUMES:
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
