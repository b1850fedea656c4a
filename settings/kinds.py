"""Kinds of settings: each takes a value from YAML and returns it typed, or raises ValueError that says
what it wants."""

import math
import re


def choice(*words):
    """Return the kind: one of the words."""
    def read(value):
        if value not in words:
            raise ValueError("expected " + " or ".join(words))
        return value
    return read


def text(value):
    """The kind: text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected text (put quotes around a number)")
    return value


def flag(value):
    """The kind: true or false."""
    if type(value) is not bool:
        raise ValueError("expected true or false")
    return value


def number(least=-math.inf, above=-math.inf):
    """Return the kind: a finite number of at least `least`, above `above`."""
    def read(value):
        try:  # YAML 1.1 reads 1e-4 as text, so text that is a number counts as one
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if not math.isfinite(result) or result < least or result <= above:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}"
            raise ValueError("expected a number" + bound)
        return result
    return read


def whole(least, multiple=1):
    """Return the kind: a whole number of at least `least`, a multiple of `multiple`."""
    def read(value):
        if type(value) is not int or not least <= value < 2**63 or value % multiple:
            rule = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise ValueError(f"expected a whole number of at least {least}{rule}")
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


def pattern(value):
    """The kind: a regular expression with a group 1."""
    try:
        groups = re.compile(text(value)).groups
    except re.error as problem:
        raise ValueError(f"is no regular expression ({problem})") from None
    if not groups:
        raise ValueError("expected a regular expression whose group 1, in (), is the case")
    return value


def device_name(value):
    """The kind: a torch device, or auto."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("expected auto, cpu, cuda or cuda:0")
    return value
