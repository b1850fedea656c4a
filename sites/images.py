"""Reading a 2-D image and its mask as the files store them, or saying why that cannot be done: Pillow would
read some of them wrongly in silence."""

import math
import warnings as python_warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from config import BadInput
from sites.files import reading
from sites.labels import as_classes, as_whole, look_at

Image.MAX_IMAGE_PIXELS = None  # slides are large; the memory they take is reported

FORMATS = ("PNG", "TIFF", "BMP", "DIB", "JPEG")  # JPEG opens MPO as well
GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LOSSY = ("jpeg", "tiff_jpeg", "webp", "JPEG", "MPO")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last part of every PNG, its checksum included
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF's tags; 274 is EXIF's too
SPOT, BLANK = 4, 0.04  # side of a spot in pixels; of white, by how much spots of a blank picture differ


def read_alone(file, window=None, facts=None, of_bytes=None):
    """Return an image (1, 1 or 3, H, W) float32, scaled to [0, 1] over all channels, the size of a pixel
    (1, 1, 1), and warnings, a list of texts. A blank image is one of zeros, with a warning: its noise would
    else be stretched to [0, 1]. window: of volumes alone; facts: a dict that takes what the file holds, for a
    report; of_bytes: what scales pixels of 8 bits, if not `scale`. Raises BadInput."""
    image, found = open_image(file)
    pixels = pixels_of(file, image)
    if facts is not None:
        H, W, C = pixels.shape
        facts |= {"size": f"{H} x {W}", "channels": C, "spacing": "1 pixel",
                  "low": float(pixels.min()), "high": float(pixels.max())}
    if pixels.dtype != np.uint8 or not of_bytes:
        pixels, of_bytes = pixels.astype(np.float32, copy=False), None
    if is_blank(pixels, image.mode):
        found.append(f"{file}: is blank (all its values are near {np.median(pixels[::8, ::8]):g}), so it is "
                     "read as zeros")
        pixels = np.zeros_like(pixels)
    else:
        pixels = (of_bytes or scale)(pixels, file, found)
    return pixels.transpose(2, 0, 1)[None], (1.0, 1.0, 1.0), found


def read_pair(image_file, mask_file, classes=2, window=None, facts=None, alone=None):
    """Return the image, its classes (1, H, W) uint8, pixel size and warnings; raises BadInput. alone: what
    reads the image, `read_alone` if None; window, facts: as there."""
    image, spacing, found = (alone or read_alone)(image_file, window, facts)
    labels, more = read_labels(mask_file, classes, facts)
    if labels.shape != image.shape[2:]:
        turned = "; one of them is turned by its EXIF tag" * any("EXIF" in text for text in found + more)
        raise BadInput(f"{mask_file}: its size {labels.shape} differs from its image's {image.shape[2:]}"
                       f"{turned}, export the mask again at the image's size")
    if labels.any() and not image.any():
        raise BadInput(f"{image_file}: has one value everywhere, or nearly so, but its mask has foreground; "
                       "export the image again")
    return image, as_classes(labels, mask_file, classes)[None], spacing, found + more


def read_labels(file, classes=2, facts=None):
    """Return a mask's labels (H, W), whole numbers as float32, and warnings; raises BadInput."""
    image, found = open_image(file)
    if image.mode in GREY and not is_lossy(image) and "transparency" not in image.info \
            and tag_of(image, PHOTOMETRIC) != 0:
        labels, values = look_at(as_whole(as_array(file, image), file, found), file, classes, found)
    else:
        from sites.unusual_masks import read_unusual  # a run on plain grey masks does not load it
        labels, values = read_unusual(file, image, classes, found)
    if facts is not None:
        facts["labels"] = values.tolist()
    return labels, found


