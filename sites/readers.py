"""Reading one image or one volume with its mask: decode, check, scale, resize."""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from torch.nn import functional

from config import BadInput

Image.MAX_IMAGE_PIXELS = None  # slides are large; the memory they take is reported


# What Pillow and nibabel raise on files that are truncated or foreign.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, OverflowError, MemoryError,
              struct.error, zlib.error, ImageFileError, nibabel.spatialimages.HeaderDataError)
MM = {"meter": 1000.0, "micron": 0.001}  # what a header's unit of length is, else 1


class Sample(NamedTuple):
    """One image or one volume, decoded once and kept in memory: the unit that is scored."""

    site: str
    case: str             # patient: the unit of the splits
    name: str             # file name of the image
    images: torch.Tensor  # (S, 3, h, w) float32 in [0, 1]; S = 1 for an image
    masks: torch.Tensor   # (S, h, w) uint8, 0 or 1
    truth: np.ndarray     # (S, H, W) bool, on the file's own grid
    spacing: tuple        # of a voxel (slice, row, column): mm for volumes, 1 pixel for images


def read_sample(entry, site, task, size):
    """Return the Sample of one entry (case, image file, mask file), resized to size x size.

    Images are resized with antialiasing, masks by nearest. Raises BadInput, naming the file.
    """
    if task == "nuclei":
        image, truth, spacing = *read_image_pair(entry.image, entry.mask), (1.0, 1.0, 1.0)
    else:
        image, truth, spacing = read_volume_pair(entry.image, entry.mask)
    image = functional.interpolate(torch.from_numpy(image), (size, size), mode="bilinear",
                                   align_corners=False, antialias=True).clamp_(0, 1)
    # nearest-exact takes the pixel at a block's centre; nearest would shift masks by half a block
    masks = functional.interpolate(torch.from_numpy(truth).view(torch.uint8)[:, None], (size, size),
                                   mode="nearest-exact")[:, 0]
    images = image if task == "nuclei" else three_slice_stacks(image[:, 0])
    return Sample(site, entry.case, Path(entry.image).name, images, masks, truth, spacing)


def three_slice_stacks(slices):
    """Return slices i-1, i, i+1 as channels: (S, h, w) -> (S, 3, h, w), a view that copies nothing.

    The first and the last slice stand in for their missing neighbour.
    """
    padded = torch.cat([slices[:1], slices, slices[-1:]])
    return padded.unfold(0, 3, 1).permute(0, 3, 1, 2)


def look_at(entry, task):
    """Return what the files of an entry hold before any preparation: size, channels, low, high,
    labels (a set) and spacing, for a report. Raises BadInput, naming the file."""
    if task == "nuclei":
        pixels, labels = decode(entry.image), decode(entry.mask, is_mask=True)
        size, channels, spacing = sides(pixels.shape), pixels.shape[2], "1 pixel"
    else:
        (pixels, _, zooms), (labels, _, _) = read_nifti(entry.image), read_nifti(entry.mask)
        size, channels = f"{sides(pixels.shape)} x {pixels.shape[2]} slices", 1
        spacing = " x ".join(f"{step:.3g}" for step in zooms) + " mm"
    return {"size": size, "channels": channels, "low": pixels.min(), "high": pixels.max(),
            "labels": set(np.unique(labels).tolist()), "spacing": spacing}


# ---- Images ----

def read_image_pair(image_file, mask_file):
    """Return image (1, 3, H, W) float32, scaled to [0, 1] over all channels, and mask (1, H, W)."""
    pixels, mask = decode(image_file), decode(mask_file, is_mask=True)
    if not np.isfinite(pixels).all():
        raise BadInput(f"{image_file}: has NaN or infinite pixels, replace them")
    # JPEG invents small values around edges: there a mask is what lies above half its maximum.
    limit = mask.max() / 2 if Path(mask_file).suffix.lower() in (".jpg", ".jpeg") else 0
    if not np.isfinite(mask).all():
        raise BadInput(f"{mask_file}: has NaN or infinite pixels, replace them")
    mask = (mask > limit).any(2)
    if mask.shape != pixels.shape[:2]:
        raise BadInput(f"{mask_file}: its size {sides(mask.shape)} differs from its image's "
                       f"{sides(pixels.shape)}, export the mask again at the image's size")
    channels = np.broadcast_to(pixels.transpose(2, 0, 1), (3, *mask.shape))
    return scale(channels)[None], mask[None]


