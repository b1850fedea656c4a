"""What several methods use: the mean features of an image, and how they compare with prototypes.

The methods were published for classification or with other networks; a line 'our adaptation' says
what was decided here to bring one to segmentation. A method's 'feature of an image' is f, the mean of
the last decoder map d_0 over the image's pixels of one class, D = `width` numbers. P_j (K, D) are the
global prototypes of class j, Pbar_j their mean; L_seg = L_dice of the core.
"""

import torch
from torch.nn import functional

from prototypes import mean_over_classes

LAST = "decoder"  # the path under which prototypes of the last decoder map are sent


def vectors_of(several):
    """Return the field `vectors` of a method that sends means of the last decoder map."""
    return lambda model: {LAST: (model.head.in_channels, several)}


def image_means(f, y, classes):
    """Return each image's mean of f (B, D, H, W) over every class (B, J, D), 0 where it has none, and the
    number of pixels (B, J), for labels y (B, H, W)."""
    member = (y[:, None] == torch.arange(classes, device=y.device)[:, None, None]).to(f.dtype)
    n = member.sum((2, 3))
    return torch.einsum("bjhw,bdhw->bjd", member, f) / n.clamp_min(1)[..., None], n


def image_cosines(f, P):
    """Return {class: (K, N)} of rows f (N, D) and prototypes P {class: (K, D)}."""
    return {j: functional.normalize(P_j) @ functional.normalize(f).T for j, P_j in P.items()}


def mean_over_images(values, n):
    """Return the mean of values {class: (..., B)} over the images that have pixels n (B, J) of a class, then
    over the classes that any image has: (...)."""
    present = torch.stack([n[:, j] > 0 for j in values])
    return mean_over_classes(torch.stack([*values.values()], -2), present)