def open_image(file):
    """Return the decoded image, upright by its own orientation tag, and warnings; raises BadInput."""
    with reading(file, "an image (png, tif, bmp or jpg)"), python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")  # damage is an error
        with Image.open(file, formats=FORMATS) as image:
            if image.format == "PNG" and PNG_END not in Path(file).read_bytes():
                raise ValueError("its end is missing")  # which Pillow does not look at
            image.verify()  # the checksums of a PNG; afterwards a file has to be opened again
        with Image.open(file, formats=FORMATS) as image:
            check_kind(file, image)
            turn = image.getexif().get(ORIENTATION, 0)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    return image, [f"{file}: was turned upright, as its EXIF tag says"] if turn not in (0, 1) else []


def check_kind(file, image):
    """Raise BadInput for what Pillow would read wrongly in silence, before it is decoded."""
    if getattr(image, "n_frames", 1) > 1:
        raise BadInput(f"{file}: has {image.n_frames} pages, save one alone")
    if image.mode not in GREY and (np.max(tag_of(image, BITS, 8)) > 8 or ";16" in str(image.tile)):
        raise BadInput(f"{file}: has 16 bits in each of several channels, of which 8 would be read; save it "
                       "with 8 bits a channel, or as grey with 16")
    if tag_of(image, PHOTOMETRIC) == 0 and image.mode.startswith(("I", "F")):
        raise BadInput(f"{file}: stores white as 0 with more than 8 bits, save it with black as 0")


def tag_of(image, tag, default=None):
    """Return the value of a tag of a TIFF file, the default of any other file."""
    return getattr(image, "tag_v2", {}).get(tag, default)


def is_lossy(image):
    """Return whether an image was stored with a loss, so that it has small values around edges."""
    return image.format in LOSSY or image.info.get("compression") in LOSSY


def as_array(file, image):
    """Return an image's numbers, all finite, black and white as 0 and 255; raises BadInput."""
    values = np.asarray(image)
    if values.dtype == bool:
        return values * np.uint8(255)  # as black and white are in any other mode
    if values.dtype == np.int32 and tag_of(image, SAMPLE_FORMAT) in ((1,), 1):
        return values.view(np.uint32)  # Pillow takes all whole numbers of 32 bits as signed
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadInput(f"{file}: has NaN or infinite pixels, replace them")
    return values


def pixels_of(file, image):
    """Return the pixels (H, W, 1 or 3) of a decoded image, without alpha; raises BadInput."""
    if image.mode == "LAB":
        raise BadInput(f"{file}: is in LAB colours, save it as RGB or grey")
    if image.mode not in (*GREY, "RGB"):
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
    means = spots.mean(1).mean(2).reshape(-1, spots.shape[4])  # one axis after the other is much faster
    contrast, wide = (means.max(0) - means.min(0)).max(), mode.startswith(("I", "F"))
    white = abs(means).max() if wide else 255
    if contrast > BLANK * white:
        return False
    noise = spots.std((1, 3)).mean((0, 1)).max()
    return bool(noise <= BLANK * white and not (wide and contrast > 4 * noise))


def scale(values, file, found):
    """Return values mapped from [min, max] to [0, 1], float32; raises BadInput if all are one value, and
    adds a warning to `found` if hardly any contrast is left."""
    low, high = float(values.min()), float(values.max())
    if not 0 < high - low < math.inf:
        raise BadInput(f"{file}: has one value everywhere, or too large ones ({low:g} to {high:g}); "
                       "export it again")
    scaled = ((values - low) / (high - low)).astype(np.float32, copy=False)
    every = 1 + 3 * (scaled.size // 30000)  # no multiple of 3, so values of every channel
    darker, brighter = np.quantile(scaled.ravel()[::every], (0.01, 0.99))
    if brighter - darker < 0.02:
        found.append(f"{file}: has hardly any contrast, a few values of up to {high:g} hide the rest")
    return scaled


def shape_of(file):
    """Return the shape (S, C, H, W) that an image has by its header alone; raises what Pillow does."""
    with Image.open(file, formats=FORMATS) as image:
        return 1, 1 if image.mode in GREY else 3, image.height, image.width
