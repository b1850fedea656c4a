"""The algorithm: local update and aggregation, what a site does in a round and what the server makes of it.

    every site m:   w_m, c_m = local_update(w, G)
    server:         w = sum_m n_m / n w_m;   G[p][j] = means of FINCH's clusters of the sites' c_m[p][j]

train.py shows the loop over these lines, flower/app.py the same loop between hospitals. FedAvg is the
same with `fsr: none` and `prototype_weight: 0`. Another method is a `Method` of its own: docs/fork.md.
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

from fused_features import on_grids
from prototypes import add_class_sums, aggregate_prototypes, alignment_loss, local_prototypes
from unet import UNet, mixed_precision


class Diverged(Exception):
    """A loss or a weight is no longer finite; the text names site, round and step."""


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
    total: dict | None = None  # filled by the method in the last local epoch, None before it


def make_optimizer(model, config, t=1):
    """Return the config's optimizer, which is the same in every round t."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    return kinds[config.optimizer](model.parameters(), config.lr, weight_decay=config.weight_decay)


class Method(NamedTuple):
    """What a method adds to the round. All but the losses may be left out, docs/fork.md has examples.

    A method is a function of the config that returns one of these.
    """

    # (model, x, y, context) -> {name: term}, tensors; L is their sum
    losses: Callable
    # (model, context) -> {path: {class: vectors}}, what the site sends besides its weights
    send: Callable = lambda model, context: {}
    # [what each site sent] -> G, which every site gets in the next round
    aggregate: Callable = aggregate_prototypes
    # (optimizer, closure); closure() computes the batch's loss L and its gradient, and returns L
    step: Callable = lambda optimizer, closure: optimizer.step(closure)
    # (model, config, t) -> optimizer of round t, all with the same parameters; it gets the site's kept state
    optimizer: Callable = make_optimizer
    # name of a weight -> whether it stays at its site
    local: Callable = lambda name: False
    # a change of the input before the network; its buffers are sent with the weights
    input_transform: nn.Module | None = None
    # (the config, levels) -> the network, a UNet or what has its `features`, `fusion` and `classes`
    network: Callable = lambda of, levels: UNet(of.width, of.classes, of.fsr, levels, of.norm)
    # whether a step may become one CUDA graph: no branch, no counter in Python depends on data or step
    graph: bool = False
    # (t, updates, scores) after every round, for a logger; scores: see scoring.evaluate, or None
    log: Callable = lambda t, updates, scores: None
    # Only for runs between hospitals, where a server checks what arrives: the names of all terms, () for
    # any, and model -> {path: (length of a vector, whether a class may have several)} of what `send` returns
    terms: tuple = ()
    vectors: Callable = lambda model: {}


def take_step(method, model, optimizer, x, y, context):
    """Take a training step on one batch; return {name: term} of its loss, at the weights before the step."""
    found = {}

    def closure():
        optimizer.zero_grad()
        terms = method.losses(model, x, y, context)
        if not found:  # a method may ask again, at other weights
            found.update({name: term.detach() for name, term in terms.items()})
        L = sum(terms.values())
        L.backward()
        return L

    method.step(optimizer, closure)
    return found


def local_update(model, site, w, G, kept, t, config, method, progress=lambda *_: None, take_step=take_step):
    """Site m, round t: train the global weights w on its own images and return its `Update`.

    G: {path: {class: (K, D)}}, {} in round 1. kept: what the site kept of its last round, None before
    its first. progress(site, step, steps) is called before every step. Raises Diverged.
    """
    start, found, step = time.perf_counter(), {}, 0
    kept = kept or {"optimizer": None, "memory": {}, "local": {}}
    context = Context(site.name, t, w, G, copy.deepcopy(kept["memory"]))
    model.load_state_dict(w | kept["local"])
    model.train()
    optimizer = with_state(method.optimizer(model, config, t), kept["optimizer"])
    device, steps = next(model.parameters()).device, config.local_epochs * site.steps(config)
    for epoch in range(1, config.local_epochs + 1):
        context.total = {} if epoch == config.local_epochs else None
        for x, y in site.batches(config, t, epoch, device):
            step += 1
            progress(site.name, step, steps)
            found[step] = take_step(method, model, optimizer, x, y, context)
    losses = mean_losses(found, f"site {site.name}, round {t}")
    prototypes = method.send(model, context)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if not torch.stack([torch.isfinite(value).all() for value in weights.values()]).all():
        raise Diverged(f"weights are not finite at site {site.name}, round {t}, after step {step}")
    kept = {"optimizer": optimizer.state_dict(), "memory": context.memory,
            "local": {name: weights.pop(name) for name in list(weights) if method.local(name)}}  # not sent
    return Update(site.name, len(site.train_slices), weights, prototypes, losses, kept,
                  time.perf_counter() - start)


