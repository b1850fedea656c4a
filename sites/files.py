"""What goes wrong when a file is opened, in its own words."""

import contextlib
import sys
from pathlib import Path

from config import BadInput


def check_regular(file):
    """Raise BadInput unless `file` is a regular file; a pipe, for one, would be waited for."""
    if not Path(file).is_file():
        raise BadInput(f"{file}: is no regular file, remove it" if Path(file).exists() else
                       f"{file}: there is no such file; restore it, or give another")


@contextlib.contextmanager
def reading(file, kind):
    """Within it, a file that cannot be read as what it should be, a `kind` in words, is BadInput that says
    why: the system's reason, or the reader's."""
    check_regular(file)
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as problem:  # noqa: BLE001 - what a foreign file raises has no common type
        if isinstance(problem, OSError) and problem.errno is not None:
            raise BadInput(f"{file}: cannot be opened ({problem.strerror}), check its permissions") from None
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise BadInput(f"{file}: cannot be read as {kind} ({reason[:200]}), export it again") from None


@contextlib.contextmanager
def enough_memory(file):
    """Within it, memory that runs out is BadInput that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:  # torch raises the latter
        if isinstance(problem, RuntimeError) and "memory" not in str(problem):
            raise
        raise BadInput(f"{file}: there is not enough memory to read and resize it; close other programs, "
                       "or use smaller files") from None


def warn(name, warnings):
    """Print what is suspicious about a site's files in one line on stderr."""
    if warnings:
        more = f" ({len(warnings)} warnings in all, check_data.py lists them)" * (len(warnings) > 1)
        print(f"warning: {name}: {warnings[0]}{more}", file=sys.stderr, flush=True)
