"""Frequency-domain style recalibration (FSR): amplitude is style, phase is content."""

import torch
from torch import nn

EPS = 1e-5  # of the instance norm, as in the released code


def recalibrate_fourier(z, l_norm, l_org):
    """FSR as the paper defines it; kept for reading and for the tests, `recalibrate` is what runs.

        A, P   = |F(z)|, arg F(z)
        A_norm = |F(IN(z))|
        z_hat  = F^-1[(l_norm A_norm + l_org A) exp(iP)]

    z: (B, C, H, W), real; l_norm, l_org: anything that broadcasts against it; F: 2-D DFT over
    (H, W), of which rfft2 keeps the half that determines a real signal.
    |F(z)| has no gradient where it is 0, so on a constant channel this form has the right value, no gradient.
    Source: paper. The released code floors the squared amplitude at 1e-5, which turns an all-zero
    channel into 3e-3; here a zero channel stays zero.
    """
    F = torch.fft.rfft2(z)
    A, P = F.abs(), F.angle()
    A_norm = torch.fft.rfft2(nn.functional.instance_norm(z, eps=EPS)).abs()
    return torch.fft.irfft2(torch.polar(l_norm * A_norm + l_org * A, P), s=z.shape[-2:])


def recalibrate(z, l_norm, l_org, scale=1.0, shift=0.0):
    """FSR in the spatial domain: the same map without a Fourier transform, one multiply-add.

        out = scale z_hat + shift,   z_hat = l_norm IN(z) + l_org z

    IN divides every frequency by one sigma and zeroes the DC bin, and the phase is kept; hence the
    equality, which holds for odd sizes and negative means too. z: (B, C, H, W), bfloat16 under autocast; the
    other arguments broadcast against (B, C, 1, 1). Source: ours (derived from the paper's equation above).
    """
    mean, per_sigma = Moments.apply(z)
    a = scale * l_norm * per_sigma
    return (z * (a + scale * l_org).to(z.dtype)).add_((shift - a * mean).to(z.dtype))


class Moments(torch.autograd.Function):
    """The mean of each channel of each image of z (B, C, H, W), and 1 / sigma of its IN: both (B, C, 1, 1).

        sigma^2 = mean((z - mean)^2) + EPS;  d mean / dz = 1/HW,  d sigma^-1 / dz = -(z - mean) / (HW sigma^3)

    On a CPU, torch.var_mean takes 15 times as long where maps lie channels last."""

    @staticmethod
    def forward(ctx, z):
        mean = z.mean((2, 3), True, dtype=torch.float32 if z.dtype == torch.bfloat16 else None)
        per_sigma = torch.rsqrt((z - mean).square_().mean((2, 3), True) + EPS)
        ctx.save_for_backward(z, mean, per_sigma)
        return mean, per_sigma

    @staticmethod
    def backward(ctx, of_mean, of_per_sigma):
        z, mean, per_sigma = ctx.saved_tensors
        HW = z.shape[2] * z.shape[3]
        slope = of_per_sigma * per_sigma.pow(3) / -HW
        rest = (of_mean / HW).addcmul_(slope, mean, value=-1)
        return torch.addcmul(rest.to(z.dtype), z, slope.to(z.dtype))


class StyleRecalibration(nn.Module):
    """One FSR layer with a per-channel affine: (B, C, H, W) -> (B, C, H, W).

    kind "adaptive": l_norm, l_org = sigmoid(Linear(GAP(z))), per sample and channel (paper).
    kind "global":   l_norm, l_org = softmax(h / 0.1), one pair for the layer (released code).
    Raises ValueError for another kind.
    """

    def __init__(self, channels, kind):
        super().__init__()
        if kind not in ("adaptive", "global"):
            raise ValueError(f"fsr: expected adaptive or global, not {kind!r}")
        self.adaptive = kind == "adaptive"
        if self.adaptive:
            self.linear = nn.Linear(channels, 2 * channels)
        else:
            self.h = nn.Parameter(torch.zeros(2))
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def weights(self, z):
        """Return (l_norm, l_org), broadcastable against z (B, C, H, W)."""
        if self.adaptive:
            l = torch.sigmoid(self.linear(z.mean((2, 3))))  # (B, 2C): first l_norm, then l_org
            return l[:, :, None, None].chunk(2, dim=1)
        return torch.softmax(self.h / 0.1, 0)

    def forward(self, z):
        l_norm, l_org = self.weights(z)
        return recalibrate(z, l_norm, l_org, self.scale, self.shift)
