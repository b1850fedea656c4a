"""FedUV (CVPR 24): uniformity and variance, as if the data were the same everywhere."""

import torch
from torch.nn import functional

from federated import Method, run_network, segmentation_loss
from settings.kinds import number, whole

SETTINGS = {
    "feduv_variance": (number(least=0), 2.5, "weight of FedUV's V"),
    "feduv_uniformity": (number(least=0), 0.5, "weight of FedUV's U"),
    "feduv_pixels": (whole(4), 256, "pixels of a batch that enter V and U, of all classes alike"),
}
FIXED = {"fsr": "none", "prototype_weight": 0.0}


def feduv(config):
    """FedUV (CVPR 24): predictions that vary, and features that spread, as if data were uniform.

        L = L_seg + a V + b U
        V = mean_c relu(gamma - std over samples of softmax_c),   gamma = std of an identity column
        U = mean over pairs of exp(-|z_i - z_j|^2 / median)

    a = `feduv_variance`, b = `feduv_uniformity`; the median of |z_i - z_j|^2 is a constant. Our
    adaptation: samples are `feduv_pixels` pixels of a batch, as many of each class present, taken
    at equal steps through its pixels (no random state); z is their last decoder feature.
    """
    def losses(model, x, y, context):
        logits, maps = run_network(model, x, config)
        members = [(y.flatten() == j).nonzero()[:, 0] for j in y.unique()]
        share = config.feduv_pixels // len(members)
        steps = [torch.arange(min(share, len(m)), device=y.device) * len(m) // min(share, len(m))
                 for m in members]
        index = torch.cat([m[s] for m, s in zip(members, steps)])
        p, z = (a.permute(0, 2, 3, 1).flatten(0, 2)[index]
                for a in (logits.softmax(1), maps["decoder"][0].float()))
        distance = functional.pdist(z).square()
        gamma = torch.eye(model.classes).std(0)[0].item()
        V = functional.relu(gamma - p.std(0)).mean()
        U = (-distance / distance.detach().median().clamp_min(1e-12)).exp().mean()
        return {"dice": segmentation_loss(logits, y), "variance": config.feduv_variance * V,
                "uniformity": config.feduv_uniformity * U}
    return Method(losses)