def decode(file, is_mask=False):
    """Return an image file's pixels, float32 (H, W, 1 or 3), alpha dropped; raises BadInput."""
    try:
        with Image.open(file) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise BadInput(f"{file}: has {image.n_frames} pages, save one alone")
            if image.mode == "P":  # a mask's palette index is its label, whatever its colour
                image = image if is_mask else image.convert("RGB")
            elif image.mode in ("1", "LA", "PA", "La"):
                image = image.convert("L")
            elif image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
                image = image.convert("RGB")
            pixels = np.asarray(image, dtype=np.float32)
    except UNREADABLE as problem:
        raise BadInput(f"{file}: cannot be read as an image ({problem}), export it again") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def scale(values):
    """Return values mapped from [min, max] to [0, 1], float32; a constant array becomes 0."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) / (high - low if high > low else 1)).astype(np.float32)


def sides(shape):
    """Return an image's size for a message."""
    return " x ".join(str(n) for n in shape[:2])


# ---- Volumes ----

def read_volume_pair(image_file, mask_file):
    """Return volume (S, 1, H, W) float32 in [0, 1], mask (S, H, W) bool and spacing in mm.

    The volume is clipped at its 99 % quantile and scaled from [min, max]; labels are merged > 0.
    Both are turned as their headers say; slices lie along the third axis (foot to head).
    Source: paper; orientation: ours.
    """
    voxels, affine, spacing = read_nifti(image_file)
    labels, mask_affine, _ = read_nifti(mask_file)
    if labels.shape != voxels.shape:
        raise BadInput(f"{mask_file}: its size {labels.shape} differs from its image's "
                       f"{voxels.shape}, export the mask again on the image's grid")
    if not np.allclose(affine, mask_affine, rtol=0, atol=0.1 * min(spacing)):
        raise BadInput(f"{mask_file}: its header places it elsewhere than its image's, "
                       "copy the image's header (affine) to the mask")
    voxels = scale(np.minimum(voxels, np.quantile(voxels, 0.99)))
    order = (2, 1, 0)  # (x, y, z) -> (slice, row, column)
    volume = np.ascontiguousarray(voxels.transpose(order))[:, None]
    truth = np.ascontiguousarray(labels.transpose(order) > 0)
    return volume, truth, tuple(float(spacing[axis]) for axis in order)


def read_nifti(file):
    """Return voxels (X, Y, Z), affine and voxel sizes in mm, turned to left, posterior, superior.

    So rows run from front to back and columns to the patient's left, as radiologists look at it.
    """
    try:
        volume = nibabel.load(file)
        turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt("LPS"))
        volume = volume.as_reoriented(turn) if len(volume.shape) == 3 else volume
        if volume.get_data_dtype().kind not in "iuf":
            raise ValueError(f"voxels of type {volume.get_data_dtype()}")
        voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except UNREADABLE as problem:
        raise BadInput(f"{file}: cannot be read as NIfTI ({problem}), export it again") from None
    if voxels.ndim != 3:
        raise BadInput(f"{file}: is {voxels.ndim}-D with shape {voxels.shape}, "
                       "give one 3-D volume a file")
    if not np.isfinite(voxels).all():
        raise BadInput(f"{file}: has NaN or infinite voxels, replace them")
    unit = MM.get(volume.header.get_xyzt_units()[0], 1.0)
    return voxels, volume.affine * unit, tuple(unit * step for step in volume.header.get_zooms())
