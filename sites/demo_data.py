"""Generated sites, so that everything runs without data: `data: demo`."""

import os
import shutil
from pathlib import Path

from config import BadInput
from sites.scenes import write_discs, write_nuclei, write_prostate

WRITE = {"nuclei": write_nuclei, "prostate": write_prostate, "images": write_discs, "volumes": write_prostate}


def folder_of(task):
    """Return where the generated sites of a task lie."""
    return Path("data") / f"demo_{task}"


def clear_killed(folder):
    """Remove what processes that are gone left half written beside `folder`."""
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        try:
            os.kill(int(part.name.split(".")[-2]), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(part, ignore_errors=True)
        except OSError:  # it is another user's process, and alive
            pass


def ensure(task):
    """Return the folder of the generated sites of a task, generated if it is not there yet.

    Written under a temporary name, then renamed, so that what is there is whole.
    Raises BadInput if the disk does not take it.
    """
    folder = folder_of(task)
    clear_killed(folder)
    if folder.exists():
        return folder
    print(f"generating sites for task {task} in {folder}")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        WRITE[task](part)
        part.rename(folder)
    except OSError as problem:
        if folder.exists():  # another run was quicker
            return folder
        raise BadInput(f"{folder}: cannot be written ({problem.strerror}), make room or set data "
                       "to a folder of your own") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
