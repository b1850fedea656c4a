"""Sites that fail, and what becomes of their round."""

import sys

from federated import Update
from flower.fit import bounded, check_update, too_far


class SiteFailed(Exception):
    """A site has no update to average; the text names site, round and reason."""


def accept(results, w, fields, t, guards, counts=None):
    """Return the updates of round t that can be averaged, sorted by site, n reduced so that no
    share exceeds `max_share`.

    results: {site: Update, or what went wrong there}; fields: from `expected_fields`; counts: {site: n}
    as stated in earlier rounds. Raises SiteFailed for a site that failed or sent what does not fit: at
    once with `on_site_failure: stop`; with `skip` such a site is named and sits out the round, and it is
    raised only if fewer than `min_sites` are left.
    """
    problems = {site: check_update(found, fields, (counts or {}).get(site))
                if isinstance(found, Update) else found for site, found in sorted(results.items())}
    updates = [results[site] for site, problem in problems.items() if problem is None]
    if guards.update_norm is not None:
        problems |= too_far(updates, w, guards.update_norm)
    for site, problem in problems.items():
        if problem is not None:
            sit_out(f"site {site} failed in round {t}: {said(problem)}", guards)
    updates = [update for update in updates if problems[update.site] is None]
    if len(updates) < guards.min_sites:
        raise SiteFailed(f"{len(updates)} sites are left in round {t}, "
                         f"min_sites: {guards.min_sites} are needed")
    return bounded(updates, guards.max_share) if guards.max_share < 1 else updates


def said(problem):
    """Return what went wrong as one short line without control characters, for it may be foreign."""
    words = " ".join(str(problem).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)[:400]


def sit_out(failure, guards):
    """Name a site's failure: raise SiteFailed, or with `on_site_failure: skip` print it."""
    if guards.on_site_failure == "stop":
        raise SiteFailed(failure)
    print(f"{failure}; it is left out", file=sys.stderr, flush=True)
