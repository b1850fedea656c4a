"""Pictures: a slice as a tile, the outline of a mask on it, and tiles on a sheet."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from scoring.metrics import border

TILE = 192  # pixels, side of a picture on a sheet; of a larger one, whose objects are small, up to twice that
GAP = 4     # between them
SLICES_SHOWN = 6  # of a volume, in a row
GREEN, RED = (0, 255, 0), (255, 0, 0)
EXTRA, MISSED, OTHER = (86, 180, 233), (213, 94, 0), (240, 228, 66)  # that the colour-blind can tell apart
ERRORS = "white: found, orange: missed, blue: too much"
COLOURS = {"green": GREEN, "blue": (60, 120, 255), "orange": (255, 150, 0), "magenta": (255, 0, 255),
           "cyan": (0, 255, 255), "yellow": (255, 255, 0), "red": RED, "white": (255, 255, 255)}


def side_of(shape):
    """Return width and height of a tile in the proportions of (H, W), from TILE to 2 TILE the longer side."""
    return tuple(max(1, round(min(max(TILE, *shape), 2 * TILE) * n / max(shape))) for n in shape[::-1])


def image_tile(sample, s):
    """Return slice s of a sample, not its neighbours, as a tile (h, w, 3) uint8 in the file's proportions."""
    image = sample.images[s].cpu()
    image = image if image.dtype == torch.uint8 else (image * 255).round_().byte()
    image = image if len(sample.truth) == 1 else image[1:2].expand(3, -1, -1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return np.asarray(picture.resize(side_of(sample.truth.shape[1:]), Image.Resampling.BICUBIC))


def draw_classes(tile, labels, classes, colour):
    """Return a copy of a tile with the outline of every foreground class of labels (H, W), of any size, in
    the colour given or, of several classes, each in its own (see `legend`), the higher one on top."""
    colours, drawn = [colour] if classes == 2 else list(COLOURS.values()), tile.copy()
    for j in range(1, classes):
        inside = Image.fromarray(labels >= j).resize(tile.shape[1::-1], Image.Resampling.NEAREST)
        drawn[border(np.asarray(inside))] = colours[(j - 1) % len(colours)]
    return drawn


def coloured(sample, s, found):
    """Return slice s in grey with the foreground found in white, and in colours where it errs."""
    grey = image_tile(sample, s).mean(2, keepdims=True).repeat(3, 2) * 0.6
    p, y = (np.asarray(Image.fromarray(labels).resize(grey.shape[1::-1], Image.Resampling.NEAREST))
            for labels in (found, sample.truth[s]))
    for area, colour in (((p == y) & (y > 0), (255, 255, 255)), ((p > 0) & (y == 0), EXTRA),
                         ((p == 0) & (y > 0), MISSED), ((p > 0) & (y > 0) & (p != y), OTHER)):
        grey[area] = 0.35 * grey[area] + 0.65 * np.array(colour)
    return grey.astype(np.uint8)


def legend(names):
    """Return what stands behind the label of a sheet's first row, "" for two classes; names: of all."""
    if len(names) == 2:
        return ""
    listed = (f"{name} {colour}" for name, colour in zip(names[1:], len(names) * list(COLOURS)))
    return f"   (outlines: {', '.join(listed)})"


def slices_through(inside):
    """Return up to SLICES_SHOWN slices of (S, H, W) in equal steps through what is True, else through all,
    and words that number them."""
    found = inside.any((1, 2)).nonzero()[0]
    found = found if len(found) else np.arange(len(inside))
    chosen = np.unique(found[np.linspace(0, len(found) - 1, SLICES_SHOWN).round().astype(int)]).tolist()
    return chosen, f"slices {', '.join(str(s + 1) for s in chosen)} of {len(inside)}"


def fullest_slice(labels):
    """Return the slice of labels (S, H, W) that has most foreground."""
    return int((labels > 0).sum((1, 2)).argmax())


def outlined_tiles(sample, labels, classes, colour):
    """Return two tiles of the slice with most foreground: plain, and with outlines; labels: (S, H, W)."""
    s = fullest_slice(labels)
    tile = image_tile(sample, s)
    return [tile, draw_classes(tile, labels[s], classes, colour)]


def contact_sheet(rows, titles=()):
    """Return a picture of rows (label, [tiles]); titles: captions over the tiles."""
    head, label_height = (18 if titles else 0), 18
    side = max(max(image.shape) for _, images in rows for image in images)
    size = max(len(images) for _, images in rows) * (side + GAP), head + len(rows) * (side + label_height)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        draw.text((i * (side + GAP) + 4, 3), title, "black", font)
    for number, (label, images) in enumerate(rows):
        y = head + number * (side + label_height)
        draw.text((4, y + 2), label, "black", font)
        for i, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (i * (side + GAP), y + label_height))
    return sheet


def as_png(picture):
    """Return the content of a PNG file of a picture."""
    content = io.BytesIO()
    picture.save(content, "png")
    return content.getvalue()
