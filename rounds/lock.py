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
    """Within it this process alone has the run folder `config.out`, which is made if it is not there.

    The lock is the system's own on the file .lock, so it is gone with the process, however that ends. A
    folder in which nothing was written is removed again. Raises BadInput.
    """
    out = Path(config.out)
    check_apart(out, Path(config.data) if config.data != "demo" else folder_of(config.task))
    made = missing_folders(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = take(out / LOCK)
    except FileExistsError:
        raise BadInput(f"{out}: exists already and is no folder, choose another out=FOLDER") from None
    except OSError as problem:
        raise BadInput(f"{out}: cannot be made or used ({problem.strerror}), "
                       "choose another out=FOLDER") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()
            for folder in made:
                folder.rmdir()  # which fails, as it should, for one that holds something
        stream.close()


def take(file):
    """Return the open lock file; raises BadInput if another process has it."""
    while True:
        stream = open(file, "w")  # noqa: SIM115 - it is closed with the lock
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise BadInput(f"{file.parent}: is in use by another process; wait for it, or choose another "
                           "out=FOLDER") from None
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(stream.fileno()).st_ino == os.stat(file).st_ino:
                return stream
        stream.close()  # its owner removed it between the two lines: take the new one


def missing_folders(folder):
    """Return the folders that making `folder` makes, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def check_apart(out, data):
    """Raise BadInput if the run folder lies in the data folder, or the data in it."""
    a, b = out.resolve(), data.resolve()
    if a == b or a.is_relative_to(b):
        raise BadInput(f"{out}: lies in the data folder {data}, choose another out=FOLDER")
    if b.is_relative_to(a):
        raise BadInput(f"{out}: holds the data folder {data}, choose another out=FOLDER")
