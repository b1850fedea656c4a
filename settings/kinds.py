"""Kinds of settings: each takes a value from YAML and returns it typed, or raises ValueError that says
what it wants."""

import math
import re
from pathlib import Path


def choice(*words):
    """Return the kind: one of the words."""
    def read(value):
        if value not in words:
            raise ValueError("expected " + " or ".join(words))
        return value
    return read


def text(value):
    """The kind: text that is not empty, without control characters."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected text (put quotes around a number)")
    if len(value) > 4096 or any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError("expected text of one line")
    return value


def path(value):
    """The kind: a path; ~ is the home folder."""
    try:
        return str(Path(text(value)).expanduser())
    except RuntimeError:
        raise ValueError("expected a path whose ~ is somebody's home folder") from None


def flag(value):
    """The kind: true or false."""
    if type(value) is not bool:
        raise ValueError("expected true or false")
    return value


def number(least=-math.inf, above=-math.inf, most=1e30):
    """Return the kind: a number of at least `least`, above `above`, at most `most`."""
    def read(value):
        try:  # YAML 1.1 reads 1e-4 as text, so text that is a number counts as one
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if not least <= result <= most or result <= above:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}"
            raise ValueError(f"expected a number{bound} and at most {most:g}")
        return result
    return read


def whole(least, multiple=1, most=10**9):
    """Return the kind: a whole number from `least` to `most`, a multiple of `multiple`."""
    def read(value):
        if type(value) is not int or not least <= value <= most or value % multiple:
            rule = f" that is a multiple of {multiple}" if multiple > 1 else ""
            raise ValueError(f"expected a whole number of at least {least} and at most {most}{rule}")
        return value
    return read


def or_none(kind):
    """Return the kind: `none`, which is None, or another kind."""
    def read(value):
        return None if value == "none" else kind(value)
    return read


def level_list(value):
    """The kind: a list of the levels that are aligned."""
    if not isinstance(value, list) or not value or any(type(k) is not int for k in value) \
            or not set(value) <= {0, 1, 2} or len(set(value)) < len(value):
        raise ValueError("expected a list of at least one of the levels 0, 1, 2, such as [0, 1, 2]")
    return sorted(value)


def names(value):
    """The kind: a list of different names."""
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        raise ValueError("expected a list of different names, such as [disc, cup]")
    return [text(name) for name in value]


def pattern(value):
    """The kind: a regular expression with a group 1."""
    try:
        groups = re.compile(text(value)).groups
    except (re.error, RecursionError, OverflowError) as problem:
        raise ValueError(f"is no regular expression ({problem})") from None
    if not groups:
        raise ValueError("expected a regular expression whose group 1, in (), is the case")
    return value


def device_name(value):
    """The kind: a torch device, or auto."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError("expected auto, cpu, cuda or cuda:0")
    return value


# ---- In messages ----

def brief(words):
    """Return a key, or what stands in its place, cut for a message."""
    return words[:80] if isinstance(words, str) else shown(words)


def shown(value):
    """Return a wrong value for a message, cut to a length that fits on a screen."""
    try:
        words = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        words = f"one of type {type(value).__name__} that is too long to show"
    return words if len(words) <= 80 else f"{words[:77]}..."
