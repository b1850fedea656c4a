"""The links of docs/method.md to lines of code: python -m tests.method_links --write mends their numbers."""

import re
import sys

from test_fedbcs import HERE

PAGE = HERE / "docs" / "method.md"
LINK = re.compile(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")


def line_of(name, file):
    """Return the number of the line of a file on which the function or class `name` begins; raises ValueError
    unless there is exactly one."""
    lines = (HERE / file).read_text().splitlines()
    found = [n for n, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)]
    if len(found) != 1:
        raise ValueError(f"docs/method.md: {file} has {len(found)} functions {name}; mend the link's text")
    return found[0]


def with_right_numbers(text):
    """Return the page's text with the number of every link set to the line of its function."""
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{line_of(m[1], m[2])})", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.method_links --write")
    PAGE.write_text(with_right_numbers(PAGE.read_text()))
