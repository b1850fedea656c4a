"""The folder that predict.py writes to: what it writes is listed there, and no other file is replaced."""

import hashlib
import json
import os
import re
from pathlib import Path

from config import BadInput
from rounds.checkpoint import save

LIST = "prediction_files.json"  # {file below the folder: SHA-256 of what was written, null while a call runs}
TABLE, STATISTICS = "prediction.csv", "statistics.pt"
SHEET = re.compile(r"sheet_\d+\.png")


class OutputFolder:
    """A folder of predictions, new or of an earlier call, which is gone on with, also after a kill."""

    def __init__(self, path, inputs, names):
        """Make the folder. inputs: the files to predict; names: what may be written, below the folder. Raises
        BadInput, before anything is written, if that could replace a file that predict.py did not write."""
        self.path, self.written = path, {}
        self.earlier, self.names = listed_in(path), {STATISTICS, TABLE, *names}
        check_targets(path, self.earlier, {file.resolve() for file in inputs}, sorted(self.names))
        path.mkdir(parents=True, exist_ok=True)
        self.write_list(self.earlier | dict.fromkeys(sorted(self.names)))
        for part in path.rglob("*.part"):  # what a killed call left half written
            if part.name.startswith(LIST) or str(part.relative_to(path)).rsplit(".", 2)[0] in self.earlier:
                part.unlink(missing_ok=True)
        (path / TABLE).unlink(missing_ok=True)  # it comes last, so a folder with a table is complete

    def write_list(self, listed):
        """Write the list of the files that are predict.py's own."""
        save(self.path / LIST, (json.dumps(listed, indent=1) + "\n").encode())

    def save(self, name, content):
        """Write bytes to the file `name` below the folder, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        save(target, content)
        self.written[str(name)] = hashlib.sha256(content).hexdigest()

    def finish(self):
        """Remove what earlier calls wrote of these inputs and this one did not, and old sheets of pictures.
        Return what they wrote of other inputs, which stays: {name below the folder: SHA-256}."""
        of_call = self.names | {name for name in self.earlier if SHEET.fullmatch(name)}
        for name in of_call - self.written.keys() - {STATISTICS}:
            (self.path / name).unlink(missing_ok=True)
        others = {name: mark for name, mark in self.earlier.items()
                  if name not in of_call and os.path.lexists(self.path / name)}
        self.write_list(others | self.written | {STATISTICS: None})
        return others


def listed_in(folder):
    """Return {file below a folder: SHA-256 or None} as predict.py listed it there, {} if there is no list;
    raises BadInput for a list that is damaged or leads out of the folder."""
    file = folder / LIST
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_bytes())
        right = isinstance(listed, dict) and not any(
            Path(name).is_absolute() or ".." in Path(name).parts for name in listed)
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise BadInput(f"{file}: is no list that predict.py wrote, choose another out=FOLDER")
    return listed


def check_targets(path, listed, inputs, names):
    """Raise BadInput if a folder is none or holds files and no list, if one of `names` below it is an input,
    or a file that is not listed, or if a listed file is not what was written any more. inputs: resolved."""
    advice = "move it away, or choose another out=FOLDER"
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file, choose another out=FOLDER")
    names_there = [file.name for file in path.iterdir()] if path.is_dir() else []
    held = [name for name in names_there if not name.startswith((".", LIST))]
    if held and not (path / LIST).is_file():
        raise BadInput(f"{path}: holds other files, such as {min(held)}; choose another out=FOLDER")
    for target, name in ((path / name, name) for name in names):
        if target.resolve() in inputs:
            raise BadInput(f"{target}: is an input and would be replaced; choose another out=FOLDER")
        if os.path.lexists(target) and name not in listed:
            raise BadInput(f"{target}: was not written by predict.py; {advice}")
    for target, mark in ((path / name, mark) for name, mark in listed.items()):
        if mark and target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() != mark:
            raise BadInput(f"{target}: was changed since predict.py wrote it; {advice}")
