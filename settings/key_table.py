"""Every key of the settings as a table, for --help."""

import textwrap

from config import KEYS, METHODS, REQUIRED, method_module


def key_table():
    """Return lines of key, default and help of all keys, and below them those of single methods."""
    methods = {name: getattr(method_module(name)[0], "SETTINGS", {}) for name in METHODS}
    own = {f"method {name}": keys for name, keys in methods.items() if keys}
    return "\n".join(line for title, keys in ({"key": KEYS} | own).items()
                     for line in (f"\n{title:20}default", *lines_of(keys)))


def lines_of(keys):
    """Return the lines of {key: (kind, default, help)}, none wider than 100 characters."""
    lines = []
    for key, (_, default, words) in keys.items():
        shown = "required" if default is REQUIRED else {None: "none", True: "true", False: "false"}.get(
            default if default is None or isinstance(default, bool) else "", str(default))
        first, *rest = textwrap.wrap(words, 66)
        lines += [f"  {key:18}{shown:12}  {first}", *(" " * 34 + line for line in rest)]
    return lines
