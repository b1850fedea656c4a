"""Predicting a picture at its own size by overlapping tiles, strip by strip (tiles: true)."""

from itertools import pairwise

import torch

from datasets import Site
from scoring.norm_statistics import norm_statistics
from scoring.norms import batch_norms, own_network
from sites.tiles import crop

TOGETHER = 8  # tiles in one pass


def overlapping(n, S):
    """Return pairs (start, share (S,)) of the tiles along an axis of n pixels. They start at every multiple
    of S / 2, and the last one ends with the axis. A share falls linearly from a tile's middle to its ends;
    at every pixel the shares add up to 1."""
    starts = [*range(0, n - S, S // 2), max(n - S, 0)]
    ramp = (torch.arange(S) + 0.5).minimum(S - 0.5 - torch.arange(S))
    total = torch.zeros(max(n, S))
    for start in starts:
        total[start:start + S] += ramp
    return [(start, ramp / total[start:start + S]) for start in starts]


def in_strips(run, model, sample, config, device):
    """Yield the logits (1, C, h, W) of a picture from top to bottom, the mean of all tiles over a pixel in
    their shares. run: (model, x (B, 3, S, S), config, device) -> logits (B, C, S, S). Kept in memory is one
    row of tiles."""
    (H, W), S, strip = sample.truth.shape[1:], sample.tile, None
    rows, columns = overlapping(H, S), overlapping(W, S)
    network = normalised(model, sample, config, device)
    for (top, share), (following, _) in pairwise([*rows, (H, None)]):
        for i in range(0, len(columns), TOGETHER):
            x = torch.stack([crop(sample, (top, left))[0] for left, _ in columns[i:i + TOGETHER]])
            for (left, of_column), logits in zip(columns[i:], run(network, x, config, device)):
                strip = logits.new_zeros(len(logits), S, max(W, S)) if strip is None else strip
                strip[..., left:left + S] += (share[:, None] * of_column).to(logits.device) * logits
        done = following - top
        yield strip[None, :, :done, :W]
        strip = torch.cat([strip[:, done:], torch.zeros_like(strip[:, :done])], 1)


def normalised(model, sample, config, device):
    """Return the network that predicts the tiles of one picture: with test_stats: case all of them by the
    same statistics, those that `norm_statistics` gives for a site of this picture alone."""
    if config.test_stats != "case" or not batch_norms(model):
        return model
    alone = Site(sample.name, train=[], val=[], test=[sample])
    return own_network(model, norm_statistics(model, alone, config, device))
