"""What may travel from a site to the server, known from the network and the config before it arrives.

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
from typing import NamedTuple

import torch

from config import class_name

LONGEST_NAME, LONGEST_PROBLEM = 80, 400
UNSEEN = re.compile("[,\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                    "\U000e0100-\U000e01ef]")  # letters that print as nothing, and the comma of a list
MOST_IMAGES, MOST_SECONDS, MOST_LOSS = 10**9, 10**9, 1e30
MOST_TERMS, LONGEST_TERM = 16, 40
MOST_ROWS = 1000                        # prototypes of a class that a site may send
MOST_WEIGHT, MOST_PROTOTYPE = 1e8, 1e4  # no honest number comes near; a square of more would not be finite
MOST_DISTANCE = 1e9                     # px or mm
LARGEST = {"dice": 1.0, "hd95": MOST_DISTANCE, "assd": MOST_DISTANCE}  # {name: largest}


class Misfit(Exception):
    """An answer is not what was asked for; the text says in what."""


# ---- Who sends it ----

def name_of(reply):
    """Return the site's name in a reply; raises Misfit if it has none that can be used."""
    name = reply.content["site"].get("name") if "site" in reply.content else None
    if not isinstance(name, str):
        raise Misfit("its answer does not say which site it is")
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip() \
            or UNSEEN.search(name):
        raise Misfit(f"its name is no printable text of at most {LONGEST_NAME} letters without a comma")
    return name


def problem_of(reply):
    """Return what a site says went wrong there, cut to a line, or None."""
    problem = reply.content["site"].get("problem")
    return None if problem is None else str(problem)[:LONGEST_PROBLEM]


# ---- An update ----

class Fields(NamedTuple):
    """Names, shapes and types of all that an update may hold."""

    weights: dict      # {name: tensor of that shape and type}, those that travel
    prototypes: dict   # {path: (D, whether a class has several vectors)}
    classes: int
    losses: set        # names of terms, empty for any


def expected_fields(model, config, method):
    """Return the Fields of a method's updates: the network's weights, and what the method declares."""
    return Fields({name: value for name, value in model.state_dict().items() if not method.local(name)},
                  method.vectors(model), config.classes, set(method.terms))


def are_terms(names, fields):
    """Return whether names of loss terms are those of the method; one that declares none may have any 16."""
    return names <= fields.losses if fields.losses else len(names) <= MOST_TERMS and all(
        name.isidentifier() and len(name) <= LONGEST_TERM for name in names)


def check_update(update, fields, n=None):
    """Return what makes an update unfit to be averaged, or None. n: what the site has stated before."""
    if type(update.n) is not int or not 1 <= update.n <= MOST_IMAGES:
        return f"it has {update.n} training images"
    if n not in (None, update.n):
        return f"it has {update.n} training images, and stated {n} before"
    if not is_number(update.seconds, 0, MOST_SECONDS):
        return "its seconds are no number of seconds"
    if not update.losses or not are_terms(update.losses.keys(), fields) or not all(
            is_number(value, -MOST_LOSS, MOST_LOSS) for value in update.losses.values()):
        return f"its losses are not finite numbers of the names {', '.join(sorted(fields.losses))}"
    return out_of_range(update.weights.values(), MOST_WEIGHT, "weights") or check_prototypes(update, fields)


def is_number(value, least, most):
    """Return whether a value is a number in a range; nan is in none."""
    return type(value) in (int, float) and least <= value <= most


def check_prototypes(update, fields):
    """Return what is wrong with an update's prototypes, or None. A class that it lacks is no fault."""
    for path, classes in update.prototypes.items():
        if path not in fields.prototypes:
            return f"it has prototypes of the path {str(path)[:40]!r}, which the method does not have"
        D, several = fields.prototypes[path]
        for j, P in classes.items():
            if type(j) is not int or not 0 <= j < fields.classes:
                return f"it has prototypes of the class {str(j)[:40]}, there are {fields.classes} classes"
            rows = (len(P),) if several and P.dim() == 2 and 1 <= len(P) <= min(update.n, MOST_ROWS) else ()
            shaped = P.shape == (*rows, D) and bool(rows) == several
            if not shaped or P.dtype != torch.float32:
                return f"its prototypes of the {path} are not vectors of {D} numbers"
    vectors = [P for classes in update.prototypes.values() for P in classes.values()]
    return out_of_range(vectors, MOST_PROTOTYPE, "prototypes")


def out_of_range(tensors, most, what):
    """Return what is wrong with tensors that are not finite or beyond `most`, or None."""
    for tensor in tensors:
        if not torch.isfinite(tensor).all():
            return f"its {what} are not finite"
        if tensor.numel() and tensor.abs().max() > most:
            return f"its {what} reach {tensor.abs().max().item():.1e}, more than {most:.0e}"
    return None


# ---- Scores ----

def classes_of(config):
    """Return the names of the foreground classes whose scores travel apart: of several, none of one."""
    return [class_name(config, j) for j in range(1, config.classes)] if config.classes > 2 else []


def check_scores(record, config):
    """Raise Misfit unless a record is scores of a site: of all its images, in range, or of none."""
    images = record.get("images")
    for prefix in ("", *(f"{j}/" for j in classes_of(config))):
        row = {name: record[f"{prefix}{name}"] for name in (*LARGEST, "misses", "images")
               if f"{prefix}{name}" in record}
        most = images * max(1, config.classes - 1) if type(images) is int else 0
        if type(row.get("images")) is not int or not 0 <= row["images"] <= 10**9 or row["images"] != images:
            raise Misfit("its scores do not count its images")
        counted = type(row.get("misses")) is int and 0 <= row["misses"] <= most
        if images and not (counted and "dice" in row):
            raise Misfit("its scores lack Dice or misses")
        if not images and len(row) > 1:
            raise Misfit("it has scores of no image")
        for name, largest in LARGEST.items():
            if name in row and not (type(row[name]) in (int, float) and 0 <= row[name] <= largest):
                raise Misfit(f"its {name} is not a number from 0 to {largest:g}")


# ---- One update among the others ----

def too_far(updates, w, most):
    """Return {site: what is wrong} of the updates that are more than `most` times as long as the round's
    median: |w_m - w|, and the longest prototype of each class on a path and of the path, for a class may
    be that of one site alone.

    Fewer than three are not compared: of two nobody knows which one is right. most: the key `update_norm`.
    Source: ours.
    """
    lengths = {"update": {u.site: distance(u.weights, w) for u in updates}}
    for u in updates:
        for path, classes in u.prototypes.items():
            for j, P in classes.items():
                longest = torch.atleast_2d(P).double().norm(dim=1).max().item()
                lengths.setdefault(f"prototype of class {j} on the {path}", {})[u.site] = longest
                of_any = lengths.setdefault(f"longest prototype on the {path}", {})
                of_any[u.site] = max(longest, of_any.get(u.site, 0.0))
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
    """Return the updates with their n lowered where a site's share n_m / n would exceed `most`.

    What a site loses goes to the others in proportion to their n. most: the key `max_share`; with fewer
    than 1 / most sites all shares are equal. Source: ours.
    """
    n, capped = {u.site: u.n for u in updates}, set()
    if most * len(updates) <= 1:
        return [u._replace(n=1) for u in updates]
    while True:
        free = sum(value for site, value in n.items() if site not in capped)
        room = 1 - most * len(capped)
        over = {site for site, value in n.items() if site not in capped and value / free * room > most}
        if not over:
            break
        capped |= over
    return [u._replace(n=most * free / room) if u.site in capped else u for u in updates]
