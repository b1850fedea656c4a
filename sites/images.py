"""Reading a 2-D image and its mask as the files store them, or saying why that cannot be done."""

import math

import numpy as np
from PIL import Image

from config import BadInput
from sites.files import reading
from sites.labels import as_classes, look_at, whole
from sites.opening import FORMATS, GREY, as_array, is_plain, open_image

SPOT, BLANK = 4, 0.04  # side of a spot in pixels; of white, by how much spots of a blank picture differ


def read_pair(image_file, mask_file, classes=2, window=None, facts=None, alone=None):
    """Return image (1, 3, H, W) float32 in [0, 1], scaled over all channels, its classes (1, H, W) uint8,
    the size of a pixel (1, 1, 1), and warnings, a list of texts. Raises BadInput.

    window: of volumes alone; facts: a dict that takes what the files hold, for a report; alone: what reads
    the image, `read_alone` if None."""
    image, spacing, found = (alone or read_alone)(image_file, window, facts)
    labels, more = read_labels(mask_file, classes, facts)
    if labels.shape != image.shape[2:]:
        turned = "; one of them is turned by its EXIF tag" * any("EXIF" in text for text in found + more)
        raise BadInput(f"{mask_file}: its size {sides(labels.shape)} differs from its image's "
                       f"{sides(image.shape[2:])}{turned}, export the mask again at the image's size")
    if labels.any() and not image.any():
        raise BadInput(f"{image_file}: has one value everywhere, or nearly so, but its mask has foreground; "
                       "export the image again")
    return image, as_classes(labels, mask_file, classes)[None], spacing, found + more


def read_alone(file, window=None, facts=None):
    """Return an image without a mask as `read_pair` does: image, pixel size and warnings; raises BadInput.
    A blank image is one of zeros, with a warning: its noise would else be stretched to [0, 1]."""
    image, found = open_image(file)
    pixels = pixels_of(file, image)
    note(facts, pixels)
    channels = np.broadcast_to(pixels.transpose(2, 0, 1), (3, *pixels.shape[:2]))
    if is_blank(pixels, image.mode):
        found.append(blank(file, pixels))
        return np.zeros((1, *channels.shape), np.float32), (1.0, 1.0, 1.0), found
    return scale(channels, file, found)[None], (1.0, 1.0, 1.0), found


def note(facts, pixels):
    """Put what an image's pixels are into `facts`, a dict or None."""
    if facts is not None:
        facts |= {"size": sides(pixels.shape), "channels": pixels.shape[2], "spacing": "1 pixel",
                  "low": float(pixels.min()), "high": float(pixels.max())}


def blank(file, pixels):
    """Return the warning on a blank image."""
    return f"{file}: is blank (all its values are near {np.median(pixels[::8, ::8]):g}) and is read as zeros"


def read_pixels(file):
    """Return an image's pixels, float32 (H, W, 1 or 3), without alpha, and warnings; raises BadInput."""
    image, found = open_image(file)
    return pixels_of(file, image), found


def pixels_of(file, image):
    """Return the pixels of a decoded image as `read_pixels` does; raises BadInput."""
    if image.mode == "LAB":
        raise BadInput(f"{file}: is in LAB colours, save it as RGB or grey")
    if image.mode not in GREY:
        with reading(file, "RGB or grey"):
            image = image.convert("L" if image.mode in ("LA", "La") else "RGB")
    pixels = as_array(file, image)
    return pixels.reshape(*pixels.shape[:2], -1)


def is_blank(pixels, mode):
    """Return whether an image shows nothing but noise: the means of its spots of 4 x 4 pixels differ by less
    than 4 % of white, in each channel, and so do the pixels of a spot. With more than 8 bits white is the
    brightest spot, and the means differ by no more than noise does, for such files often have an offset."""
    side = SPOT if min(pixels.shape[:2]) >= SPOT else 1
    h, w = (n - n % side for n in pixels.shape[:2])
    every = max(1, math.isqrt(h * w // 4_000_000))  # of a slide some spots do
    spots = pixels[:h, :w].reshape(h // side, side, w // side, side, -1)[::every, :, ::every]
    wide = mode.startswith(("I", "F"))
    for few in (spots[::8, :, ::8], spots):  # mostly few spots differ enough
        means = few.mean(1).mean(2).reshape(-1, spots.shape[4])  # one axis after the other is much faster
        contrast = (means.max(0) - means.min(0)).max()
        white = abs(means).max() if wide else 255
        if contrast > BLANK * white:
            return False
    noise = spots.std((1, 3)).mean((0, 1)).max()
    return bool(noise <= BLANK * white and not (wide and contrast > 4 * noise))


def read_labels(file, classes=2, facts=None):
    """Return a mask's labels (H, W), whole numbers as float32, and warnings; raises BadInput."""
    image, found = open_image(file)
    if is_plain(image):
        labels, values = look_at(whole(as_array(file, image), file, found), file, classes, found)
    else:
        from sites.unusual_masks import read_unusual  # a run on plain grey masks does not load it
        labels, values = read_unusual(file, image, classes, found)
    if facts is not None:
        facts["labels"] = values.tolist()
    return labels, found


def scale(values, file, found):
    """Return values mapped from [min, max] to [0, 1], float32; raises BadInput if all are one value, and
    adds a warning to `found` if hardly any contrast is left."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        raise BadInput(f"{file}: has one value everywhere ({low:g}), export it again")
    if not math.isfinite(high - low):
        raise BadInput(f"{file}: its values reach from {low:g} to {high:g}, export it again")
    scaled = ((values - low) / (high - low)).astype(np.float32, copy=False)
    darker, brighter = np.quantile(scaled.ravel()[::max(1, scaled.size // 10000)], (0.01, 0.99))
    if brighter - darker < 0.02:
        found.append(f"{file}: has hardly any contrast, a few values of up to {high:g} hide the rest")
    return scaled


def shape_of(file):
    """Return the shape (S, C, H, W) that an image has by its header alone; raises what Pillow does."""
    with Image.open(file, formats=FORMATS) as image:
        return 1, 1 if image.mode in GREY else 3, image.height, image.width


def sides(shape):
    """Return an image's size for a message."""
    return " x ".join(str(n) for n in shape[:2])
