"""Reading a 2-D image and its mask as the files store them, or saying why that cannot be done."""

import math
import warnings as python_warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from config import BadInput
from sites.files import reading
from sites.labels import AROUND, as_classes, border_share, check_background, look_at, whole

Image.MAX_IMAGE_PIXELS = None  # slides are large; the memory they take is reported

FORMATS = ("PNG", "TIFF", "BMP", "DIB", "JPEG")  # JPEG opens MPO as well
GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
LOSSY = ("jpeg", "tiff_jpeg", "webp", "JPEG", "MPO")
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last part of every PNG, its checksum included
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF's tags; 274 is EXIF's too
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
    means = spots.mean((1, 3))
    contrast = np.ptp(means, (0, 1)).max()
    wide = mode.startswith(("I", "F"))
    white = abs(means).max() if wide else 255
    if contrast > BLANK * white:
        return False
    noise = spots.std((1, 3)).mean((0, 1)).max()
    return bool(noise <= BLANK * white and not (wide and contrast > 4 * noise))


def read_labels(file, classes=2, facts=None):
    """Return a mask's labels (H, W), whole numbers as float32, and warnings; raises BadInput.

    A lossy file has small values around edges: there a label is 1 above half of the largest value, else 0."""
    image, found = open_image(file)
    lossy = image.format in LOSSY or image.info.get("compression") in LOSSY
    if lossy and classes > 2:
        raise BadInput(f"{file}: is a lossy file, in which {classes} classes cannot be told apart; "
                       "save the mask as PNG")
    labels, shape, inverts = label_channels(file, image, classes)
    labels = whole(labels, file, found)
    if shape is not None and ((shape > 0) != (labels > 0)).any():
        raise BadInput(f"{file}: its alpha channel shows another shape than its colours; "
                       "save the mask as plain grey, without alpha")
    if inverts and border_share(labels > 0) > AROUND:
        raise BadInput(f"{file}: its lookup table shows 0 as white, and white fills its border; save it as "
                       "plain grey with background 0")
    labels, values = from_lossy(labels, file, found) if lossy else look_at(labels, file, classes, found)
    if facts is not None:
        facts["labels"] = values.tolist()
    return labels, found


def from_lossy(labels, file, found):
    """Return the labels of a lossy mask, 1 above half of the largest value, and their values."""
    high = labels.max()
    middle = np.mean((labels > high / 4) & (labels < high * 3 / 4))
    if middle > 0.25 * np.mean(labels > high / 2):
        found.append(f"{file}: is a lossy file with more than two labels, only those above half "
                     "of its largest value count; save it as PNG")
    labels = (labels > high / 2).astype(np.float32)
    check_background(labels, file, 2, found)
    return labels, np.unique(labels)


def label_channels(file, image, classes):
    """Return a mask's labels (H, W), of colours the largest, its alpha, None if all of it is opaque, and
    whether its lookup table shows 0 as white."""
    alpha = None
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        with reading(file, "a mask with alpha"):
            alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        alpha = None if alpha.min() == 255 else alpha
    if image.mode in ("P", "PA"):
        labels, inverts = palette_labels(file, image)
        return labels, alpha, inverts
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    if image.mode not in (*GREY, "RGB"):
        raise BadInput(f"{file}: is a mask in {image.mode} colours, save it as grey")
    labels = as_array(file, image)
    white_is_zero = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    if white_is_zero and not set(np.unique(labels)) <= {0, 255}:
        raise BadInput(f"{file}: stores white as 0 and has more than two labels, "
                       "save it with black as 0")
    if labels.ndim == 3 and classes > 2 and (labels != labels[:, :, :1]).any():
        raise BadInput(f"{file}: is a mask in colours, which do not say which class they are; save it as "
                       f"grey with the labels 0 to {classes - 1}")
    return (labels if labels.ndim == 2 else labels.max(2)), alpha, white_is_zero


def palette_labels(file, image):
    """Return the labels of a palette mask (H, W), its indices, but of black and white alone white is 1, and
    whether it shows a lower index as white; raises BadInput where it could be read two ways."""
    index = np.asarray(image if image.mode == "P" else image.getchannel(0))
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    colours = np.pad(colours, ((0, 256 - len(colours)), (0, 0)), constant_values=128)  # what it leaves out
    used = np.unique(index)
    black, white = (colours[used] == 0).all(1), (colours[used] >= 250).all(1)
    if len(used) == 2 and black.any() and white.any():
        return (index == used[white]).astype(np.float32), bool(white[0])
    if (colours[0] == 0).all():
        return index.astype(np.float32), False
    raise BadInput(f"{file}: its palette does not show which colour is background (index 0 is not "
                   "black), save it as grey with background 0")


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


def scale(values, file, found):
    """Return values mapped from [min, max] to [0, 1], float32; raises BadInput if all are one value, and
    adds a warning to `found` if hardly any contrast is left."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        raise BadInput(f"{file}: has one value everywhere ({low:g}), export it again")
    if not math.isfinite(high - low):
        raise BadInput(f"{file}: its values reach from {low:g} to {high:g}, export it again")
    scaled = ((values - low) / (high - low)).astype(np.float32)
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
