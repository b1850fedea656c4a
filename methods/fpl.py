"""FPL (CVPR 23): federated prototype learning."""

from federated import Method, run_network, segmentation_loss
from methods.shared import (
    LAST,
    aligned,
    class_means,
    cosines,
    image_sums,
    mean_over_classes,
    own_means,
)
from prototypes import contrastive_loss
from settings.kinds import number

SETTINGS = {"fpl_tau": (number(above=0), 0.02, "temperature of FPL")}
FIXED = {"fsr": "none", "prototype_weight": 0.0}


def fpl(config):
    """FPL (CVPR 23): one mean per class is sent, FINCH at the server, both losses as in FedBCS.

        L = L_seg + L_contra + L_consis
        L_contra = -log( sum_{g in P_j} e^{cos(f,g)/tau} / sum_{all g} e^{cos(f,g)/tau} )
        L_consis = mean over channels of (f - Pbar_j)^2

    tau = `fpl_tau`; mean over the f of a class, then over the foreground classes. L_seg alone in
    round 1. What is sent is the mean over a class's pixels. Our adaptation: f as above, not every
    pixel, which at small scale drew all foreground to one point and the prediction to background.
    """
    def losses(model, x, y, context):
        logits, maps = run_network(model, x, config)
        d_0 = maps["decoder"][0].float()
        if (total := context.total) is not None:
            for name, value in zip(("sum", "n"), image_sums(d_0.detach(), y, model.classes)):
                total[name] = total.get(name, 0) + value.sum(0).double()
        contrast, consistency = logits.new_zeros(2)
        if G := context.G:
            f, j = aligned(*class_means(d_0, y, model.classes), G[LAST])
            cos, own = cosines(f, j, G[LAST])
            contrast = mean_over_classes(contrastive_loss(cos, own, config.fpl_tau), j)
            consistency = mean_over_classes((f - own_means(j, G[LAST])).square().mean(1), j)
        return {"dice": segmentation_loss(logits, y), "contrast": contrast,
                "consistency": consistency}

    def send(model, context):
        total, n = context.total, context.total["n"]
        return {LAST: {j: (total["sum"][j] / n[j]).float() for j in range(len(n)) if n[j] > 0}}
    return Method(losses, send)
