"""The algorithm box: what a site does in a round, what the server does, and the round itself.

FedAvg is the same loop with `fsr: none` and `prototype_weight: 0`; FedProx adds one term. What
another method adds to the round is a `Method`; those of baselines.py enter by that alone.
"""

import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from datasets import batches, seeded
from prototypes import (
    add_class_sums,
    aligned_pixels,
    alignment_loss,
    cluster_means,
    finch,
    keep_rows,
    local_prototypes,
)


class Diverged(Exception):
    """A loss or a weight is no longer finite; the text names site, round and step."""


class SiteFailed(Exception):
    """A site has no update to average; the text names site, round and reason."""


class Update(NamedTuple):
    """What one site has after its round; all of it but the optimizer state goes to the server."""

    site: str
    n: int             # training images
    weights: dict      # state dict
    prototypes: dict   # {path: {class: (D,) or several (k, D)}}, {} without prototypes
    losses: dict       # means over the steps of the method's terms
    optimizer: dict    # state dict of the optimizer, stays at the site
    seconds: float


def plain_step(optimizer, gradient):
    """Take one optimizer step and return the loss terms: gradient(), then step."""
    terms = gradient()
    optimizer.step()
    return terms


class Method(NamedTuple):
    """What a method adds to the round. All but the losses have FedAvg's rule as their default.

    A method is a function of the config that returns one of these. What it keeps from round to
    round is in the weights, in G or in the optimizer, hence in the checkpoint.
    """

    # (model, x, y, G, total) -> {name: term}, L their sum, one of them "dice". In the last local
    # epoch `total` is a dictionary to gather in, else None. G is {} in round 1. Of the terms,
    # metrics.csv and the screen show dice, contrast and consistency.
    losses: Callable
    # (model, total) -> {path: {class: tensor}}, what the site sends besides its weights
    send: Callable = lambda model, total: {}
    # [what each site sent] -> G, {path: {class: (K, D)}}, what every site gets in the next round
    aggregate: Callable = lambda sent: aggregate_prototypes(sent)
    # (optimizer, gradient) -> terms; gradient() computes the batch's loss and its gradient
    step: Callable = plain_step
    # a change of the input: put before the network, its buffers are sent with the weights
    front: nn.Module | None = None


def fedbcs(config):
    """Return the method of the paper; with its switches off FedAvg, with fedprox_mu FedProx."""
    def losses(model, x, y, G, total):
        return site_losses(model, x, y, G, config, total)
    return Method(losses, send=lambda model, total: local_prototypes(total))


def federated_round(model, sites, w, G, optimizers, t, config, progress=lambda *_: None,
                    method=None):
    """Run round t and return the new global weights, the new global prototypes and the updates.

        for every site m:   w_m, c_m = local_update(w, G)
        server:             w = sum_m n_m / n w_m;   G = FINCH means of the c_m

    sites: those with training images; w: state dict; G: {path: {class: (K, D)}}, {} in round 1;
    optimizers: {site: state}, brought up to date here; method: a Method, FedBCS if None.
    """
    method, results, stop = method or fedbcs(config), {}, config.on_site_failure == "stop"
    for site in sites:
        try:
            results[site.name] = local_update(model, site, w, G, optimizers.get(site.name), t,
                                              config, progress, method)
        except Exception as problem:  # whatever goes wrong at a site stays there
            if stop:
                if not isinstance(problem, Diverged):  # which names the site itself
                    print(f"site {site.name} failed in round {t}", file=sys.stderr, flush=True)
                raise
            results[site.name] = problem
    updates = accept(results, w, G, config, t)
    optimizers |= {update.site: update.optimizer for update in updates}
    return *aggregate(updates, config, method), updates


