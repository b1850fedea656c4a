"""One image or one volume with its mask as a Sample: decoded, checked, scaled and resized."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from config import VOLUMES
from sites import images, volumes
from sites.files import enough_memory
from sites.images import sides


class Sample(NamedTuple):
    """One image or one volume, decoded once and kept in memory: the unit that is scored."""

    site: str
    case: str             # patient: the unit of the splits
    name: str             # file name of the image
    images: torch.Tensor  # (S, 3, h, w) float32 in [0, 1]; S = 1 for an image
    masks: torch.Tensor   # (S, h, w) uint8, classes from 0
    truth: np.ndarray     # (S, H, W) uint8, classes on the file's own grid
    spacing: tuple        # of a voxel (slice, row, column): mm for volumes, 1 pixel for images
    warnings: tuple = ()  # what is possible but suspicious, as texts that name the file


def read_sample(entry, site, task, size, classes=2):
    """Return the Sample of one entry (case, image file, mask file), resized to size x size.

    Images are resized with antialiasing, masks by nearest. Raises BadInput, naming the file.
    """
    with enough_memory(entry.image):
        if task in VOLUMES:
            image, truth, spacing, found = volumes.read_volume_pair(entry.image, entry.mask, classes)
        else:
            image, truth, found = images.read_image_pair(entry.image, entry.mask, classes)
            spacing = (1.0, 1.0, 1.0)
        # nearest-exact takes the pixel at a block's centre; nearest would shift masks by half a block
        masks = functional.interpolate(torch.from_numpy(truth)[:, None], (size, size),
                                       mode="nearest-exact")[:, 0]
        return Sample(site, entry.case, Path(entry.image).name, as_input(image, task, size), masks, truth,
                      spacing, tuple(found))


def read_unlabelled(file, task, size):
    """Return the Sample of an image or volume without a mask: its truth is empty, on the file's own grid."""
    with enough_memory(file):
        if task in VOLUMES:
            image, spacing, found = volumes.read_volume(file)
        else:
            image, found = images.read_image(file)
            spacing = (1.0, 1.0, 1.0)
        grid = (len(image), *image.shape[2:])
        return Sample("", "", Path(file).name, as_input(image, task, size), None,
                      np.broadcast_to(np.uint8(0), grid), spacing, tuple(found))


def as_input(image, task, size):
    """Return an image (S, C, H, W) as the network takes it, (S, 3, size, size)."""
    image = functional.interpolate(torch.from_numpy(image), (size, size), mode="bilinear",
                                   align_corners=False, antialias=True).clamp_(0, 1)
    return three_slice_stacks(image[:, 0]) if task in VOLUMES else image


def three_slice_stacks(slices):
    """Return slices i-1, i, i+1 as channels: (S, h, w) -> (S, 3, h, w), a view that copies nothing.

    The first and the last slice stand in for their missing neighbour.
    """
    padded = torch.cat([slices[:1], slices, slices[-1:]])
    return padded.unfold(0, 3, 1).permute(0, 3, 1, 2)


def look_at(entry, task, classes=2):
    """Return what the files of an entry hold before any preparation: size, channels, low, high,
    labels (a set) and spacing, for a report. Raises BadInput, naming the file."""
    with enough_memory(entry.image):
        if task in VOLUMES:
            pixels, _, sizes, _ = volumes.read_nifti(entry.image)
            labels = volumes.read_labels(entry.mask, classes)[0]
            size, channels = f"{sides(pixels.shape)} x {pixels.shape[2]} slices", 1
            spacing = volumes.listed(sizes) + " mm"
        else:
            pixels, labels = images.read_pixels(entry.image)[0], images.read_labels(entry.mask, classes)[0]
            size, channels, spacing = sides(pixels.shape), pixels.shape[2], "1 pixel"
        return {"size": size, "channels": channels, "low": pixels.min(), "high": pixels.max(),
                "labels": set(np.unique(labels).tolist()), "spacing": spacing}
