"""The U-Net: four levels and a bottleneck, FSR behind encoder blocks 2 to 4, fusion heads."""

import torch
from torch import nn
from torch.nn import functional

from fft_style import StyleRecalibration


def batch_norm(channels):
    """Return a batch norm without affine and without running statistics, as in the released code.

    So the state dict, which is what sites send, holds nothing of a site's statistics.
    """
    return nn.BatchNorm2d(channels, affine=False, track_running_stats=False)


def group_norm(channels):
    """Return a norm over 8 groups of an image's own channels, without affine. Source: ours.

    It treats an image alike in training and at test time, and has no statistics to keep or send.
    """
    return nn.GroupNorm(8, channels, affine=False)


NORMS = {"batch": batch_norm, "group": group_norm}
PATHS = ("encoder", "decoder")


def block(inputs, outputs, norm=batch_norm):
    """Return two times 3x3 convolution, norm, ReLU: (B, inputs, H, W) -> (B, outputs, H, W)."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                   norm(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net of widths w, 2w, 4w, 8w, 16w (w = `width`): (B, 3, H, W) -> logits (B, classes, H, W).

    H and W have to be multiples of 16. fsr: "none", "global" or "adaptive". levels: the shallow levels that
    are fused with the deepest (3); with [] there are no fusion heads at all. norm: "batch", "group", or
    channels -> the layer behind every convolution of a block. `input_transform` is a map (B, 3, H, W) ->
    (B, 3, H, W) that a method may put before the network. The U-Net proper is built first, so its initial
    weights depend on the seed alone. Maps are stored channels last, which is faster.
    Raises ValueError for another fsr or norm. Source: released code; `adaptive`: paper.
    """

    def __init__(self, width=32, classes=2, fsr="adaptive", levels=(0, 1, 2), norm="batch"):
        super().__init__()
        if norm not in NORMS and not callable(norm):
            raise ValueError(f"norm: expected {', '.join(NORMS)} or a function of the channels, not {norm!r}")
        norm = NORMS.get(norm, norm)
        c = [width * 2**k for k in range(5)]
        self.classes = classes
        self.encoder = nn.ModuleList(block(i, o, norm) for i, o in zip([3, *c], c[:4]))
        self.bottleneck = block(c[3], c[4], norm)
        self.up = nn.ModuleList(nn.ConvTranspose2d(c[k + 1], c[k], 2, 2) for k in range(4))
        self.decoder = nn.ModuleList(block(2 * c[k], c[k], norm) for k in range(4))
        self.head = nn.Conv2d(c[0], classes, 1)
        recalibrated = [] if fsr == "none" else c[1:4]
        self.fsr = nn.ModuleList(StyleRecalibration(channels, fsr) for channels in recalibrated)
        paths = PATHS if levels else ()
        self.fusion = nn.ModuleDict({path: fusion_heads(c, levels) for path in paths})
        self.input_transform = nn.Identity()
        self.to(memory_format=torch.channels_last)

    def features(self, x):
        """Return logits and maps {"encoder": [e_0 .. e_3], "decoder": [d_0 .. d_3], "bottleneck": b}.

        e_k, d_k: (B, w 2^k, H / 2^k, W / 2^k), FSR included; b: (B, 16 w, H / 16, W / 16).
        """
        e, d = [None] * 4, [None] * 4
        x = self.input_transform(x).contiguous(memory_format=torch.channels_last)
        for k in (0, 1, 2, 3):
            x = self.encoder[k](x)
            if self.fsr and k > 0:
                x = self.fsr[k - 1](x)
            e[k] = x
            x = functional.max_pool2d(x, 2)
        x = b = self.bottleneck(x)
        for k in (3, 2, 1, 0):
            x = d[k] = self.decoder[k](torch.cat([self.up[k](x), e[k]], 1))
        return self.head(x), {"encoder": e, "decoder": d, "bottleneck": b}

    def forward(self, x):
        return self.features(x)[0]


def fusion_heads(c, levels):
    """Return the 1x1 convolutions of one path, f_k = Conv_k([x_k ; up(x_3)]), under the name of k.

    c: channels per level. All give c[3] channels (256 at width 32). Source: released code.
    """
    return nn.ModuleDict({str(k): nn.Conv2d(c[k] + c[3], c[3], 1) for k in sorted(levels)})


# ---- The network of a method ----

def build_model(config, method):
    """Return the method's network, its initial weights seeded; without prototypes it has no fusion heads."""
    torch.manual_seed(config.seed)
    model = method.network(config, config.levels if config.prototype_weight > 0 else [])
    if method.input_transform is not None:
        model.input_transform = method.input_transform
    return model


def mixed_precision(config, device):
    """Return the context in which the network runs: bfloat16 with amp: bf16, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16")
