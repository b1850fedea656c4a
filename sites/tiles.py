"""Pictures at their own size (tiles: true), and the tiles that are cut out of them.

A picture is kept as its file has it. A tile is a square of image_size pixels of it; its place is the row and
the column of its first pixel. Training takes tiles at random places; scoring/tiled.py predicts with tiles.
"""

from itertools import product

import numpy as np
import torch

from sites import images

STRIP = 1024  # rows of a picture that are converted at once


# ---- Reading ----

def read_pair(image_file, mask_file, *given):
    """Return what `images.read_pair` does, with the image as `read_alone` gives it."""
    return images.read_pair(image_file, mask_file, *given, alone=read_alone)


def read_alone(file, window=None, facts=None):
    """Return an image as `images.read_alone` does, but (1, 1 or 3, H, W), and pixels of 8 bits as bytes, 255
    for 1.0: so a whole slide needs little memory. Stretched to all 256 values, it is within 1/510."""
    image, found = images.open_image(file)
    wide = image.mode.startswith(("I", "F"))  # more than 8 bits
    pixels = images.pixels_of(file, image) if wide else bytes_of(file, image)
    images.note(facts, pixels)
    if images.is_blank(pixels, image.mode):
        found.append(images.blank(file, pixels))
        pixels = np.zeros_like(pixels)
    else:
        pixels = (images.scale if wide else stretched)(pixels, file, found)
    return pixels.transpose(2, 0, 1)[None], (1.0, 1.0, 1.0), found


def bytes_of(file, image):
    """Return the pixels (H, W, 1 or 3) of an image of 8 bits, uint8, converted strip by strip."""
    W, H = image.size
    strips = (image.crop((0, top, W, min(top + STRIP, H))) for top in range(0, H, STRIP))
    return np.concatenate([images.pixels_of(file, strip).astype(np.uint8) for strip in strips])


def stretched(pixels, file, found):
    """Return bytes mapped from [min, max] to [0, 255], as `images.scale` maps to [0, 1]; raises alike."""
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
