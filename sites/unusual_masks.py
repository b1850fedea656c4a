"""Masks that are not one plain grey file: several files of an image, lossy files, alpha channels, palettes,
colours, inverted lookup tables, and those of several labels where two classes are asked for."""

from itertools import zip_longest

import numpy as np

from config import BadInput
from sites.files import reading
from sites.images import GREY, PHOTOMETRIC, as_array, is_lossy, tag_of
from sites.labels import AROUND, UNCERTAIN, as_whole, border_share, look_at

SMALL = 32  # labels of at most so much are classes, or numbers of few objects


def read_united(reader, entry, classes, window, facts):
    """Return what `reader.read_pair` does, of an image and all of its masks. A pixel is foreground where any
    file has it. A file of the table's column mask_K draws class K; other files say the class themselves.
    Raises BadInput also where two files draw two classes on one pixel."""
    truth, warnings = 0, []
    for file, label in zip_longest(entry.masks, entry.labels):
        if label and label >= classes:
            raise BadInput(f"{file}: stands in the column mask_{label}, but classes: {classes} means the "
                           f"classes 1 to {classes - 1}; set classes={label + 1}, or join them as one mask")
        image, labels, spacing, found = reader.read_pair(entry.image, file, 2 if label else classes, window,
                                                         facts)
        warnings += [text for text in found if text not in warnings]
        labels = label * labels if label else labels
        both = (truth > 0) & (labels > 0) & (truth != labels)
        if both.any():
            raise BadInput(f"{file}: draws class {labels[both][0]} where another mask of {entry.image.name} "
                           f"draws class {truth[both][0]}; mend them, so that no pixel has two classes")
        truth = np.maximum(truth, labels)
    facts["labels"] = np.unique(truth).tolist()
    return image, truth, spacing, warnings


def read_unusual(file, image, classes, found):
    """Return an opened mask's labels (H, W) as they count, and their values; warnings go to `found`. Raises
    BadInput where it could be read two ways."""
    lossy = is_lossy(image)
    if lossy and classes > 2:
        raise BadInput(f"{file}: is a lossy file, in which {classes} classes cannot be told apart; "
                       "save the mask as PNG")
    labels, inverts = palette_labels(file, image) if image.mode in ("P", "PA") else \
        grey_labels(file, image, classes)
    labels = as_whole(labels, file, found)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        with reading(file, "a mask with alpha"):
            alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        if alpha.min() < 255 and ((alpha > 0) != (labels > 0)).any():
            raise BadInput(f"{file}: its alpha channel shows another shape than its colours; "
                           "save the mask as plain grey, without alpha")
    if inverts and border_share(labels > 0) > AROUND:
        raise BadInput(f"{file}: its lookup table shows 0 as white, and white fills its border; save it as "
                       "plain grey with background 0")
    if lossy:  # it has small values around edges
        high = labels.max()
        above, middle = labels > high / 2, (labels > high / 4) & (labels < high * 3 / 4)
        if middle.mean() > 0.25 * above.mean():
            found.append(f"{file}: is a lossy file with more than two labels, only those above half "
                         "of its largest value count; save it as PNG")
        labels = above.astype(np.float32)
    return look_at(labels, file, classes, found)


def grey_labels(file, image, classes):
    """Return the labels of a grey mask (H, W), of one in colours the largest channel, and whether its lookup
    table shows 0 as white."""
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    if image.mode not in (*GREY, "RGB"):
        raise BadInput(f"{file}: is a mask in {image.mode} colours, save it as grey")
    labels = as_array(file, image)
    white_is_zero = tag_of(image, PHOTOMETRIC) == 0
    if white_is_zero and not set(np.unique(labels)) <= {0, 255}:
        raise BadInput(f"{file}: stores white as 0 and has more than two labels, save it with black as 0")
    if labels.ndim == 3 and classes > 2 and (labels != labels[:, :, :1]).any():
        raise BadInput(f"{file}: is a mask in colours, which do not say which class they are; save it as "
                       f"grey with the labels 0 to {classes - 1}")
    return (labels if labels.ndim == 2 else labels.max(2)), white_is_zero


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


def as_one(labels, values, file, found):
    """Return labels of which all above 0 are foreground; a mask that fades counts where it is above half.
    Why that is suspicious goes to `found`."""
    if fades(labels, values):
        above = labels > values[-1] / 2
        found.append(f"{file}: fades from 0 to {values[-1]:g}, as a smoothed mask does; what is above half "
                     f"counts as foreground ({100 * above.mean():.1f} % of it, while "
                     f"{100 * (labels > 0).mean():.1f} % is above 0), save it with two values")
        return above.astype(np.float32)
    values = values[values > 0]
    listed = ", ".join(f"{value:g}" for value in values[:6]) + " ..." * (len(values) > 6)
    few = values[-1] == len(values) < 6  # 1, 2, .. without a gap, and hardly the numbers of objects
    remedy = f"classes={len(values) + 1} if they are classes" if few else "classes to tell them apart"
    what = f"has {len(values)} labels above 0 ({listed}), which all count as foreground; set {remedy}, or " \
        "save it with two values"
    if values[-1] in UNCERTAIN and values[-2] <= SMALL:
        what = f"has the labels {listed}; {values[-1]:g} mostly means uncertain but counts as foreground " \
            "here, save it as 0 or as an object"
    found.append(f"{file}: {what}")
    return labels


def fades(labels, values):
    """Return whether a mask with these values fades from object to background, as one that was smoothed, or
    one of probabilities, does: below its highest value about every second pixel inside differs from the next.
    Objects with a number each, and classes, are flat inside; small numbers are classes."""
    if len(values) < 4 or values[-1] <= SMALL:
        return False
    pairs = unequal = 0
    for axis in (0, 1):
        lines = np.moveaxis(labels, axis, 0)
        a, b = lines[:-1], lines[1:]
        inside = (a > 0) & (b > 0) & ((a < values[-1]) | (b < values[-1]))
        pairs, unequal = pairs + inside.sum(), unequal + (inside & (a != b)).sum()
    return bool(unequal > 0.45 * pairs)
