"""What the numbers of a mask mean: whole labels, background 0, and the classes that training knows."""

import numpy as np

from config import BadInput

NEARLY_ALL = 0.98  # of a mask: more foreground than this is suspicious


def check_whole(labels, file):
    """Raise BadInput unless all labels are whole numbers from 0 on."""
    if labels.size and (labels != np.round(labels)).any():
        raise BadInput(f"{file}: its labels are not whole numbers ({labels.min():g} to {labels.max():g}), "
                       "export it again with nearest neighbour")
    if labels.min() < 0:
        raise BadInput(f"{file}: has negative labels, background has to be 0")


def check_background(labels, file, classes, found):
    """Raise BadInput for a mask without background; nearly none is a warning, which goes to `found`, and
    with more than two classes, where a label says what it is, so is none at all."""
    share = (labels > 0).mean()
    if share == 1 and classes == 2:
        raise BadInput(f"{file}: all of it is foreground, its smallest label is {labels.min():g}; "
                       "background has to be 0")
    if share > NEARLY_ALL:
        found.append(f"{file}: {100 * share:.0f} % of it is foreground; background has to be 0")


def as_classes(labels, file, classes):
    """Return labels as classes 0 to classes - 1, uint8. Of two classes every label above 0 is 1; of more,
    a label that is no class raises BadInput."""
    if classes == 2:
        return (labels > 0).astype(np.uint8)
    if labels.max() >= classes:
        raise BadInput(f"{file}: has the label {labels[labels >= classes].min():g}, but classes: {classes} "
                       f"means the labels 0 to {classes - 1}; mend its labels or set classes")
    return labels.astype(np.uint8)
