"""What an answer may be made of: names, kinds, sizes and ranges, checked before any of it is decoded."""

import re

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from config import class_name
from rounds.run_folder import size_in_bytes
from settings.kinds import text

LONGEST_NAME, LONGEST_PROBLEM = 80, 400
UNSEEN = re.compile("[,\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
                    "\U000e0100-\U000e01ef]")  # letters that print as nothing, and the comma of a list
HEAD = 1024                      # bytes of an array's own header, at most
MOST_DISTANCE = 1e9              # px or mm
UPDATE = {"weights": ArrayRecord, "prototypes": ArrayRecord, "losses": MetricRecord, "scalars": MetricRecord}
LARGEST = {"dice": 1.0, "hd95": MOST_DISTANCE, "assd": MOST_DISTANCE}  # {name: largest}


class Misfit(Exception):
    """An answer is not what was asked for; the text says in what."""


def name_of(reply):
    """Return the site's name in a reply; raises Misfit if it has none that can be used."""
    record = reply.content.get("site")
    if not isinstance(record, ConfigRecord) or not set(record) <= {"name", "problem"} or "name" not in record:
        raise Misfit("its answer does not say which site it is")
    try:
        name = text(record["name"])
    except ValueError:
        raise Misfit("its name is no text of one line") from None
    if len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip() \
            or UNSEEN.search(name):
        raise Misfit(f"its name is no printable text of at most {LONGEST_NAME} letters without a comma")
    return name


def problem_of(reply):
    """Return what a site says went wrong there, cut to a line, or None."""
    problem = reply.content["site"].get("problem")
    return None if problem is None else str(problem)[:LONGEST_PROBLEM]


def check_records(content, kinds, beside=()):
    """Raise Misfit unless a reply has just the records {name: kind}, `site` and perhaps those of `beside`."""
    found = {name: type(record) for name, record in content.items() if name not in ("site", *beside)}
    if found != kinds:
        raise Misfit(f"its answer has the records {', '.join(sorted(found))[:LONGEST_PROBLEM] or 'none'}, "
                     f"not {', '.join(sorted(kinds))}")


def check_weight_bytes(record, like):
    """Raise Misfit unless a record is one array of as many bytes as the tensors {name: tensor} have."""
    size = size_in_bytes(like)
    if set(record) != {"bytes"} or not is_array(record["bytes"], (size,), "uint8"):
        raise Misfit(f"its weights are not the {size} bytes of the network's")


def is_array(array, shape, dtype):
    """Return whether an array says that it is of this shape and type, and is no larger than that."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return (tuple(array.shape), array.dtype, array.stype) == (shape, dtype, "numpy.ndarray") \
        and len(array.data) <= size + HEAD


def check_vectors(record, fields, n):
    """Raise Misfit unless a record's arrays can be prototypes: PATH/CLASS, float32, of a possible number."""
    keys = {f"{path}/{j}": path for path in fields.prototypes for j in range(fields.classes)}
    for key, array in record.items():
        if key not in keys:
            raise Misfit(f"it has prototypes of {key[:40]!r}, which the method does not have")
        D, several = fields.prototypes[keys[key]]
        rows = array.shape[0] if several and len(array.shape) == 2 and 1 <= array.shape[0] <= n else 0
        if not is_array(array, (rows, D) if several else (D,), "float32"):
            raise Misfit(f"its prototypes of the {keys[key]} are not vectors of {D} numbers")


def check_numbers(record, names, what):
    """Raise Misfit unless a record holds one number each of these names."""
    if set(record) != set(names) or not all(type(value) in (int, float) for value in record.values()):
        raise Misfit(f"its {what} are not one number each of {', '.join(sorted(names))}")


# ---- Scores ----

def classes_of(config):
    """Return the names of the foreground classes whose scores travel apart: of several, none of one."""
    return [class_name(config, j) for j in range(1, config.classes)] if config.classes > 2 else []


def check_scores(record, config):
    """Raise Misfit unless a record is scores of a site: of all its cases, in range, or of none."""
    if not isinstance(record, MetricRecord):
        raise Misfit("its scores cannot be read")
    rest = dict(record)
    cases = rest.get("cases")
    for prefix in ("", *(f"{j}/" for j in classes_of(config))):
        names = [name for name in (*LARGEST, "misses", "cases") if f"{prefix}{name}" in rest]
        row = {name: rest.pop(f"{prefix}{name}") for name in names}
        most = cases * max(1, config.classes - 1) if type(cases) is int else 0
        if type(row.get("cases")) is not int or not 0 <= row["cases"] <= 10**9 or row["cases"] != cases:
            raise Misfit("its scores do not count its cases")
        counted = type(row.get("misses")) is int and 0 <= row["misses"] <= most
        if cases and not (counted and "dice" in row):
            raise Misfit("its scores lack Dice or misses")
        if not cases and len(row) > 1:
            raise Misfit("it has scores of no case")
        for name, largest in LARGEST.items():
            if name in row and not (type(row[name]) in (int, float) and 0 <= row[name] <= largest):
                raise Misfit(f"its {name} is not a number from 0 to {largest:g}")
    if rest:
        raise Misfit(f"it has scores of {min(rest)[:40]!r}, which nobody asked for")
