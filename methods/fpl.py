"""FPL (CVPR 23): federated prototype learning."""

import torch

from federated import Method, run_network, segmentation_loss
from methods.shared import LAST, image_cosines, image_means, mean_over_images, vectors_of
from prototypes import columns, contrastive_loss
from settings.kinds import number

SETTINGS = {"fpl_tau": (number(above=0), 0.02, "temperature of FPL")}
FIXED = {"fsr": "none", "prototype_weight": 0.0}


def fpl(config):
    """FPL (CVPR 23): one mean per class is sent, FINCH at the server, both losses as in FedBCS.

        L = L_seg + L_contra + L_consis
        L_contra = -log( sum_{g in P_j} e^{cos(f,g)/tau} / sum_{all g} e^{cos(f,g)/tau} )
        L_consis = mean over channels of (f - Pbar_j)^2

    tau = `fpl_tau`; mean over the f of a class, then over the foreground classes. L_seg alone in
    round 1. What is sent is the mean over a class's pixels. Our adaptation: f is that of shared.py; with
    every pixel as an f, at small scale, all foreground went to one point and the prediction to background.
    """
    def losses(model, x, y, context):
        logits, maps = run_network(model, x, config)
        f, n = image_means(maps["decoder"][0].float(), y, model.classes)  # (B, J, D), (B, J)
        if (total := context.total) is not None:
            for name, value in (("sum", f.detach() * n[..., None]), ("n", n)):
                total[name] = total.get(name, 0) + value.sum(0).double()
        P, values = context.G.get(LAST, {}), {}
        for j in (j for j in P if j > 0):
            cos, f_j = image_cosines(f[:, j], P), f[:, j]
            contrast = contrastive_loss(torch.cat([*cos.values()]), columns(P)[j], config.fpl_tau)
            values[j] = torch.stack([contrast, (f_j - P[j].mean(0)).square().mean(1)])
        contrast, consistency = mean_over_images(values, n) if values else logits.new_zeros(2)
        return {"dice": segmentation_loss(logits, y), "contrast": contrast,
                "consistency": consistency}

    def send(model, context):
        total, n = context.total, context.total["n"]
        return {LAST: {j: (total["sum"][j] / n[j]).float() for j in range(len(n)) if n[j] > 0}}
    return Method(losses, send, terms=("dice", "contrast", "consistency"), vectors=vectors_of(False),
                  graph=True)
