"""All training images in one place: what a federation would like to reach, the upper bound."""

from datasets import Site
from federated import fedbcs

FIXED = {"fsr": "none", "prototype_weight": 0.0, "sites_per_round": None}


def pooled(config):
    """Pooled training: one network on the training images of all sites, batches mixed over the sites.

        L = L_dice,   w = w_m of the one place m

    A round is one pass over all images, with as many steps one after the other as all sites have together.
    Validation and test stay by site. It needs the images, so it cannot run between hospitals.
    """
    return fedbcs(config)


def training_sites(found, sites):
    """Return, in a list, the one Site that has the training images of all; found: the sites that have any."""
    return [Site("pooled", [sample for site in found for sample in site.train], [], [])]
