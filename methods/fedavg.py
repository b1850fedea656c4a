"""FedAvg (AISTATS 17): the weighted mean of the weights."""

from federated import fedbcs

FIXED = {"fsr": "none", "prototype_weight": 0.0}


def fedavg(config):
    """FedAvg: FedBCS with both of its switches off.

        L = L_dice,   w = sum_m n_m / n w_m
    """
    return fedbcs(config)