def accept(results, w, G, config, t):
    """Return the updates of round t that can be averaged, sorted by site.

    results: {site: Update, or what went wrong there}. Raises SiteFailed for a site that failed or
    sent what does not fit w: at once with `on_site_failure: stop`; with `skip` such a site is named
    and sits out the round, and it is raised only if fewer than `min_sites` are left.
    """
    updates, length = [], {path: P.shape[1] for path in G for P in G[path].values()}
    for site in sorted(results):
        problem = results[site]
        if isinstance(problem, Update):
            problem = wrong_with(problem, w, length)
        if problem is None:
            updates.append(results[site])
            continue
        sit_out(f"site {site} failed in round {t}: {' '.join(str(problem).split())}", config)
    if len(updates) < config.min_sites:
        raise SiteFailed(f"{len(updates)} sites are left in round {t}, min_sites: "
                         f"{config.min_sites} are needed")
    return updates


def sit_out(failure, config):
    """Name a site's failure: raise SiteFailed, or with `on_site_failure: skip` print it."""
    if config.on_site_failure == "stop":
        raise SiteFailed(failure)
    print(f"{failure}; it is left out", file=sys.stderr, flush=True)


def wrong_with(update, w, length):
    """Return what makes an update unfit to be averaged into w, or None.

    length: {path: numbers in a prototype}, of the paths that are known; a path that is not becomes
    so by the first update that has it.
    """
    shapes = ({name: value.shape for name, value in of.items()} for of in (update.weights, w))
    if type(update.n) is not int or update.n < 1:
        return f"it has {update.n} training images"
    if next(shapes) != next(shapes):
        return "its weights differ in name or shape from the global ones"
    for path, classes in update.prototypes.items():
        for P in classes.values():
            if P.dim() not in (1, 2) or P.numel() == 0 or P.shape[-1] != length.setdefault(
                    path, P.shape[-1]):
                return f"its prototypes of the {path} are not vectors of {length.get(path)} numbers"
    vectors = [P for classes in update.prototypes.values() for P in classes.values()]
    if not all(torch.isfinite(value).all() for value in [*update.weights.values(), *vectors]):
        return "its weights or prototypes are not finite"
    return None


def aggregate(updates, config, method):
    """Server: return the new global weights w and prototypes G."""
    n = [update.n if config.weights == "samples" else 1 for update in updates]
    return (average_weights([update.weights for update in updates], n),
            method.aggregate([update.prototypes for update in updates]))


def local_update(model, site, w, G, optimizer_state, t, config, progress=lambda *_: None,
                 method=None):
    """Train the global weights w on one site's images for its local epochs and return its Update.

    The loss is `objective`; L_MP enters once there are global prototypes G. The local prototypes
    are gathered in the last local epoch from the features that the step computes anyway.
    progress(site, step, steps) is called before every step. Raises Diverged.
    """
    start, total, losses, step = time.perf_counter(), {}, {}, 0
    method, device = method or fedbcs(config), next(model.parameters()).device
    model.load_state_dict(w)
    model.train()
    optimizer = make_optimizer(model, config, optimizer_state)
    steps = config.local_epochs * math.ceil(len(site.train_slices) / config.batch_size)
    for epoch in range(1, config.local_epochs + 1):
        gather = total if epoch == config.local_epochs else None
        generator = seeded(config.seed, site.name, t, epoch)
        for x, y in batches(site.train_slices, config.batch_size, generator):
            step += 1
            progress(site.name, step, steps)
            x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
            where = f"site {site.name}, round {t}, step {step}"
            gradient = partial(batch_gradient, model, optimizer, x, y, w, G, config, method,
                               gather, where)
            for name, term in method.step(optimizer, gradient).items():
                losses[name] = losses.get(name, 0) + term.item()
    prototypes = method.send(model, total)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise Diverged(f"weights are not finite at site {site.name}, round {t}, after step {steps}")
    losses = {name: value / steps for name, value in losses.items()}
    return Update(site.name, len(site.train_slices), weights, prototypes, losses,
                  optimizer.state_dict(), time.perf_counter() - start)


