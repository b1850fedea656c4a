"""Whether a machine's memory is enough for a training step, before it is tried."""

import os

from config import BadInput


def check_memory(config, images=1):
    """Raise BadInput if a step on the CPU needs more memory than this machine has.

        bytes = 4 (22 B S^2 w + 4 * 30300 w^2)

    B: images of a batch, at most `images`; S: image_size; w: width. 22 maps of the first level's size are
    what FedAvg's step was measured to hold; the network has about 30300 w^2 weights, and as many
    gradients and, with Adam, moments. Source: ours.
    """
    if config.device.startswith("cuda"):
        return
    B, S, w = min(config.batch_size, images), config.image_size, config.width
    needed = 4 * (22 * B * S**2 * w + 4 * 30300 * w**2)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise BadInput(f"image_size, width, batch_size: a step would need about {needed / 2**30:.0f} GB, "
                       f"this machine has {available / 2**30:.0f} GB; lower one of them")
