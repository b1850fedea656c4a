"""The folder that predict.py writes to: what it writes is listed there, and no other file is replaced; and
how the outputs of each input are called, so that no two of them share a name."""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path

from config import BadInput
from rounds.checkpoint import save
from sites.layouts import look, stem_of

LIST = "prediction_files.json"  # {file below the folder: SHA-256 of what was written, null while a call runs}
TABLE, STATISTICS = "prediction.csv", "statistics.pt"
SHEET = re.compile(r"sheet_\d+\.png")
RESERVED = re.compile("|".join([SHEET.pattern, *map(re.escape, (LIST, STATISTICS, TABLE))]))
ROWS = 8  # inputs on a sheet of pictures


class OutputFolder:
    """A folder of predictions, new or of an earlier call, which is gone on with, also after a kill."""

    def __init__(self, path, inputs, names):
        """Make the folder. inputs: the files to predict; names: what may be written, below the folder. Raises
        BadInput, before anything is written, if that could replace a file that predict.py did not write."""
        self.path, self.written = path, {}
        self.earlier, self.names = listed_in(path), {STATISTICS, TABLE, *map(str, names)}
        check_targets(path, self.earlier, {file.resolve() for file in inputs}, self.names)
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
        Return the names of what they wrote of other inputs, which stays."""
        of_call = self.names | set(filter(SHEET.fullmatch, self.earlier))
        for name in of_call - self.written.keys() - {STATISTICS}:
            (self.path / name).unlink(missing_ok=True)
        others = {name: mark for name, mark in self.earlier.items()
                  if name not in of_call and os.path.lexists(self.path / name)}
        self.write_list(others | self.written | {STATISTICS: None})
        return list(others)


def listed_in(folder):
    """Return {file below a folder: SHA-256 or None} as predict.py listed it there, {} if there is no list;
    raises BadInput for a list that is damaged or leads out of the folder."""
    file = folder / LIST
    try:
        listed = dict(json.loads(file.read_bytes())) if file.is_file() else {}
        inside = not any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed)
    except (TypeError, ValueError, RecursionError):
        inside = False
    if not inside:
        raise BadInput(f"{file}: is no list that predict.py wrote, choose another out=FOLDER")
    return listed


def check_targets(path, listed, inputs, names):
    """Raise BadInput if a folder is none or holds files and no list, if one of `names` below it is an input,
    or a file that is not listed, or if a listed file is not what was written any more. inputs: resolved."""
    other = "choose another out=FOLDER"
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file, {other}")
    held = [file.name for file in path.glob("*") if not file.name.startswith((".", LIST))]
    if held and not (path / LIST).is_file():
        raise BadInput(f"{path}: holds other files, such as {min(held)}; {other}")
    for name in sorted(names | listed.keys()):
        target, mark = path / name, listed.get(name)
        if name in names and target.resolve() in inputs:
            raise BadInput(f"{target}: is an input and would be replaced; {other}")
        if name not in listed and os.path.lexists(target):
            raise BadInput(f"{target}: was not written by predict.py; move it away, or {other}")
        if mark and target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() != mark:
            raise BadInput(f"{target}: was changed since predict.py wrote it; move it away, or {other}")


# ---- Names ----

def output_names(files, path, ending):
    """Return {file: its mask's path below the output folder}: the input's with another ending. Inputs that
    differ in their endings alone keep them; what would still share a name gets a number."""
    top, names = path if path.is_dir() else path.parent, {}
    full = {file: file.relative_to(top) for file in files}
    short = {file: str(name.parent / stem_of(name)) for file, name in full.items()}
    number = Counter(map(look, short.values()))
    taken = {look(str(folder)) for name in full.values() for folder in name.parents}  # names of folders
    for file, name in full.items():
        stems = [short[file]] if number[look(short[file])] == 1 else []
        for stem in itertools.chain(stems, [name], (f"{name}_{i}" for i in itertools.count(2))):
            names[file] = Path(f"{stem}{ending}")
            used = {look(str(one)) for one in companions(names[file])}
            if used.isdisjoint(taken) and not any(map(RESERVED.fullmatch, used)):
                break
        taken |= used
    return names


def companions(mask):
    """Return all that may be written of an input, by its mask's path: the mask, the probabilities, and of two
    classes a picture of them."""
    return mask, Path(f"{mask}.npz"), mask.with_name(f"{mask.stem}_probability.png")


def sheet_name(number):
    """Return the name of the sheet of pictures on which input `number`, from 1, is."""
    return f"sheet_{-(-number // ROWS):03}.png"


def names_of(masks):
    """Return all that may be written of inputs, by their masks' paths: what lies beside these, and sheets."""
    return [*itertools.chain(*map(companions, masks)), *map(sheet_name, range(1, len(masks) + 1))]
