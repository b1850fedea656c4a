"""FedBCS as its authors released it, in one word."""

from federated import fedbcs

FIXED = {"fsr": "global", "prototype_weight": 1.0, "tau": 0.005, "contrast_clip": True}


def released(config):
    """The released code's loss: global FSR, and a contrastive loss that is clipped at tau 0.005.

    That tau is kept for volumes too, whatever the paper says of them. Source: released code.
    """
    return fedbcs(config)
