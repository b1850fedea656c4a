"""From a name in the config to the method, and to the network that it trains."""

from config import BadInput, method_module
from federated import Method
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
        return method, build_model(config, method)
    except ValueError as problem:
        raise BadInput(str(problem)) from None
