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
    if not mask.any():
        return mask
    place, pairs = np.arange(mask.size).reshape(mask.shape), []
    for axis in range(mask.ndim):
        m, n = np.moveaxis(mask, axis, 0), np.moveaxis(place, axis, 0)
        both = m[1:] & m[:-1]
        pairs.append(np.stack([n[1:][both], n[:-1][both]], 1))
    part = roots_of(np.concatenate(pairs), mask.size).reshape(mask.shape)
    return mask & (part == np.bincount(part[mask]).argmax())


def roots_of(pairs, number):
    """Return for each of `number` nodes the smallest node that it is joined to by `pairs` (N, 2)."""
    first = np.arange(number)
    while len(pairs):
        roots = first[pairs]
        pairs, low, high = pairs[roots[:, 0] != roots[:, 1]], roots.min(1), roots.max(1)
        np.minimum.at(first, high, low)
        while (first[first] != first).any():
            first = first[first]
    return first
