"""Generated sites, so that everything runs without data: `data: demo`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from config import BadInput


def folder_of(task):
    """Return where the generated sites of a task lie."""
    return Path("data") / f"demo_{task}"


def ensure(task):
    """Return the folder of a task's generated sites, written if it is not there yet; raises BadInput."""
    folder = folder_of(task)
    if folder.exists():
        return folder
    from sites import scenes  # a run on real data does not load the generator
    print(f"generating sites for task {task} in {folder}")
    try:
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as part:  # renamed when it is whole
            scenes.write_sites(task, Path(part, "sites"))
            Path(part, "sites").rename(folder)
    except OSError as problem:
        if not folder.exists():  # else another run was quicker
            raise BadInput(f"{folder}: cannot be written ({problem.strerror}), make room or set data "
                           "to a folder of your own") from None
    return folder
