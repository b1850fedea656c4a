"""Generated sites, so that everything runs without data: `data: demo`."""

import os
import shutil
from pathlib import Path

from config import BadInput


def folder_of(task):
    """Return where the generated sites of a task lie."""
    return Path("data") / f"demo_{task}"


def ensure(task):
    """Return the folder of the generated sites of a task, which are generated if it is not there yet;
    raises BadInput if the disk does not take them."""
    folder = folder_of(task)
    if folder.exists():
        return folder
    from sites import scenes  # a run on real data does not load the generator
    print(f"generating sites for task {task} in {folder}")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")  # renamed when it is whole
    try:
        scenes.write_sites(task, part)
        part.rename(folder)
    except OSError as problem:
        if not folder.exists():  # else another run was quicker
            raise BadInput(f"{folder}: cannot be written ({problem.strerror}), make room or set data "
                           "to a folder of your own") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
