"""Every key of the settings as a table, for --help."""

import textwrap

from settings.kinds import REQUIRED


def key_table(tables):
    """Return lines of key, default and help of {title: {key: (kind, default, help)}}, from `all_keys`."""
    return "\n".join(line for title, keys in tables.items()
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
