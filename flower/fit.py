"""What may travel from a site to the server, known from the network and the config before it arrives; and
what becomes of a round in which a site fails or sends something else.

An answer has these records and perhaps more, which nobody reads:

    site        name: printable, of at most 80 letters, like no other's; perhaps problem: a text
    scalars     n: training images, 1 to 1e9, the same every round; seconds
    losses      the method's terms, each a finite number
    weights     the bytes of the network's weights, each at most 1e8 in size
    prototypes  PATH/CLASS: float32 (D,), or (k, D) with k at most n and 1000, each number at most 1e4 in size
    val, ..     images, misses, dice from 0 to 1, hd95 and assd from 0, and the same of every class
"""

import math
import re
import statistics
import sys
from typing import NamedTuple

import torch

from config import class_name
from federated import Update
from scoring.metrics import MEASURES

LONGEST_NAME, LONGEST_FAILURE = 80, 500
UNSEEN = re.compile("[,\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                    "\U000e0100-\U000e01ef]")  # letters that print as nothing, and the comma of a list
MOST, MOST_LOSS = 10**9, 1e30           # images, seconds, and pixels or mm of a distance
MOST_TERMS, LONGEST_TERM = 16, 40       # of a loss, and the letters of one's name
MOST_ROWS = 1000                        # prototypes of a class that a site may send
MOST_WEIGHT, MOST_PROTOTYPE = 1e8, 1e4  # no honest number comes near; a square of more would not be finite
HIGHEST = {"dice": 1, "hd95": MOST, "assd": MOST}


class Misfit(Exception):
    """An answer is not what was asked for; the text says in what."""


class SiteFailed(Exception):
    """A site has no update to average; the text names site, round and reason."""


def is_number(value, least, most, kinds=(int, float)):
    """Return whether a value is a number in a range; nan is in none, and True is no number."""
    return type(value) in kinds and least <= value <= most


def site_name(content):
    """Return the site's name in an answer; raises Misfit if it has none that can be used."""
    name = content["site"].get("name") if "site" in content else None
    if not isinstance(name, str):
        raise Misfit("its answer does not say which site it is")
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip() \
            or UNSEEN.search(name):
        raise Misfit(f"its name is no printable text of at most {LONGEST_NAME} letters without a comma")
    return name


# ---- An update ----

class Fields(NamedTuple):
    """Names, shapes and types of all that an update may hold."""

    weights: dict      # {name: tensor of that shape and type}, those that travel
    prototypes: dict   # {path: (D, whether a class has several vectors)}
    classes: int
    losses: set        # names of terms, empty for any


def shared(w, method):
    """Return the weights {name: tensor} that travel: all but those that the method keeps local."""
    return {name: value for name, value in w.items() if not method.local(name)}


def expected_fields(model, config, method):
    """Return the Fields of a method's updates: the network's weights, and what the method declares."""
    weights = shared(model.state_dict(), method)
    return Fields(weights, method.vectors(model), config.classes, set(method.terms))


def check_update(update, fields, n=None):
    """Return what makes an update unfit to be averaged, or None. n: what the site has stated before."""
    if not is_number(update.n, 1, MOST, (int,)):
        return f"it has {update.n} training images"
    if n not in (None, update.n):
        return f"it has {update.n} training images, and stated {n} before"
    if not is_number(update.seconds, 0, MOST):
        return "its seconds are no number of seconds"
    terms = update.losses.keys()
    named = terms <= fields.losses if fields.losses else len(terms) <= MOST_TERMS and all(
        name.isidentifier() and len(name) <= LONGEST_TERM for name in terms)
    if not terms or not named or not all(
            is_number(value, -MOST_LOSS, MOST_LOSS) for value in update.losses.values()):
        return f"its losses are not finite numbers of the names {', '.join(sorted(fields.losses))}"
    return out_of_range(update.weights.values(), MOST_WEIGHT, "weights") or check_prototypes(update, fields)


def check_prototypes(update, fields):
    """Return what is wrong with an update's prototypes, or None. A class that it lacks is no fault."""
    for path, classes in update.prototypes.items():
        if path not in fields.prototypes:
            return f"it has prototypes of the path {path[:40]!r}, which the method does not have"
        D, several = fields.prototypes[path]
        for j, P in classes.items():
            if not 0 <= j < fields.classes:
                return f"it has prototypes of the class {str(j)[:40]}, there are {fields.classes} classes"
            if P.dtype != torch.float32 or P.dim() != 1 + several or P.shape[-1] != D \
                    or several and not 1 <= len(P) <= min(update.n, MOST_ROWS):
                return f"its prototypes of the {path} are not vectors of {D} numbers"
    return out_of_range([P for classes in update.prototypes.values() for P in classes.values()],
                        MOST_PROTOTYPE, "prototypes")


def out_of_range(tensors, most, what):
    """Return what is wrong with tensors that are not finite or beyond `most`, or None."""
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            return f"its {what} are not finite"
        if tensor.numel() and tensor.abs().max() > most:
            return f"its {what} reach {tensor.abs().max().item():.1e}, more than {most:.0e}"
    return None


