"""One image or one volume with its mask: find the files, decode, check, scale, resize."""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from torch.nn import functional

from config import BadInput

IMAGE_KINDS = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
Image.MAX_IMAGE_PIXELS = None  # slides are large; the memory they take is reported
warnings.filterwarnings("ignore", module="PIL")  # a broken file is one error, not warnings too


class Entry(NamedTuple):
    """One image or volume on disk with its mask."""

    case: str
    image: Path
    mask: Path


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


def look_at(file, task, is_mask=False):
    """Return what a file holds before any preparation: of an image its size, channels,
    low, high and spacing, of a mask its labels (a set). Raises BadInput, naming the file."""
    if task == "nuclei":
        pixels = decode(file, is_mask)
        size, channels, spacing = sides(pixels.shape), pixels.shape[2], "1 pixel"
    else:
        pixels, _, zooms = read_nifti(file)
        size, channels = f"{sides(pixels.shape)} x {pixels.shape[2]} slices", 1
        spacing = " x ".join(f"{step:.3g}" for step in zooms) + " mm"
    if is_mask:
        return {"labels": set(np.unique(pixels).tolist())}
    return {"size": size, "channels": channels, "low": pixels.min(), "high": pixels.max(),
            "spacing": spacing}


# ---- Images ----

def read_image_pair(image_file, mask_file):
    """Return image (1, 3, H, W) float32, scaled to [0, 1] over all channels, and mask (1, H, W)."""
    pixels, mask = decode(image_file), decode(mask_file, is_mask=True)
    # JPEG invents small values around edges: there a mask is what lies above half its maximum.
    limit = mask.max() / 2 if Path(mask_file).suffix.lower() in (".jpg", ".jpeg") else 0
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
            pages = getattr(image, "n_frames", 1)
            if image.mode == "P":  # a mask's palette index is its label, whatever its colour
                image = image if is_mask else image.convert("RGB")
            elif image.mode in ("1", "LA", "PA", "La"):
                image = image.convert("L")
            elif image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
                image = image.convert("RGB")
            pixels = np.asarray(image, dtype=np.float32)
    except Exception as problem:  # noqa: BLE001 - what a broken file raises has no common type
        raise BadInput(f"{file}: cannot be read as an image ({reason(problem)}), "
                       "export it again") from None
    if pages > 1:
        raise BadInput(f"{file}: has {pages} pages, save one alone")
    if not np.isfinite(pixels).all():
        raise BadInput(f"{file}: has NaN or infinite pixels, replace them")
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def reason(problem):
    """Return the text of an exception on one line; its type where it has none."""
    return " ".join(str(problem).split()) or type(problem).__name__


def scale(values):
    """Return values mapped from [min, max] to [0, 1], float32; a constant array becomes 0."""
    low, high = float(values.min()), float(values.max())
    return ((values - low) / (high - low if high > low else 1)).astype(np.float32)


def sides(shape):
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
        if len(volume.shape) == 3:  # a series may not fit into memory, it is not decoded
            turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt("LPS"))
            volume = volume.as_reoriented(turn)
            voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except Exception as problem:  # noqa: BLE001 - what a broken file raises has no common type
        raise BadInput(f"{file}: cannot be read as NIfTI ({reason(problem)}), "
                       "export it again") from None
    if len(volume.shape) != 3 or not voxels.size:
        raise BadInput(f"{file}: is {len(volume.shape)}-D with shape {volume.shape}, "
                       "give one 3-D volume a file")
    if not np.isfinite(voxels).all():
        raise BadInput(f"{file}: has NaN or infinite voxels, replace them")
    return voxels, volume.affine, volume.header.get_zooms()


# ---- Layouts ----

def visible(folder):
    """Return what is in a folder, sorted by name, without hidden names."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def list_images(site):
    """Return the entries and the problems of one site of 2-D images, in any of three layouts."""
    if (site / "list.txt").is_file():
        return list_text(site / "list.txt")
    slides = {path.name[6:]: path.name for path in visible(site)
              if re.match(r"(?i)slide_.", path.name) and path.is_dir()}
    if not slides:
        return pair(images_in(site / "images"), images_in(site / "masks"))
    truths = {path.name[3:] for path in visible(site) if path.name.startswith("GT_")}
    entries, problems = [], []
    for number in sorted(slides.keys() | truths):
        slide = slides.get(number, f"Slide_{number}")
        found, wrong = pair(images_in(site / slide), images_in(site / f"GT_{number}"), slide)
        entries, problems = entries + found, problems + wrong
    return entries, problems


def list_text(file):
    """Return the entries and problems of a list.txt: lines 'image mask', relative to its folder."""
    entries, problems = {}, []
    for number, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        paths = [file.parent / word for word in words]
        wrong = "" if len(words) == 2 else "expected 'image mask'"
        for path in paths if not wrong else []:
            wrong = wrong or ("" if path.is_file() else f"{path} does not exist")
        if not wrong and paths[0].stem.lower() in entries:
            wrong = f"the image name {paths[0].stem} is listed twice, keep or rename one"
        if wrong:
            problems.append(f"{file}: line {number}: {wrong}, mend the line")
        else:
            entries[paths[0].stem.lower()] = Entry(paths[0].stem, *paths)
    return list(entries.values()), problems


def images_in(folder):
    """Return [(stem, path)] of the images in a folder, none if there is no such folder."""
    return [(path.stem, path) for path in (visible(folder) if folder.is_dir() else [])
            if path.suffix.lower() in IMAGE_KINDS]


def list_volumes(site):
    """Return entries and problems of one site of volumes, CaseNN and CaseNN_segmentation."""
    files = [(re.sub(r"(?i)\.nii(\.gz)?$", "", path.name), path) for path in visible(site)
             if re.search(r"(?i)\.nii(\.gz)?$", path.name)]
    ending = re.compile(r"(?i)_segmentation$")
    masks = [(ending.sub("", stem), path) for stem, path in files if ending.search(stem)]
    return pair([(stem, path) for stem, path in files if not ending.search(stem)], masks)


def pair(images, masks, case=None):
    """Return entries of images and masks [(stem, path)] that match in any case, and problems."""
    problems, by_stem = [], ({}, {})
    for files, known, what in ((images, by_stem[0], "image"), (masks, by_stem[1], "mask")):
        for stem, path in files:
            if stem.lower() in known:
                other = known[stem.lower()].name
                problems.append(f"{path}: {other} is a second {what} of that name, keep one")
            known[stem.lower()] = path
    stems, truths = by_stem
    problems += [f"{stems[stem]}: has no mask of that name, add it or remove the image"
                 for stem in stems.keys() - truths.keys()]
    problems += [f"{truths[stem]}: has no image of that name, add it or remove the mask"
                 for stem in truths.keys() - stems.keys()]
    return [Entry(case or original, stems[original.lower()], truths[original.lower()])
            for original, _ in images if original.lower() in truths], sorted(problems)
