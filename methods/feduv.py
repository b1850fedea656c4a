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
        index = spread_pixels(y.flatten(), model.classes, config.feduv_pixels)
        p, z = (a.permute(0, 2, 3, 1).flatten(0, 2)[index]
                for a in (logits.softmax(1), maps["decoder"][0].float()))
        distance = functional.pdist(z).square()
        V = functional.relu(model.classes**-0.5 - p.std(0)).mean()  # gamma = 1 / sqrt(classes)
        U = (-distance / distance.detach().median().clamp_min(1e-12)).exp().mean()
        return {"dice": segmentation_loss(logits, y), "variance": config.feduv_variance * V,
                "uniformity": config.feduv_uniformity * U}
    return Method(losses, terms=("dice", "variance", "uniformity"), graph=True)


def spread_pixels(y, classes, number):
    """Return the indices (number,) of pixels of labels y (N,), as many of each class present, at equal steps
    through its pixels; a class that has fewer lends some of them more than once.

    Every size is known beforehand, so that nothing waits for the device. Pixels are counted class by class:
    the place of a pixel in that order is found in the cumulative count.
    """
    member = y == torch.arange(classes, device=y.device)[:, None]    # (J, N)
    n = member.sum(1)
    there, slot = (n > 0).cumsum(0), torch.arange(number, device=y.device)
    rank = slot * there[-1] // number                                # 0: of the first class present
    first, end = ((r * number + there[-1] - 1) // there[-1] for r in (rank, rank + 1))  # its slots
    j = torch.searchsorted(there, rank + 1)
    place = n.cumsum(0)[j] - n[j] + (slot - first) * n[j] // (end - first)
    return torch.searchsorted(member.flatten().cumsum(0), place + 1) % len(y)
