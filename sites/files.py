"""What goes wrong when a file is opened, in its own words."""

import contextlib
import struct
import zlib
from pathlib import Path

import nibabel
from nibabel.filebasedimages import ImageFileError

from config import BadInput

# What Pillow, nibabel and gzip raise on files that are truncated or foreign.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, OverflowError, KeyError, IndexError,
              AttributeError, AssertionError, struct.error, zlib.error, ImageFileError,
              nibabel.spatialimages.HeaderDataError, nibabel.wrapstruct.WrapStructError)


def check_regular(file):
    """Raise BadInput unless `file` is a regular file; a pipe, for one, would be waited for."""
    if not Path(file).exists():
        raise BadInput(f"{file}: there is no such file; restore it, or give another")
    if not Path(file).is_file():
        raise BadInput(f"{file}: is no regular file, remove it")


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


def why(problem, kind):
    """Return why a file could not be read: the system's reason, or that it is no such `kind`."""
    if isinstance(problem, OSError) and problem.errno is not None:
        return f"cannot be opened ({problem.strerror}), check it and its permissions"
    reason = " ".join(str(problem).split()) or type(problem).__name__
    return f"cannot be read as {kind} ({reason[:200]}), export it again"
