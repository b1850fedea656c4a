"""What the numbers of a mask mean: whole labels, background 0, and the classes that training knows."""

import numpy as np

from config import BadInput

NEARLY_ALL = 0.98    # of a mask: more foreground than this is suspicious
AROUND = 0.75        # of a mask's border: as suspicious
NEARLY_WHOLE = 0.05  # from a label to the number that a file stores for it, which a scale may change
UNCERTAIN = (255, 65535)  # what many sets write where nobody knows the label


def as_whole(labels, file, found):
    """Return labels as whole numbers, float32; those that are only nearly whole are rounded, with a warning
    in `found`. Raises BadInput for what is no label."""
    labels, rounded = labels.astype(np.float32, copy=False), np.round(labels).astype(np.float32)
    off = abs(labels - rounded).max()
    if off > (NEARLY_WHOLE if rounded.any() else 1e-3):
        wrong = labels[abs(labels - rounded) == off][0]
        raise BadInput(f"{file}: its labels are not whole numbers, one is {wrong:g}; resample it with "
                       "nearest neighbour, save probabilities as 0 and 1, store labels without a scale")
    if rounded.min() < 0:
        raise BadInput(f"{file}: has negative labels, background has to be 0")
    if off:
        found.append(f"{file}: its labels are only nearly whole numbers (off by {off:.2g}) and are rounded; "
                     "store them without a scale, and resample with nearest neighbour")
    return rounded + np.float32(0)  # no -0


def look_at(labels, file, classes, found):
    """Return labels as they count, and their different values; what is suspicious goes to `found`. Of two
    classes a mask that fades counts where it is above half. Raises BadInput for a mask without background."""
    values = np.flatnonzero(np.bincount(labels.ravel().astype(np.uint16))) if labels.max() < 2**16 else \
        np.unique(labels)  # which takes longer
    if classes == 2 and (values > 0).sum() > 1:
        from sites.unusual_masks import as_one  # a run on masks of two values does not load it
        labels = as_one(labels, values, file, found)
    check_background(labels, file, classes, found)
    return labels, values


def border_share(inside):
    """Return how much of the outermost pixels or voxels of a mask is True."""
    core = inside[tuple(slice(1, -1) for _ in inside.shape)]
    return (inside.sum() - core.sum()) / (inside.size - core.size)


def check_background(labels, file, classes, found):
    """Raise BadInput for a mask without background; nearly none, or none around, is a warning, which goes to
    `found`. With more than two classes, where a label says what it is, all of it is a warning, too."""
    inside = labels > 0
    share = inside.mean()
    if share == 1 and classes == 2:
        raise BadInput(f"{file}: all of it is foreground, the smallest label is {labels.min():g}; "
                       "background has to be 0")
    if share > NEARLY_ALL:
        found.append(f"{file}: {100 * share:.0f} % of it is foreground; background has to be 0")
    elif border_share(inside) > AROUND:
        found.append(f"{file}: foreground fills {100 * border_share(inside):.0f} % of its border; if object "
                     "and background are exchanged, save it with background 0")


def as_classes(labels, file, classes):
    """Return labels as classes 0 to classes - 1, uint8. Of two classes every label above 0 is 1; of more,
    a label that is no class raises BadInput."""
    if classes == 2:
        return (labels > 0).astype(np.uint8)
    if labels.max() >= classes:
        wrong = labels[labels >= classes].min()
        hint = " (which mostly means uncertain: save it as 0)" if wrong in UNCERTAIN else ""
        raise BadInput(f"{file}: has the label {wrong:g}{hint}, but classes: {classes} "
                       f"means the labels 0 to {classes - 1}; mend its labels or set classes")
    return labels.astype(np.uint8)
