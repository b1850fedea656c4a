"""A network's batch norms as they are at test time."""

import copy

import torch
from torch import nn


def batch_norms(model):
    """Return {name: batch norm} of a network, {} if it normalises in another way."""
    return {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}


def copy_of(model, own=()):
    """Return a copy of a network that shares its parameters but those named in `own`: so it is made quickly,
    and these can be replaced in it."""
    return copy.deepcopy(model, {id(p): p for name, p in model.named_parameters() if name not in own})


def own_network(model, statistics, local=None):
    """Return a copy of the model as one site has it, to predict with; local: weights that stay at the site.

    It normalises by `collect_statistics`' result, or with {} by what it is given (test_stats: case). Running
    averages of the training, which a network of one's own may have, are not used."""
    local = local or {}
    model = copy_of(model, local).eval()
    model.load_state_dict(local, strict=False)
    for norm in batch_norms(model).values():
        norm.running_mean = norm.running_var = None
    for name, value in statistics.items():
        norm, kind = name.rsplit(".", 1)
        setattr(model.get_submodule(norm), kind, value.to(next(model.parameters()).device))
    return model


class EachAlone(nn.Module):
    """A layer applied to every image of a batch by itself: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.cat([self.layer(one) for one in x.split(1)])


def one_by_one(network, layer=EachAlone):
    """Return the network with every batch norm applied to each image of a batch by itself (test_stats: case),
    so that images go through it together and come out as if each had been alone. layer: norm -> what takes
    its place."""
    for name, norm in batch_norms(network).items():
        place, _, child = name.rpartition(".")
        setattr(network.get_submodule(place), child, layer(norm))
    return network
