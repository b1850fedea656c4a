"""Pictures at their own size (tiles: true): crops to train on, and tiles that predict them strip by strip.

A picture is kept as its file has it. A tile is a square of image_size pixels of it; its place is the row and
the column of its first pixel. Training takes tiles at random places. Predictions average overlapping tiles.
"""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

from sites import images
from sites.readers import Sample

STRIP = 1024   # rows of a picture that are decoded at once
TOGETHER = 8   # tiles in one pass of a prediction


# ---- Reading ----

def read_native(entry, site, size, classes):
    """Return the Sample of an image and its mask at their own size, to be cut into tiles of `size` pixels."""
    image, truth, spacing, found = images.read_pair(entry.image, entry.mask, classes, alone=read_alone)
    return Sample(site, entry.case, Path(entry.image).name, in_channels(image), torch.from_numpy(truth),
                  truth, spacing, tuple(found), size)


def read_unlabelled(file, size):
    """Return the Sample of an image without a mask at its own size: its truth is empty."""
    image, spacing, found = read_alone(file)
    truth = np.broadcast_to(np.uint8(0), (1, *image.shape[2:]))
    return Sample("", "", file.name, in_channels(image), None, truth, spacing, tuple(found), size)


def in_channels(image):
    """Return a tensor (1, 3, H, W) of an image (1, 1 or 3, H, W); three equal channels share their memory."""
    return torch.from_numpy(image).expand(1, 3, -1, -1)


def read_alone(file):
    """Return an image as `images.read_alone` does, in less memory: pixels of 8 bits stay bytes, 255 is 1.0,
    and grey has one channel. Stretched to all 256 values, a pixel differs by at most 1/510."""
    image, found = images.open_image(file)
    if image.mode.startswith(("I", "F")):  # more than 8 bits
        pixels = images.scale(images.pixels_of(file, image), file, found)
    else:
        pixels = stretched(bytes_of(file, image), file, found)
    return pixels.transpose(2, 0, 1)[None], (1.0, 1.0, 1.0), found


def bytes_of(file, image):
    """Return the pixels (H, W, 1 or 3) of an image of 8 bits, uint8, decoded strip by strip."""
    W, H = image.size
    strips = (image.crop((0, top, W, min(top + STRIP, H))) for top in range(0, H, STRIP))
    return np.concatenate([images.pixels_of(file, strip).astype(np.uint8) for strip in strips])


def stretched(pixels, file, found):
    """Return bytes mapped from [min, max] to [0, 255], as `images.scale` maps to [0, 1]; raises as it does."""
    low, high = int(pixels.min()), int(pixels.max())
    some = pixels.ravel()[::max(1, pixels.size // 100000)]
    images.scale(np.append(some, (low, high)).astype(np.float32), file, found)  # its checks
    table = np.rint((np.arange(256) - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)
    return table[pixels]


# ---- Tiles ----

def places(sample):
    """Return the places (row, column) of the fewest tiles that cover a picture."""
    S, sides = sample.tile, sample.truth.shape[1:]
    return [*product(*([min(start, max(n - S, 0)) for start in range(0, n, S)] for n in sides))]


def crop(sample, place, generator=None):
    """Return a tile: image (3, S, S) float32 and mask (S, S), None without masks. With a generator its place
    is drawn, each one within the picture as likely as another."""
    S, sides = sample.tile, sample.truth.shape[1:]
    if generator is not None:
        place = [int(torch.randint(max(n - S, 0) + 1, (), generator=generator)) for n in sides]
    x = window(sample.images[0], place, S)
    return (x.float() / 255 if x.dtype == torch.uint8 else x,
            None if sample.masks is None else window(sample.masks[0], place, S))


def window(x, place, S):
    """Return (..., S, S) of x (..., H, W) at a place. A picture smaller than that goes on as its mirror
    image, as often as is needed."""
    top, left = place
    x = x[..., top:top + S, left:left + S]
    rows, columns = (mirrored(n, S).to(x.device) for n in x.shape[-2:])
    return x[..., rows, :][..., columns]


def mirrored(n, S):
    """Return S indices 0, 1 .. n - 1, n - 1 .. 1, 0, 0, 1 .. into an axis of n pixels."""
    i = torch.arange(S) % (2 * n)
    return torch.where(i < n, i, 2 * n - 1 - i)


# ---- Predicting ----

def overlapping(n, S):
    """Return pairs (start, share (S,)) of the tiles along an axis of n pixels. They start at every multiple
    of S / 2, and the last one ends with the axis. A share falls linearly from a tile's middle to its ends;
    at every pixel the shares add up to 1."""
    starts = [*range(0, n - S, S // 2), max(n - S, 0)]
    ramp = (torch.arange(S) + 0.5).minimum(S - 0.5 - torch.arange(S))
    total = torch.zeros(max(n, S))
    for start in starts:
        total[start:start + S] += ramp
    return [(start, ramp / total[start:start + S]) for start in starts]


def in_strips(sample, run):
    """Yield the logits (1, C, h, W) of a picture from top to bottom, the mean of all tiles over a pixel in
    their shares. run: x (B, 3, S, S) -> logits (B, C, S, S). One row of tiles is kept in memory."""
    (H, W), S, strip = sample.truth.shape[1:], sample.tile, None
    rows, columns = overlapping(H, S), overlapping(W, S)
    for (top, share), (following, _) in pairwise([*rows, (H, None)]):
        for i in range(0, len(columns), TOGETHER):
            x = torch.stack([crop(sample, (top, left))[0] for left, _ in columns[i:i + TOGETHER]])
            for (left, of_column), logits in zip(columns[i:], run(x)):
                strip = logits.new_zeros(len(logits), S, max(W, S)) if strip is None else strip
                strip[..., left:left + S] += (share[:, None] * of_column).to(logits.device) * logits
        done = following - top
        yield strip[None, :, :done, :W]
        strip = torch.cat([strip[:, done:], torch.zeros_like(strip[:, :done])], 1)
