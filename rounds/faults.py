"""Sites that fail: what makes an update unfit to be averaged, and what becomes of its round."""

import sys

import torch

from federated import Update
from rounds.diverged import Diverged


class SiteFailed(Exception):
    """A site has no update to average; the text names site, round and reason."""


def attempt(site, t, config, work, *arguments):
    """Return work(*arguments), or with `on_site_failure: skip` the exception that it raised.

    With `stop` the exception goes on, after a line that names the site.
    """
    try:
        return work(*arguments)
    except Exception as problem:  # whatever goes wrong at a site stays there
        if config.on_site_failure == "skip":
            return problem
        if not isinstance(problem, Diverged):  # which names the site itself
            print(f"site {site} failed in round {t}", file=sys.stderr, flush=True)
        raise


def accept(results, w, G, t, config, method):
    """Return the updates of round t that can be averaged, sorted by site.

    results: {site: Update, or what went wrong there}. Raises SiteFailed for a site that failed or
    sent what does not fit w: at once with `on_site_failure: stop`; with `skip` such a site is named
    and sits out the round, and it is raised only if fewer than `min_sites` are left.
    """
    updates, length = [], {path: P.shape[1] for path in G for P in G[path].values()}
    expected = {name: value.shape for name, value in w.items() if not method.local(name)}
    for site in sorted(results):
        problem = results[site]
        if isinstance(problem, Update):
            problem = check_update(problem, expected, length)
        if problem is None:
            updates.append(results[site])
        else:
            sit_out(f"site {site} failed in round {t}: {' '.join(str(problem).split())}", config)
    if len(updates) < config.min_sites:
        raise SiteFailed(f"{len(updates)} sites are left in round {t}, min_sites: "
                         f"{config.min_sites} are needed")
    return updates


def sit_out(failure, config):
    """Name a site's failure: raise SiteFailed, or with `on_site_failure: skip` print it."""
    if config.on_site_failure == "stop":
        raise SiteFailed(failure)
    print(f"{failure}; it is left out", file=sys.stderr, flush=True)


def check_update(update, expected, length):
    """Return what makes an update unfit to be averaged, or None.

    expected: {name: shape} of the weights that are averaged. length: {path: numbers in a prototype},
    of the paths that are known; a path that is not becomes so by the first update that has it.
    """
    if type(update.n) is not int or update.n < 1:
        return f"it has {update.n} training images"
    if {name: value.shape for name, value in update.weights.items()} != expected:
        return "its weights differ in name or shape from the global ones"
    for path, classes in update.prototypes.items():
        for P in classes.values():
            if P.dim() not in (1, 2) or P.numel() == 0 or P.shape[-1] != length.setdefault(
                    path, P.shape[-1]):
                return f"its prototypes of the {path} are not vectors of {length.get(path)} numbers"
    vectors = [P for classes in update.prototypes.values() for P in classes.values()]
    if not all(torch.isfinite(value).all() for value in [*update.weights.values(), *vectors]):
        return "its weights or prototypes are not finite"
    return None
