"""The connected parts of a mask, in plain numpy."""

import numpy as np
import torch


def largest_parts(labels, classes):
    """Return labels (S, H, W), a tensor, with the largest connected part of each foreground class alone.
    Neighbours share a side: 4 in an image (S = 1), 6 in a volume."""
    found = labels.cpu().numpy()
    kept = np.zeros_like(found)
    for j in range(1, classes):
        kept[largest_part(found == j)] = j
    return torch.from_numpy(kept).to(labels.device)


def largest_part(mask):
    """Return the largest connected part of a bool mask of any dimension, of equal ones the first; bool."""
    starts = mask & ~np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(1, 0)])[..., :-1]
    runs = np.cumsum(starts.ravel(), dtype=np.int32).reshape(mask.shape) - 1  # a voxel's run
    part = joined(touching(mask, runs), int(starts.sum()))
    if not len(part):
        return mask
    size = np.bincount(part[runs[mask]])
    return mask & (part[np.maximum(runs, 0)] == size.argmax())


def touching(mask, runs):
    """Return the pairs of runs (N, 2) that share a side of a voxel, with repetitions."""
    pairs = [np.zeros((0, 2), runs.dtype)]
    for axis in range(mask.ndim - 1):
        m, r = np.moveaxis(mask, axis, 0), np.moveaxis(runs, axis, 0)
        both = m[1:] & m[:-1]
        found = np.stack([r[1:][both], r[:-1][both]], 1)
        pairs.append(found[np.r_[True, (found[1:] != found[:-1]).any(1)]] if len(found) else found)
    return np.concatenate(pairs)


def joined(pairs, number):
    """Return for each of `number` nodes the smallest node that it is joined to by `pairs` (N, 2)."""
    first = np.arange(number)
    while len(pairs):
        roots = first[pairs]
        pairs, low, high = pairs[roots[:, 0] != roots[:, 1]], roots.min(1), roots.max(1)
        np.minimum.at(first, high, low)
        while (first[first] != first).any():
            first = first[first]
    return first
