"""Opening an image file with Pillow, which would read some of them wrongly in silence."""

import warnings as python_warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from config import BadInput
from sites.files import reading

Image.MAX_IMAGE_PIXELS = None  # slides are large; the memory they take is reported

FORMATS = ("PNG", "TIFF", "BMP", "DIB", "JPEG")  # JPEG opens MPO as well
GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LOSSY = ("jpeg", "tiff_jpeg", "webp", "JPEG", "MPO")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last part of every PNG, its checksum included
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF's tags; 274 is EXIF's too


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
    tags = getattr(image, "tag_v2", {})
    if image.mode not in GREY and (np.max(tags.get(BITS, 8)) > 8 or ";16" in str(image.tile)):
        raise BadInput(f"{file}: has 16 bits in each of several channels, of which 8 would be read; save it "
                       "with 8 bits a channel, or as grey with 16")
    if tags.get(PHOTOMETRIC) == 0 and image.mode.startswith(("I", "F")):
        raise BadInput(f"{file}: stores white as 0 with more than 8 bits, save it with black as 0")


def as_array(file, image):
    """Return an image's numbers as float32, all finite; raises BadInput."""
    values = np.asarray(image)
    if values.dtype == np.int32 and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, (0,)) in ((1,), 1):
        values = values.view(np.uint32)  # Pillow takes all whole numbers of 32 bits as signed
    exact = values.astype(np.float32)
    if values.dtype == bool:
        return exact * 255  # as black and white are in any other mode
    if not np.isfinite(exact).all():
        raise BadInput(f"{file}: has NaN or infinite pixels, replace them")
    return exact


def is_lossy(image):
    """Return whether an image was stored with a loss, so that it has small values around edges."""
    return image.format in LOSSY or image.info.get("compression") in LOSSY


def is_plain(image):
    """Return whether an image's numbers are what it shows: grey, without a loss, alpha or a lookup table."""
    return image.mode in GREY and not is_lossy(image) and "transparency" not in image.info \
        and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) != 0
