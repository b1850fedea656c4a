"""Every site by itself: what a hospital has without any federation, the lower bound."""

from federated import fedbcs
from settings.kinds import BadInput

FIXED = {"fsr": "none", "prototype_weight": 0.0, "hold_out": None, "sites_per_round": None}


def local(config):
    """Local training: every site trains a network of its own from the same initial weights; nothing is sent.

        L = L_dice,   w_m stays at site m

    A site is scored with its own network; the best round is the best on average over the sites, as in every
    method. A site that took no part has no network, so none can be held out.
    """
    return fedbcs(config)._replace(local=lambda name: True)


def training_sites(found, sites):
    """Return the sites that have training images, found among `sites`; raises BadInput unless all have."""
    check_trained([site.name for site in found], [site.name for site in sites])
    return found


def check_trained(trained, sites):
    """Raise BadInput for one of the sites that has no network, for it did not train; None: none is named."""
    if missing := [site for site in sites if site not in trained]:
        raise BadInput(f"site: with method: local only {', '.join(sorted(trained))} have networks, and "
                       f"{missing[0] or 'no site'} has none; name one of them, or train with another method")
