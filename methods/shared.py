"""What several methods use: the mean features of an image, and how they compare with prototypes.

The methods were published for classification or with other networks; a line 'our adaptation' says
what was decided here to bring one to segmentation. A method's 'feature of an image' is f, the mean of
the last decoder map d_0 over the image's pixels of one class, D = `width` numbers. P_j (K, D) are the
global prototypes of class j, Pbar_j their mean; L_seg = L_dice of the core.
"""

import torch
from torch.nn import functional

LAST = "decoder"  # the path under which prototypes of the last decoder map are sent


def image_sums(f, y, classes):
    """Return the sum of f (B, D, H, W) over each image's pixels of a class (B, J, D), and their
    number (B, J), for labels y (B, H, W)."""
    member = functional.one_hot(y, classes).permute(0, 3, 1, 2).to(f.dtype)
    return torch.einsum("bjhw,bdhw->bjd", member, f), member.sum((2, 3))


def class_means(f, y, classes):
    """Return each image's mean feature of each class it has, f (N, D), and their classes (N,)."""
    sums, n = image_sums(f, y, classes)
    image, j = (n > 0).nonzero(as_tuple=True)
    return sums[image, j] / n[image, j, None], j


def aligned(f, j, G):
    """Return the rows of f (N, D) and j (N,) of foreground classes that have a prototype in G."""
    wanted = torch.tensor([c for c in G if c > 0], device=j.device, dtype=j.dtype)
    chosen = torch.isin(j, wanted)
    return f[chosen], j[chosen]


def cosines(f, j, G):
    """Return the cosines (N, K) of rows f (N, D) and all prototypes of G, and own (N, K) bool."""
    owner = torch.cat([j.new_full((len(G[c]),), c) for c in sorted(G)])
    P = torch.cat([G[c] for c in sorted(G)])
    return functional.normalize(f) @ functional.normalize(P).T, j[:, None] == owner


def own_means(j, G):
    """Return Pbar_j (N, D), the mean prototype of each row's class j (N,)."""
    Pbar = torch.stack([G[c].mean(0) for c in sorted(G)])
    return Pbar[torch.searchsorted(j.new_tensor(sorted(G)), j)]


def mean_over_classes(values, j):
    """Return the mean over the classes present of the mean of their values (N,); 0 for N = 0."""
    if len(j) == 0:
        return values.sum()
    return torch.stack([values[j == c].mean() for c in j.unique()]).mean()
