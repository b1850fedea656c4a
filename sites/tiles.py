"""Pictures at their own size (tiles: true), and the tiles that are cut out of them: squares of image_size
pixels, whose place is the row and the column of the first one. scoring/tiled.py predicts with tiles."""

from functools import partial
from itertools import product

import numpy as np
import torch

from sites import images


def stretched(pixels, file, found):
    """Return bytes mapped from [min, max] to [0, 255], as `images.scale` maps to [0, 1]; raises alike. So a
    whole slide needs little memory, and each pixel is within 1/510 of what `images.scale` gives."""
    low, high = int(pixels.min()), int(pixels.max())
    some = pixels.ravel()[::max(1, pixels.size // 100000)]
    images.scale(np.append(some, (low, high)).astype(np.float32), file, found)  # its checks
    table = np.rint((np.arange(256) - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8)
    return table[pixels]


read_alone = partial(images.read_alone, of_bytes=stretched)
read_pair = partial(images.read_pair, alone=read_alone)

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
    x, i = x[..., top:top + S, left:left + S], torch.arange(S, device=x.device)
    for axis, n in enumerate(x.shape[-2:], -2):  # 0, 1 .. n - 1, n - 1 .. 1, 0, 0, 1 ..
        x = x.index_select(axis, torch.minimum(i % (2 * n), (-1 - i) % (2 * n)))
    return x
