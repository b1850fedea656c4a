"""FedProx (MLSys 20): a site does not go far from the global weights."""

import torch

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
        w_m, w = (torch.cat([p.flatten() for p in weights]) for weights in (
            model.parameters(), (context.w[name] for name, _ in model.named_parameters())))
        return {"dice": segmentation_loss(logits, y),
                "proximal": config.fedprox_mu / 2 * (w_m - w).square().sum()}
    return Method(losses, terms=("dice", "proximal"), graph=True)
