"""From the config to the method, to the network that it trains, and to what takes a step."""

from config import METHODS, BadInput, method_module
from federated import Method, take_step
from unet import build_model


def find_method(config):
    """Return the Method that `method` names; raises BadInput if its file has no such function."""
    module, name = method_module(config.method)
    file = config.method.rpartition(":")[0]
    try:
        method = getattr(module, name)(config)
    except (Exception, SystemExit) as problem:  # noqa: BLE001 - it may be somebody's own code
        raise BadInput(f"method: {file} raises {type(problem).__name__}: {problem}; mend it") from None
    if not isinstance(method, Method):
        raise BadInput(f"method: {file} has no function {name}(config) that returns a federated.Method, "
                       "add it")
    return method


def method_and_model(config):
    """Return the config's Method and its network with initial weights; raises BadInput if they do not fit."""
    method = find_method(config)
    try:
        model = build_model(config, method)
    except ValueError as problem:
        raise BadInput(f"network: it cannot be built with width: {config.width}, norm: {config.norm}, "
                       f"fsr: {config.fsr} ({problem}); choose others") from None
    if config.method not in METHODS:
        from methods.network_check import check_network  # its maps are not known
        check_network(model, config)
    return method, model


def find_step(config, device):
    """Return the function that takes a training step; raises BadInput for a graph without a GPU."""
    if not config.graph:
        return take_step
    from rounds.graph import graph_steps  # an eager run does not load it
    return graph_steps(device)
