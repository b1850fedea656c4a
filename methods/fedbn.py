"""FedBN (ICLR 21): every site keeps its own batch norms."""

from torch import nn

from federated import fedbcs
from unet import UNet

FIXED = {"fsr": "none", "prototype_weight": 0.0, "norm": "batch", "test_stats": "site"}


def fedbn(config):
    """FedBN: FedAvg, but the affine map of every batch norm and its statistics stay at the site.

        w = sum_m n_m / n w_m  of all weights but gamma, beta;  gamma_m, beta_m, mean_m, var_m stay at site m

    The statistics are those of `test_stats: site`, of the site's training images under the averaged weights;
    FedBN's released code keeps running averages of the training steps. A site that took no part has
    gamma = 1, beta = 0. Source: FedBN's paper.
    """
    def norm(channels):
        return nn.BatchNorm2d(channels, track_running_stats=False)

    def network(own, levels):
        return UNet(own.width, own.classes, own.fsr, levels, norm)
    norms = {name for name, layer in UNet(1, levels=(), norm=norm).named_modules()
             if isinstance(layer, nn.BatchNorm2d)}
    return fedbcs(config)._replace(network=network, local=lambda name: name.rpartition(".")[0] in norms)
