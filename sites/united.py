"""One image with several mask files, which are united: one file a nucleus, or one file a class."""

from itertools import zip_longest

import numpy as np

from config import BadInput


def read_united(reader, entry, classes, window=None, facts=None):
    """Return what `reader.read_pair` does, of an image and all of its masks.

    A pixel is foreground where any file has it. A file of the table's column mask_K draws class K; other
    files say the class themselves. Raises BadInput also where two files draw two classes on one pixel."""
    truth, warnings = None, []
    for file, label in zip_longest(entry.masks, entry.labels):
        if label is not None and label >= classes:
            raise BadInput(f"{file}: stands in the column mask_{label}, but classes: {classes} means the "
                           f"classes 1 to {classes - 1}; set classes={label + 1}, or join them as one mask")
        image, labels, spacing, found = reader.read_pair(entry.image, file, 2 if label else classes, window,
                                                         facts)
        warnings += [text for text in found if text not in warnings]
        labels = label * labels if label else labels
        truth = labels if truth is None else truth
        both = (truth > 0) & (labels > 0) & (truth != labels)
        if both.any():
            raise BadInput(f"{file}: draws class {labels[both][0]} where another mask of {entry.image.name} "
                           f"draws class {truth[both][0]}; mend them, so that no pixel has two classes")
        truth = np.maximum(truth, labels)
    if facts is not None:
        facts["labels"] = np.unique(truth).tolist()
    return image, truth, spacing, warnings