def with_state(optimizer, state):
    """Return a new optimizer with the state that its site kept, None before its first round.

    Its settings, such as the learning rate, stay those of this round. Raises ValueError for other parameters.
    """
    if state is not None:  # copied, for steps change it in place; torch compares the number of "params"
        now, kept = optimizer.state_dict()["param_groups"], state["param_groups"]
        groups = [new | {"params": old["params"]} for new, old in zip(now, kept, strict=True)]
        optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})
    return optimizer


def mean_losses(found, where):
    """Return {name: mean over all steps} of {step: {name: term}}, a missing term counting as 0.

    The terms are read from the device at once. Raises Diverged, naming the step, if a loss is not finite.
    """
    on_device = [term.double() for terms in found.values() for term in terms.values()]
    values, total = iter(torch.stack(on_device).tolist()), {}
    for step, terms in found.items():
        numbers = {name: next(values) for name in terms}
        if not math.isfinite(L := sum(numbers.values())):
            raise Diverged(f"the loss is {L} at {where}, step {step}")
        total = {name: total.get(name, 0) + numbers.get(name, 0) for name in total | numbers}
    return {name: value / len(found) for name, value in total.items()}


def fedbcs(config):
    """FedBCS: the losses of the paper; with `fsr: none` and `prototype_weight: 0` it is FedAvg."""
    if config.prototype_weight == 0:
        return Method(partial(fedbcs_losses, config=config), terms=("dice",), graph=True)
    return Method(partial(fedbcs_losses, config=config), graph=True,
                  send=lambda model, context: local_prototypes(context.total),
                  terms=("dice", "contrast", "consistency"),
                  vectors=lambda model: {path: (sum(conv.out_channels for conv in heads.values()), False)
                                         for path, heads in model.fusion.items()})


def fedbcs_losses(model, x, y, context, config):
    """L, term by term: return {dice, contrast, consistency} of one batch, of which L is the sum.

        L = L_dice + mu (L_contra + L_consis)

    x (B, 3, H, W), y (B, H, W). L_contra and L_consis enter once there are global prototypes G. In the
    last local epoch the sums that local prototypes are made of are added to `context.total`.
    Source: paper; mu: `prototype_weight`, 1 in the paper.
    """
    mu, G = config.prototype_weight, context.G
    logits, maps = run_network(model, x, config)
    L_dice = segmentation_loss(logits, y)
    if mu == 0:
        return {"dice": L_dice}  # FedAvg
    fused = on_grids(maps, model.fusion, y, model.classes)
    if context.total is not None:
        add_class_sums(context.total, fused)
    contrast, consistency = mu * alignment_loss(fused, G, config.tau, config.contrast_clip)
    return {"dice": L_dice, "contrast": contrast, "consistency": consistency}


def run_network(model, x, config):
    """Return logits (B, C, H, W) in float32 and the maps, as `features` gives them for x (B, 3, H, W).

    The network may run in bfloat16, the losses are float32.
    """
    with mixed_precision(config, x.device):
        logits, maps = model.features(x)
    return logits.float(), maps


def segmentation_loss(logits, y):
    """L_dice of logits (B, C, H, W) and labels (B, H, W).

        CE   = -mean sum_c y_c log p_c
        Dice = 1 - mean_c (2 sum p_c y_c + s) / (sum p_c + sum y_c + s);   L_dice = (CE + Dice) / 2

    p = softmax, sums over the batch and its pixels, s = 1e-5. Source: released code.
    """
    p = logits.softmax(1)
    truth = (y[..., None] == torch.arange(logits.shape[1], device=y.device)).permute(0, 3, 1, 2).to(p.dtype)
    overlap, area = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    dice = 1 - ((2 * overlap + 1e-5) / (area + 1e-5)).mean()
    cross_entropy = -(truth * logits.log_softmax(1)).sum(1).mean()
    return (cross_entropy + dice) / 2


def average_weights(updates, weights="samples"):
    """Weights: return w = sum_m (n_m / n) w_m of the round's sites; weights "equal": their plain mean.

    Source: released code; `equal`: ours. Whole numbers, such as a norm's count of batches, are rounded.
    """
    n = [update.n if weights == "samples" else 1 for update in updates]
    share = [n_m / sum(n) for n_m in n]
    return {name: mean_tensor([update.weights[name] for update in updates], share)
            for name in updates[0].weights}


def mean_tensor(values, share):
    """Return sum_m share_m values_m, of tensors of whole numbers rounded to whole numbers."""
    if values[0].is_floating_point() or values[0].is_complex():
        return sum(a * value for a, value in zip(share, values))
    return sum(a * value.double() for a, value in zip(share, values)).round().to(values[0].dtype)
