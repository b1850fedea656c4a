"""The statistics of test_stats: site: a site's mean and variance of each batch norm, which never leave it."""

import numpy as np
import torch

from datasets import samples_of, seeded
from scoring.norms import batch_norms, copy_of
from sites.readers import slice_of, slices_of
from unet import mixed_precision

AT_MOST = 64  # images of a site that its statistics are taken from


def collect_statistics(model, x_batches):
    """Return {name: tensor}, mean and variance of every batch norm, cumulative over the batches.

        mean = 1/N sum_i mean_i,   variance = 1/N sum_i variance_i   over the N batches

    A batch's variance is the unbiased one, as torch keeps it. x_batches: tensors (B, 3, H, W). Works on
    a copy: `model` and its state dict stay as they are."""
    model = copy_of(model).train()
    norms = batch_norms(model)
    device = next(model.parameters()).device
    for norm in norms.values():
        norm.track_running_stats, norm.momentum = True, None  # None: the mean over all batches
        norm.running_mean = torch.zeros(norm.num_features, device=device)
        norm.running_var = torch.ones(norm.num_features, device=device)
        norm.num_batches_tracked = torch.tensor(0, device=device)
    with torch.no_grad():
        for x in x_batches:
            model(x)
    return {f"{name}.{kind}": getattr(norm, kind)
            for name, norm in norms.items() for kind in ("running_mean", "running_var")}


def statistics_like(model):
    """Return {name: tensor} with the names and shapes that `collect_statistics` gives for a network."""
    return {f"{name}.{kind}": torch.empty(norm.num_features) for name, norm in batch_norms(model).items()
            for kind in ("running_mean", "running_var")}


def norm_statistics(model, site, config, device):
    """Return `collect_statistics` of up to 64 of the site's training images, not augmented; a site without
    any lends its own images, unlabelled."""
    own = [(sample, s) for sample in samples_of(site) for s in slices_of(sample)]
    chosen = choose_slices(site.train_slices or own, site.name, config)
    return statistics_of(model, [slice_of(sample, s)[0] for sample, s in chosen], config, device)


def choose_slices(slices, name, config):
    """Return up to 64 of the slices that a site has, a choice seeded by its name."""
    order = torch.randperm(len(slices), generator=seeded(config.seed, name, "statistics"))
    return [slices[i] for i in order[:AT_MOST].tolist()]


def statistics_of(model, images, config, device):
    """Return `collect_statistics` of images (3, H, W) in batches of nearly one length."""
    parts = np.array_split(np.arange(len(images)), -(-len(images) // config.batch_size))
    x_batches = (torch.stack([images[i] for i in part]).to(device, memory_format=torch.channels_last)
                 for part in parts)
    with mixed_precision(config, device):
        return collect_statistics(model, x_batches)