def batch_gradient(model, optimizer, x, y, w, G, config, method, gather=None, where="a batch"):
    """Compute the gradient of a batch's objective and return its terms; raises Diverged."""
    terms = method.losses(model, x, y, G, gather)
    L = objective(terms, model, w, config)
    if not torch.isfinite(L):
        raise Diverged(f"the loss is {L.item()} at {where}")
    optimizer.zero_grad()
    L.backward()
    return terms


def objective(terms, model, w, config):
    """L = the sum of the terms + fedprox_mu / 2 |w_m - w|^2, w the global weights.

    FedBCS:  L = L_dice + mu (L_contra + L_consis)
    """
    L = sum(terms.values())
    if config.fedprox_mu > 0:
        distance = sum((p - w[name]).square().sum() for name, p in model.named_parameters())
        L = L + config.fedprox_mu / 2 * distance
    return L


def run_network(model, x, config, **keep):
    """Return logits (B, C, H, W) in float32, maps and kept, as `features` does of x (B, 3, H, W).

    The network may run in bfloat16, the losses are float32.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.amp == "bf16"):
        logits, maps, kept = model.features(x, **keep)
    return logits.float(), maps, kept


def site_losses(model, x, y, G, config, gather=None):
    """Return the terms {dice, contrast, consistency} of one batch, the last two weighted by mu.

    x (B, 3, H, W), y (B, H, W). With a dictionary `gather`, the batch's class sums are added to it.
    Without global prototypes the two terms of L_MP are 0.
    """
    pixels = aligned_pixels(y, model.fusion, G) if G else None
    keep = {"keep": keep_rows(pixels, model.fusion)} if G else {}
    logits, maps, rows = run_network(model, x, config, **keep)
    if gather is not None and config.prototype_weight > 0:
        add_class_sums(gather, maps, model.fusion, y, model.classes)
    contrast, consistency = logits.new_zeros(2)
    if G:
        contrast, consistency = config.prototype_weight * alignment_loss(
            rows, model.fusion, pixels, G, config.tau, config.contrast_clip)
    return {"dice": segmentation_loss(logits, y), "contrast": contrast, "consistency": consistency}


def segmentation_loss(logits, y):
    """L_dice of logits (B, C, H, W) and labels (B, H, W).

        L_dice = (CE + Dice) / 2,   Dice = 1 - mean_c (2 sum p_c y_c + s) / (sum p_c + sum y_c + s)

    p = softmax, sums over the batch and its pixels, s = 1e-5. Source: released code.
    """
    p = logits.softmax(1)
    truth = functional.one_hot(y, logits.shape[1]).permute(0, 3, 1, 2).to(p.dtype)
    overlap, area = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    dice = 1 - ((2 * overlap + 1e-5) / (area + 1e-5)).mean()
    return (functional.cross_entropy(logits, y) + dice) / 2


def make_optimizer(model, config, state=None):
    """Return the config's optimizer, with the state that the site kept from its last round."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[config.optimizer](model.parameters(), config.lr,
                                        weight_decay=config.weight_decay)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))  # else it would be changed in place
    return optimizer


def average_weights(weights, n):
    """Weights: return w = sum_m n_m / n w_m of the sites' state dicts; n: shares, any scale."""
    share = [m / sum(n) for m in n]
    return {name: sum(a * w[name] for a, w in zip(share, weights)) for name in weights[0]}


def aggregate_prototypes(prototypes):
    """Server: return the global prototypes G[p][j] = means of FINCH's clusters, always (K, D).

    prototypes: one {path: {class: (D,) or several (k, D)}} a site; a site without a class gives
    none. {} in, {} out.
    """
    G = {}
    for path in dict.fromkeys(path for c in prototypes for path in c):
        sent = [c.get(path, {}) for c in prototypes]
        vectors = {j: torch.cat([torch.atleast_2d(c[j]) for c in sent if j in c])
                   for j in sorted({j for c in sent for j in c})}
        G[path] = {j: cluster_means(x, finch(x)[-1]) for j, x in vectors.items()}
    return G
