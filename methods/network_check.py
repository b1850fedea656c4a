"""What a network of one's own has to have, so that prototypes of its maps can be aligned."""

import copy

import torch

from config import BadInput


@torch.no_grad()
def check_network(model, config):
    """Raise BadInput unless a network has fusion heads if there are prototypes, and then maps with the
    strides 1, 2, 4, 8 of the levels that are aligned."""
    if config.prototype_weight > 0 and not model.fusion:
        raise BadInput("network: its fusion is empty; add unet.fusion_heads, or set prototype_weight to 0")
    if not model.fusion:
        return
    size = config.image_size
    try:
        maps = copy.deepcopy(model).features(torch.zeros(2, 3, size, size))[1]  # norms may keep averages
    except RuntimeError as problem:
        raise BadInput(f"network: it cannot be given images of {size} px ({str(problem).splitlines()[0]}); "
                         "mend its features, or set another image_size") from None
    for path in model.fusion:
        for k, x in enumerate(maps[path]):
            if wrong := [n for n in x.shape[2:] if n != size >> k]:
                raise BadInput(f"network: level {k} of its {path} has stride {size / wrong[0]:g}, "
                                 f"prototypes need {2**k}; give maps of strides 1, 2, 4, 8")