# ---- Scores ----

def read_scores(record, config):
    """Return the scores of a site in a record as `evaluate` gives them; raises Misfit unless they are of all
    its images and in range, or of none. With several foreground classes each one's travel apart."""
    names = [class_name(config, j) for j in range(1, config.classes)] if config.classes > 2 else []
    rows = [{name: record.get(prefix + name) for name in MEASURES}
            for prefix in ("", *(f"{j}/" for j in names))]
    for row in rows:
        check_scores(row, rows[0]["images"], config)
    return rows[0] | ({"classes": dict(zip(names, rows[1:]))} if names else {})


def check_scores(row, images, config):
    """Raise Misfit unless {name: number or None} are scores of so many images."""
    if not is_number(images, 0, MOST, (int,)) or row["images"] != images:
        raise Misfit("its scores do not count its images")
    most = images * max(1, config.classes - 1)
    if images and (row["dice"] is None or not is_number(row["misses"], 0, most, (int,))):
        raise Misfit("its scores lack Dice or misses")
    if not images and [value for value in row.values() if value is not None] != [0]:
        raise Misfit("it has scores of no image")
    for name, largest in HIGHEST.items():
        if row[name] is not None and not is_number(row[name], 0, largest):
            raise Misfit(f"its {name} is not a number from 0 to {largest:g}")


# ---- One update among the others ----

def too_far(updates, w, most):
    """Return {site: what is wrong} of the updates that are more than `most` times as long as the round's
    median: |w_m - w|, and the longest prototype of each class on a path and of the path, for a class may
    be that of one site alone. Fewer than three are not compared: of two nobody knows which one is right.
    most: the key `update_norm`. Source: ours."""
    lengths = {"update": {u.site: distance(u.weights, w) for u in updates}}
    for u in updates:
        for path, classes in u.prototypes.items():
            for j, P in classes.items():
                longest = torch.atleast_2d(P).double().norm(dim=1).max().item()
                for what in (f"prototype of class {j} on the {path}", f"longest prototype on the {path}"):
                    of_sites = lengths.setdefault(what, {})
                    of_sites[u.site] = max(longest, of_sites.get(u.site, 0.0))
    found = {}
    for what, of_sites in lengths.items():
        median = statistics.median_low(of_sites.values()) if len(of_sites) > 2 else 0.0
        found = {site: f"its {what} is {length / median:.1f} times as long as the median, "
                       f"update_norm: {most:g}"
                 for site, length in of_sites.items() if length > most * median > 0} | found
    return found


def distance(weights, w):
    """Return |w_m - w| over all weights that are no whole numbers, such as counts of batches."""
    return math.sqrt(sum((value.double() - w[name]).square().sum().item()
                         for name, value in weights.items() if value.is_floating_point()))


def bounded(updates, most):
    """Return the updates with their n lowered where a site's share n_m / n would exceed `most`, the key
    `max_share`; what it loses goes to the others in proportion to their n. With fewer than 1 / most sites all
    shares are equal. Source: ours."""
    if most * len(updates) <= 1:
        return [u._replace(n=1) for u in updates]
    free = sorted(u.n for u in updates)
    while free[-1] > (largest := most * sum(free) / (1 - most * (len(updates) - len(free)))):
        free.pop()  # it is cut down to `largest`, which falls with every one
    return [u._replace(n=min(u.n, largest)) for u in updates]


# ---- A round ----

def accept(results, w, fields, t, guards, kept=None):
    """Return the updates of round t that can be averaged, sorted by site, no share above `max_share`.
    results: {site: Update, None without one, or what went wrong there}; fields: from `expected_fields`; kept:
    {site: its `Update.kept`}. A site that failed or sent what does not fit is named: by SiteFailed with
    `on_site_failure: stop`, else on stderr, and SiteFailed is raised if fewer than `min_sites` are left."""
    stated = {site: of_site.get("n") for site, of_site in (kept or {}).items()}
    problems = {site: check_update(found, fields, stated.get(site)) if isinstance(found, Update) else found
                for site, found in sorted(results.items()) if found is not None}
    updates = [results[site] for site, problem in problems.items() if problem is None]
    if guards.update_norm is not None:
        problems |= too_far(updates, w, guards.update_norm)
    for site, problem in problems.items():
        if problem is not None:
            sit_out(f"site {site} failed in round {t}: {problem}", guards)
    updates = [update for update in updates if problems[update.site] is None]
    if len(updates) < guards.min_sites:
        raise SiteFailed(f"{len(updates)} sites are left in round {t}, "
                         f"min_sites: {guards.min_sites} are needed")
    return bounded(updates, guards.max_share) if guards.max_share < 1 else updates


def sit_out(failure, guards):
    """Name a site's failure in one short line without control characters, for it may be foreign: raise
    SiteFailed, or with `on_site_failure: skip` print it."""
    words = " ".join(failure.split())
    words = "".join(letter if letter.isprintable() else "?" for letter in words)[:LONGEST_FAILURE]
    if guards.on_site_failure == "stop":
        raise SiteFailed(words)
    print(f"{words}; it is left out", file=sys.stderr, flush=True)
