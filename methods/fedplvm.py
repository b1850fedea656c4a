"""FedPLVM (NeurIPS 24): sites cluster their features before the server does."""

import torch
from torch.nn import functional

from federated import Method, run_network, segmentation_loss
from methods.shared import LAST, image_cosines, image_means, mean_over_images, vectors_of
from prototypes import cluster_means, columns, contrastive_loss, finch
from settings.kinds import number

SETTINGS = {
    "fedplvm_tau": (number(above=0), 0.07, "temperature of FedPLVM"),
    "fedplvm_power": (number(above=0), 0.25, "power of the cosine in FedPLVM"),
    "fedplvm_weight": (number(least=0), 100.0, "weight of FedPLVM's two losses"),
}
FIXED = {"fsr": "none", "prototype_weight": 0.0, "weights": "equal"}


def fedplvm(config):
    """FedPLVM (NeurIPS 24): sites cluster too, and send a variable number of prototypes.

        C_mj = FINCH means over site m's images of their mean feature of class j   (k, D)
        P_j  = FINCH means of all sites' C_mj
        L    = L_seg + weight [ InfoNCE with cos^power / tau + 2 mean (cos(f, Pbar_j) - 1)^2 ]

    cos is clamped at 1e-6 from below; L_seg alone in round 1; means over the f of a class, then
    over the foreground classes. Plain mean of the weights. Our adaptation: f of shared.py; FINCH's last
    partition is taken, as at the server.
    """
    def losses(model, x, y, context):
        logits, maps = run_network(model, x, config)
        f, n = image_means(maps["decoder"][0].float(), y, model.classes)  # (B, J, D), (B, J)
        if context.total is not None:
            context.total.setdefault("features", []).append((f.detach(), n))
        P, values = context.G.get(LAST, {}), {}
        for j in (j for j in P if j > 0):
            alike = {c: cos.clamp_min(1e-6) ** config.fedplvm_power
                     for c, cos in image_cosines(f[:, j], P).items()}
            contrast = contrastive_loss(torch.cat([*alike.values()]), columns(P)[j], config.fedplvm_tau)
            cos = functional.cosine_similarity(f[:, j], P[j].mean(0, keepdim=True))
            values[j] = torch.stack([contrast, 2 * (cos - 1).square()])
        contrast, consistency = mean_over_images(values, n) if values else logits.new_zeros(2)
        return {"dice": segmentation_loss(logits, y), "contrast": config.fedplvm_weight * contrast,
                "consistency": config.fedplvm_weight * consistency}

    def send(model, context):
        f, n = (torch.cat(parts) for parts in zip(*context.total["features"]))
        features = {j: f[:, j][n[:, j] > 0] for j in range(n.shape[1]) if (n[:, j] > 0).any()}
        return {LAST: {j: cluster_means(x, finch(x)[-1]) for j, x in features.items()}}
    return Method(losses, send, terms=("dice", "contrast", "consistency"), vectors=vectors_of(True))
