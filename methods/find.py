"""From a name in the config to the method, and to the network that it trains."""

import torch

from config import BadInput, method_module
from federated import Method


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


def build_model(config, method):
    """Return the method's network, its initial weights seeded; without prototypes it has no heads.

    Raises BadInput if the width does not fit the network, or its maps do not fit the levels.
    """
    torch.manual_seed(config.seed)
    try:
        model = method.network(config, config.levels if config.prototype_weight > 0 else [])
    except ValueError as problem:
        raise BadInput(f"width: the network cannot have {config.width} ({problem}); "
                       "choose another") from None
    if method.input_transform is not None:
        model.input_transform = method.input_transform
    check_strides(model)
    return model.to(memory_format=torch.channels_last)


def check_strides(model, size=64):
    """Raise BadInput unless the maps that are aligned have the strides 1, 2, 4, 8 of their levels."""
    if not model.fusion:
        return
    with torch.no_grad():
        maps = model.features(torch.zeros(2, 3, size, size))[1]
    for path in model.fusion:
        for k, x in enumerate(maps[path]):
            if tuple(x.shape[2:]) != (size >> k, size >> k):
                raise BadInput(f"network: level {k} of its {path} has stride {size / x.shape[3]:g}, "
                               f"prototypes need {2**k}; give maps of strides 1, 2, 4, 8")
