"""Normalisation of the input's amplitude alone, and the layer that HarmoFL shares."""

import torch
from torch import nn

from federated import Method, run_network, segmentation_loss

FIXED = {"fsr": "none", "prototype_weight": 0.0}


class AmplitudeNorm(nn.Module):
    """Give every image the sites' mean amplitude spectrum: (B, 3, S, S) -> (B, 3, S, S).

        x_hat = F^-1[ Abar exp(i arg F(x)) ],   Abar = average of A_m,   A_m = site m's mean |F(x)|

    Abar is a buffer: it is averaged with the weights and normalises the input at evaluation too. In
    round 1 it is 0 and the images pass as they are. The whole amplitude is replaced; HarmoFL's released
    code (L = 0, the size of its window of low frequencies) only moves the mean.
    """

    def __init__(self, size):
        super().__init__()
        self.register_buffer("amplitude", torch.zeros(3, size, size // 2 + 1))

    def forward(self, x):
        F = torch.fft.rfft2(x)
        x_hat = torch.fft.irfft2(torch.polar(self.amplitude.expand_as(F), F.angle()), x.shape[-2:])
        return torch.where(self.amplitude.any(), x_hat, x)


def input_norm(config):
    """Input-level amplitude normalisation: `AmplitudeNorm` in front of the network, L = L_seg.

    A site gathers A_m from the images of its last local epoch, as they enter training, and sends it
    with its weights. Source: the comparison of the paper's figure 4b.
    """
    def losses(model, x, y, context):
        if (total := context.total) is not None:
            total["sum"] = total.get("sum", 0) + torch.fft.rfft2(x).abs().double().sum(0)
            total["n"] = total.get("n", 0) + x.new_full((), len(x))
        logits, _ = run_network(model, x, config)
        return {"dice": segmentation_loss(logits, y)}

    def send(model, context):
        model.input_transform.amplitude.copy_(context.total["sum"] / context.total["n"])
        return {}
    return Method(losses, send, terms=("dice",), graph=True,
                  input_transform=AmplitudeNorm(config.image_size))
