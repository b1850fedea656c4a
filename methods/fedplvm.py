"""FedPLVM (NeurIPS 24): sites cluster their features before the server does."""

import torch
from torch.nn import functional

from federated import Method, run_network, segmentation_loss
from methods.shared import LAST, aligned, class_means, cosines, mean_over_classes, own_means
from prototypes import cluster_means, contrastive_loss, finch
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
    over the foreground classes. Plain mean of the weights. Our adaptation: f as above; FINCH's last
    partition is taken, as at the server.
    """
    def losses(model, x, y, context):
        logits, maps = run_network(model, x, config)
        f, j = class_means(maps["decoder"][0].float(), y, model.classes)
        if context.total is not None:
            for c in j.unique().tolist():
                context.total.setdefault(c, []).append(f[j == c].detach())
        contrast, consistency = logits.new_zeros(2)
        if G := context.G:
            f, j = aligned(f, j, G[LAST])
            cos, own = cosines(f, j, G[LAST])
            alike = cos.clamp_min(1e-6) ** config.fedplvm_power
            contrast = mean_over_classes(contrastive_loss(alike, own, config.fedplvm_tau), j)
            cos = functional.cosine_similarity(f, own_means(j, G[LAST]))
            consistency = mean_over_classes(2 * (cos - 1).square(), j)
        return {"dice": segmentation_loss(logits, y), "contrast": config.fedplvm_weight * contrast,
                "consistency": config.fedplvm_weight * consistency}

    def send(model, context):
        features = {j: torch.cat(f) for j, f in sorted(context.total.items())}
        return {LAST: {j: cluster_means(x, finch(x)[-1]) for j, x in features.items()}}
    return Method(losses, send)
