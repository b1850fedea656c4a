"""Which files beside new images are masks, so that they are not predicted."""

import contextlib
import csv
import re

from sites.layouts import look
from sites.names import PREFIX, SUFFIX, Name, find_image, index_of, role_of
from sites.table import decoded, find_file, is_class


def split_by_name(files, top):
    """Return (pictures, masks, masks of no picture) of files below `top`, by their names alone."""
    names = [Name(file, top) for file in files]
    suspects = {name for name in names if SUFFIX.fullmatch(name.stem) or PREFIX.fullmatch(name.stem)}
    pictures = [name for name in names if name not in suspects]
    known = index_of(pictures)
    masks = {name for name in suspects if find_image(name, known)}
    return [[name.path for name in part] for part in (pictures, masks, suspects - masks)]


def is_of_masks(folders):
    """Return whether files in such folders, a path's parts, are masks. Those that nnU-Net calls imagesTs are
    for a prediction, so they are not."""
    last = look(folders[-1]) if folders else ""
    return role_of(folders) == "mask" or last == "labelsts" or re.match("gt_", last) is not None


def named_masks(folder):
    """Return the files that a folder's list.txt, or a table with a column mask or mask_1, names as masks."""
    words = []
    for file in (folder / "list.txt", *sorted(folder.glob("*.[cC][sS][vV]"))):
        read = masks_in_list if file.name == "list.txt" else masks_in_table
        with contextlib.suppress(OSError, ValueError, csv.Error):  # it is something else
            words += read(decoded(file.read_bytes()).splitlines()) if file.is_file() else []
    return [find_file(folder, word.strip()).resolve() for word in words if word.strip() and "\0" not in word]


def masks_in_list(lines):
    """Return the second words of the lines 'image mask' of a list.txt."""
    pairs = [line.strip().split("\t" if "\t" in line else None) for line in lines]
    return [pair[1] for pair in pairs if len(pair) == 2 and not pair[0].startswith("#")]


def masks_in_table(lines):
    """Return what stands in the columns mask, mask_1 .. of a table, several masks joined by ';'. It may lack
    what a training needs."""
    if not lines or "mask" not in lines[0].lower():
        return []
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count))
    return [word for row in rows for key, value in row.items()
            if isinstance(value, str) and (look(key or "") == "mask" or is_class(look(key or "")))
            for word in value.split(";")]
