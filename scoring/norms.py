"""A network's batch norms as they are at test time."""

import copy

from torch import nn
from torch.nn import functional


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


def network_of(name, model, statistics, local):
    """Return `own_network` of a site by its name; statistics, local: {site name: ...}."""
    return own_network(model, statistics.get(name, {}), local.get(name, {}))


class NormOfEach(nn.Module):
    """A batch norm without kept statistics as it acts on one image, for any number of images at once."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        return functional.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)


def one_by_one(network):
    """Return the network with every batch norm applied to each image of a batch by itself (test_stats: case),
    so that images go through it together and come out as if each had been alone."""
    for name, norm in batch_norms(network).items():
        place, _, child = name.rpartition(".")
        setattr(network.get_submodule(place), child, NormOfEach(norm))
    return network
