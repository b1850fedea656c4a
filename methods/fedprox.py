"""FedProx (MLSys 20): a site does not go far from the global weights."""

from federated import Method, run_network, segmentation_loss
from settings.kinds import number

SETTINGS = {"fedprox_mu": (number(least=0), 0.01, "weight of FedProx's mu/2 |w_m - w|^2")}
FIXED = {"fsr": "none", "prototype_weight": 0.0}


def fedprox(config):
    """FedProx: w are the round's global weights, mu = `fedprox_mu`.

        L = L_dice + mu / 2 |w_m - w|^2
    """
    def losses(model, x, y, context):
        logits, _ = run_network(model, x, config)
        distance = sum((p - context.w[name]).square().sum() for name, p in model.named_parameters())
        return {"dice": segmentation_loss(logits, y), "proximal": config.fedprox_mu / 2 * distance}
    return Method(losses)
