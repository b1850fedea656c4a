"""One image or one volume with its mask as a Sample: decoded, checked, scaled and resized."""

import importlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from config import VOLUMES
from sites.files import enough_memory

SPLITS = ("train", "val", "test")


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
    facts: dict | None = None  # what its files hold before any preparation, plain values for a report
    tile: int = 0         # side of the tiles of an image whose images and masks are (H, W) too; 0: resized


def read_sample(entry, site, task, size, classes=2, window=None, tiles=False):
    """Return the Sample of one Entry, resized to size x size, or to be cut into tiles of that size. Images
    are resized with antialiasing, masks by nearest. Raises BadInput, naming the file."""
    with enough_memory(entry.image):
        reader, facts = reader_of(task, tiles), {}
        if len(entry.masks) > 1 or entry.labels:
            from sites.unusual_masks import read_united  # a run on single masks does not load it
            image, truth, spacing, found = read_united(reader, entry, classes, window, facts)
        else:
            image, truth, spacing, found = reader.read_pair(entry.image, *entry.masks, classes, window, facts)
        masks = torch.from_numpy(truth)
        if not tiles:  # nearest-exact takes the pixel at a block's centre; nearest would shift them by half
            masks = functional.interpolate(masks[:, None], (size, size), mode="nearest-exact")[:, 0]
        return Sample(site, entry.case, Path(entry.image).name, as_input(image, task, size, tiles), masks,
                      truth, spacing, tuple(found), facts, size if tiles else 0)


def slices_of(sample):
    """Return what names the slices of a sample: their numbers, or the places of the tiles that cover it."""
    if sample.tile:
        from sites.tiles import places
        return places(sample)
    return range(len(sample.images))


def slice_of(sample, s, generator=None):
    """Return image (3, h, w) float32 and mask (h, w), None without masks, of slice s, or of the tile at place
    s; with a generator the tile lies at random."""
    if sample.tile:
        from sites.tiles import crop
        return crop(sample, s, generator)
    return sample.images[s], None if sample.masks is None else sample.masks[s]


def reader_of(task, tiles=False):
    """Return the module that reads a task's files: a run on images does not load what reads volumes."""
    name = "volumes" if task in VOLUMES else "tiles" if tiles else "images"
    return importlib.import_module(f"sites.{name}")


def as_input(image, task, size, tiles=False):
    """Return an image (S, C, H, W) as the network takes it, (S, 3, size, size), with tiles at its own size,
    (1, 3, H, W); a grey one has one channel in memory."""
    image = torch.from_numpy(image)
    if not tiles:
        image = functional.interpolate(image, (size, size), mode="bilinear", align_corners=False,
                                       antialias=True).clamp_(0, 1)
    return three_slice_stacks(image[:, 0]) if task in VOLUMES else image.expand(-1, 3, -1, -1)


def three_slice_stacks(slices):
    """Return a view (S, 3, h, w) of slices (S, h, w): i-1, i, i+1 as channels, at an end the last twice."""
    padded = torch.cat([slices[:1], slices, slices[-1:]])
    return padded.unfold(0, 3, 1).permute(0, 3, 1, 2)
