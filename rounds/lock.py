"""One process at a time in a run folder."""

import contextlib
import fcntl
import os
from pathlib import Path

from config import BadInput
from sites.demo_data import folder_of

LOCK = ".lock"


@contextlib.contextmanager
def locked(config):
    """Within it this process alone has the run folder `config.out`, which is made, and removed again if
    nothing was written. The lock is the system's own, so it is gone with the process, however that ends."""
    out = Path(config.out)
    check_apart(out, folder_of(config.task) if config.data == "demo" else Path(config.data))
    lock = out / LOCK
    if lock.is_symlink() or lock.exists() and not lock.is_file():  # it would empty a file, or wait for ever
        raise BadInput(f"{lock}: is no regular file, remove it")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "a")  # noqa: SIM115 - it is closed with the lock
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(stream.fileno()).st_nlink == 0:  # its owner removed it since it was opened
            raise BlockingIOError
    except OSError as problem:
        reason = "is in use by another process; wait for it, or" if isinstance(problem, BlockingIOError) \
            else f"cannot be made or used ({problem.strerror}),"
        raise BadInput(f"{out}: {reason} choose another out=FOLDER") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
            for folder in made:
                folder.rmdir()  # which fails, as it should, for one that holds something
        stream.close()


def check_apart(out, data):
    """Raise BadInput if the run folder lies in the data folder, or the data in it."""
    for inner, outer, words in ((out, data, "lies in"), (data, out, "holds")):
        if inner.resolve().is_relative_to(outer.resolve()):
            raise BadInput(f"{out}: {words} the data folder {data}, choose another out=FOLDER")
