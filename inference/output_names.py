"""How the outputs of each input are called, so that no two files of a folder of predictions share a name."""

import itertools
import re
from collections import Counter
from pathlib import Path

from inference.output_folder import LIST, SHEET, STATISTICS, TABLE
from sites.layouts import look

ENDING = re.compile(r"(?i)\.(nii\.gz|[^.]+)$")
ROWS = 8  # inputs on a sheet of pictures
RESERVED = re.compile(SHEET.pattern + "|" + "|".join(map(re.escape, (LIST, STATISTICS, TABLE))))


def output_names(files, path, ending):
    """Return {file: its mask's path below the output folder}: the input's with another ending. Inputs that
    differ in their endings alone keep them; what would still share a name gets a number."""
    top, names = path if path.is_dir() else path.parent, {}
    full = {file: str(file.relative_to(top)) for file in files}
    taken = looks({folder for name in full.values() for folder in Path(name).parents})  # as folders
    short = {file: ENDING.sub("", name) for file, name in full.items()}
    number = Counter(map(look, short.values()))
    for file in files:
        first = short[file] if number[look(short[file])] == 1 else full[file]
        numbered = (f"{full[file]}_{i}" for i in itertools.count(2))
        names[file] = next(name for stem in itertools.chain([first, full[file]], numbered)
                           if is_free(name := Path(stem + ending), taken))
        taken |= looks(companions(names[file]))
    return names


def is_free(mask, taken):
    """Return whether nothing that is written of an input under this name is taken already."""
    used = looks(companions(mask))
    return used.isdisjoint(taken) and not any(map(RESERVED.fullmatch, used))


def looks(paths):
    """Return what is equal of paths that a person, or a file system, takes for one."""
    return {look(str(path)) for path in paths}


def companions(mask):
    """Return all that may be written of an input, by its mask's path: the mask, the probabilities, and of two
    classes a picture of them."""
    return mask, Path(f"{mask}.npz"), picture_of(mask)


def picture_of(mask):
    """Return the path of the picture of probabilities beside a mask's."""
    return mask.with_name(f"{mask.stem}_probability.png")


def sheet_names(files):
    """Return the names of the sheets of pictures of so many files."""
    return [f"sheet_{number:03}.png" for number in range(1, -(-files // ROWS) + 1)]
