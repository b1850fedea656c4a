"""The algorithm box: what a site does in a round, and what the server makes of it.

    every site m:   w_m, c_m = local_update(w, G)
    server:         w = sum_m n_m / n w_m;   G[p][j] = means of FINCH's clusters of the sites' c_m[p][j]

train.py shows the loop over these lines, flower/app.py the same loop between hospitals. FedAvg is the
box with `fsr: none` and `prototype_weight: 0`. Another method is a `Method` of its own: docs/fork.md.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from datasets import batches, on_device, seeded
from prototypes import (
    add_class_sums,
    aggregate_prototypes,
    aligned_features,
    alignment_loss,
    local_prototypes,
)
from rounds.diverged import check_weights, read_losses
from unet import UNet, mixed_precision


class Update(NamedTuple):
    """What one site has after its round; `kept` stays there, all else goes to the server."""

    site: str
    n: int             # training images
    weights: dict      # state dict, without the weights that the method keeps local
    prototypes: dict   # {path: {class: (D,) or several (k, D)}}, {} without prototypes
    losses: dict       # {name: mean of that term over the steps}
    kept: dict         # {"optimizer": state dict, "memory": {...}, "local": weights}
    seconds: float


@dataclass
class Context:
    """What a method's functions are told besides the network and the batch."""

    site: str                  # its name
    t: int                     # round, from 1
    w: dict                    # global weights, from which the site started this round
    G: dict                    # global prototypes {path: {class: (K, D)}}, {} in round 1
    memory: dict               # the site's own, kept from round to round and in the checkpoint
    total: dict | None = None  # to gather in during the last local epoch, None before it


class Method(NamedTuple):
    """What a method adds to the round. All but the losses have FedAvg's rule as their default.

    A method is a function of the config that returns one of these; docs/fork.md has examples.
    """

    # (model, x, y, context) -> {name: term}; L is their sum, and one of them is "dice"
    losses: Callable
    # (model, context) -> {path: {class: vectors}}, what the site sends besides its weights
    send: Callable = lambda model, context: {}
    # [what each site sent] -> G, which every site gets in the next round
    aggregate: Callable = aggregate_prototypes
    # (optimizer, closure); closure() computes the batch's loss L and its gradient, and returns L
    step: Callable = lambda optimizer, closure: optimizer.step(closure)
    # name of a weight -> whether it stays at its site
    local: Callable = lambda name: False
    # a change of the input before the network; its buffers are sent with the weights
    input_transform: nn.Module | None = None
    # (config, levels) -> the network, a UNet or what has its `features`, `fusion` and `classes`
    network: Callable = lambda own, levels: UNet(own.width, own.classes, own.fsr, levels, own.norm)


def local_update(model, site, w, G, kept, t, config, method, progress=lambda *_: None):
    """Site m, round t: train the global weights w on its own images and return its `Update`.

    G: {path: {class: (K, D)}}, {} in round 1. kept: what the site kept of its last round, None before
    its first. progress(site, step, steps) is called before every step. Raises Diverged.
    """
    start, losses, step, where = time.perf_counter(), [], 0, f"site {site.name}, round {t}"
    kept = kept or {"optimizer": None, "memory": {}, "local": {}}
    context = Context(site.name, t, w, G, copy.deepcopy(kept["memory"]))
    model.load_state_dict(w | kept["local"])
    model.train()
    optimizer, device = make_optimizer(model, config, kept["optimizer"]), next(model.parameters()).device
    steps = config.local_epochs * math.ceil(len(site.train_slices) / config.batch_size)
    for epoch in range(1, config.local_epochs + 1):
        context.total = {} if epoch == config.local_epochs else None
        order, found = seeded(config.seed, site.name, t, epoch), []
        for x, y in batches(site.train_slices, config.batch_size, order):
            step += 1
            progress(site.name, step, steps)
            x, y = on_device(x, y, device)

            def closure(x=x, y=y, step=step, found=found):
                optimizer.zero_grad()
                terms = method.losses(model, x, y, context)
                found.append((step, {name: term.detach() for name, term in terms.items()}))
                L = sum(terms.values())
                L.backward()
                return L

            method.step(optimizer, closure)
        losses += read_losses(found, where)
    prototypes = method.send(model, context)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    check_weights(weights, f"{where}, after step {steps}")
    kept = {"optimizer": optimizer.state_dict(), "memory": context.memory,
            "local": {name: weights.pop(name) for name in list(weights) if method.local(name)}}
    return Update(site.name, len(site.train_slices), weights, prototypes,
                  {name: sum(of_step[name] for of_step in losses) / steps for name in losses[0]}, kept,
                  time.perf_counter() - start)


def fedbcs(config):
    """FedBCS: the losses of the paper; with its two switches off they are FedAvg's."""
    return Method(partial(fedbcs_losses, config=config),
                  send=lambda model, context: local_prototypes(context.total))


def fedbcs_losses(model, x, y, context, config):
    """L, term by term: return {dice, contrast, consistency} of one batch, of which L is the sum.

        L = L_dice + mu (L_contra + L_consis)

    x (B, 3, H, W), y (B, H, W). L_contra and L_consis enter once there are global prototypes G. In the
    last local epoch the sums that local prototypes are made of are added to `context.total`.
    Source: paper; mu: `prototype_weight`, 1 in the paper.
    """
    mu, G = config.prototype_weight, context.G
    f = aligned_features(y, model.fusion, G) if G else None
    logits, maps = run_network(model, x, config, f)
    L_dice = segmentation_loss(logits, y)
    if mu == 0:
        return {"dice": L_dice}  # FedAvg
    if context.total is not None:
        add_class_sums(context.total, maps, model.fusion, y, model.classes)
    L_contra, L_consis = logits.new_zeros(2)
    if G:
        L_contra, L_consis = alignment_loss(f, maps, G, config.tau, config.contrast_clip)
    return {"dice": L_dice, "contrast": mu * L_contra, "consistency": mu * L_consis}


def run_network(model, x, config, fused=None):
    """Return logits (B, C, H, W) in float32 and the maps, as `features` gives them for x (B, 3, H, W).

    The network may run in bfloat16, the losses are float32. fused: {path: FusedFeatures} or None.
    """
    with mixed_precision(config, x.device):
        logits, maps = model.features(x, fused) if fused else model.features(x)
    return logits.float(), maps


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


def average_weights(updates, weights="samples"):
    """Weights: return w = sum_m n_m / n w_m of the sites' updates; weights "equal": their plain mean.

    Source: released code; `equal`: ours.
    """
    n = [update.n if weights == "samples" else 1 for update in updates]
    share = [n_m / sum(n) for n_m in n]
    return {name: sum(a * update.weights[name] for a, update in zip(share, updates))
            for name in updates[0].weights}
