"""Losses and weights that are no longer finite, found without waiting for the device in every step."""

import math

import torch


class Diverged(Exception):
    """A loss or a weight is no longer finite; the text names site, round and step."""


def read_losses(found, where):
    """Return [{name: term} of each step], read from the device at once; raises Diverged, naming the step.

    found: [(step, {name: tensor})] of every call of the closure. A step may ask again, at other weights:
    its first call counts.
    """
    values = iter(torch.stack([term.double() for _, terms in found for term in terms.values()]).tolist())
    numbers = [(step, {name: next(values) for name in terms}) for step, terms in found]
    for step, terms in numbers:
        if not math.isfinite(L := sum(terms.values())):
            raise Diverged(f"the loss is {L} at {where}, step {step}")
    return list(dict(reversed(numbers)).values())[::-1]


def check_weights(weights, where):
    """Raise Diverged unless all weights, {name: tensor}, are finite; the device is asked once."""
    if not torch.stack([torch.isfinite(value).all() for value in weights.values()]).all():
        raise Diverged(f"weights are not finite at {where}")
