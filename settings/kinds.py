"""Kinds of settings: each takes a value from YAML and returns it typed, or raises ValueError that says what
it wants. YAML is read as its author wrote it: what YAML 1.1 would read as something else is refused."""

import math
import re
from pathlib import Path

import yaml

REQUIRED = object()  # in place of a default


class BadInput(Exception):
    """What a user gave cannot be used; the text reads `FILE or KEY: what is wrong, what to do`."""


def expect(right, wanted):
    """Raise ValueError, saying what is wanted, unless a value is right."""
    if not right:
        raise ValueError(f"expected {wanted}")


def choice(*words):
    """Return the kind: one of the words."""
    def read(value):
        expect(value in words, " or ".join(words))
        return value
    return read


def text(value):
    """The kind: text that is not empty, without control characters."""
    expect(isinstance(value, str) and value, "text (put quotes around a number)")
    expect(len(value) <= 4096 and all(ord(c) >= 32 and ord(c) != 127 for c in value), "text of one line")
    return value


def path(value):
    """The kind: a path; ~ is the home folder."""
    try:
        return str(Path(text(value)).expanduser())
    except RuntimeError:
        raise ValueError("expected a path whose ~ is somebody's home folder") from None


def flag(value):
    """The kind: true or false."""
    expect(type(value) is bool, "true or false")
    return value


def number(least=-math.inf, above=-math.inf, most=1e30):
    """Return the kind: a number of at least `least`, above `above`, at most `most`."""
    bound = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"

    def read(value):
        try:  # YAML 1.1 reads 1e-4 as text, so text that is a number counts as one
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        expect(least <= result <= most and result > above, f"a number {bound} and at most {most:g}")
        return result
    return read


def whole(least, multiple=1, most=10**9):
    """Return the kind: a whole number from `least` to `most`, a multiple of `multiple`."""
    rule = f" that is a multiple of {multiple}" if multiple > 1 else ""

    def read(value):
        expect(type(value) is int and least <= value <= most and value % multiple == 0,
               f"a whole number of at least {least} and at most {most}{rule}")
        return value
    return read


def or_none(kind):
    """Return the kind: `none`, which is None, or another kind."""
    return lambda value: None if value == "none" else kind(value)


def level_list(value):
    """The kind: a list of the levels that are aligned."""
    expect(isinstance(value, list) and value and all(type(k) is int and 0 <= k <= 2 for k in value)
           and len(set(value)) == len(value),
           "a list of at least one of the levels 0, 1, 2, such as [0, 1, 2]")
    return sorted(value)


def names(value):
    """The kind: a list of different names."""
    expect(isinstance(value, list) and value and len(set(map(str, value))) == len(value),
           "a list of different names, such as [disc, cup]")
    return [text(name) for name in value]


def interval(value):
    """The kind: two numbers, the lower one first."""
    wanted = "two numbers, the lower one first, such as [-160, 240]"
    expect(isinstance(value, list) and len(value) == 2, wanted)
    try:
        low, high = (number()(bound) for bound in value)
    except ValueError:
        low = high = 0
    expect(low < high, wanted)
    return [low, high]


def pattern(value):
    """The kind: a regular expression with a group 1."""
    try:
        groups = re.compile(text(value)).groups
    except (re.error, RecursionError, OverflowError) as problem:
        raise ValueError(f"is no regular expression ({problem})") from None
    expect(groups, "a regular expression whose group 1, in (), is the case")
    return value


def device_name(value):
    """The kind: a torch device, or auto."""
    expect(isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value),
           "auto, cpu, cuda or cuda:0")
    return value


def shown(value):
    """Return a wrong value for a message, cut to a length that fits on a screen."""
    try:
        words = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        words = f"one of type {type(value).__name__} that is too long to show"
    return words if len(words) <= 80 else f"{words[:77]}..."


# ---- YAML ----

PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][-+]?[0-9]+)?")


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, and the numbers 010 (octal), 1:30 (base 60) and 1_000."""

    def construct_mapping(self, node, deep=False):
        """Return the mapping; raises yaml.YAMLError for a key that stands in it twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0][:80]!r} is given twice, keep one")
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        """Return the number of a scalar; raises yaml.YAMLError if it is not written in plain digits."""
        digits = self.construct_scalar(node)
        if not PLAIN_NUMBER.fullmatch(digits):
            raise yaml.YAMLError(f"{digits[:80]!r} is not a number in plain digits")
        return int(digits) if node.tag.endswith("int") else float(digits)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_number)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_number)
