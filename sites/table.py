"""A table of the data, FILE.csv: a line for each image, with its masks, its site, its case and its split.

Columns: image, mask, site, and if wanted case and split. Paths are relative to the file. Several masks of one
image are joined by ; and united; columns mask_1, mask_2, ... in place of mask are the classes 1, 2, ...
"""

import csv
import difflib
import io
import os
import re
from collections import Counter
from pathlib import Path

from config import VOLUMES, BadInput
from sites import demo_data
from sites.advice import format_advice
from sites.files import reading
from sites.layouts import (
    IMAGE_KINDS,
    VOLUME_KINDS,
    Entry,
    Masks,
    as_seen,
    files_of,
    find_pairs,
    is_table,
    list_files,
    stem_of,
    visible,
)
from sites.names import one_mask
from sites.patients import joined

COLUMNS = ("image", "mask", "site", "case", "split")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}
PATIENT = ("patient", "patient_id", "patientid", "subject", "subject_id", "case_id")  # may be what case is


# ---- Reading ----

def list_table(file, task, case_pattern=None):
    """Return {site: [Entry]} of a table, and a list of everything wrong with it, as texts."""
    rows, entries, problems, images, names = read_rows(file), {}, [], {}, {}
    with_cases = any(row.get("case") for _, row in rows)
    for number, row in rows:
        entry, wrong = read_row(Path(file).parent, row, task, with_cases)
        first = entry and images.setdefault(os.path.realpath(entry.image), number)
        if first != number and not wrong:
            wrong = f"names the image of line {first} again; give it one line, and join its masks with ;"
        elif entry and not with_cases and names.setdefault((row["site"], entry.case), number) != number:
            wrong = f"has an image called {entry.case}, as line {names[row['site'], entry.case]} has; fill " \
                    "in the column case, which says whose they are"
        if wrong:
            problems.append(f"{file}: line {number}: {wrong}")
        else:
            entries.setdefault(as_seen(row["site"]), []).append(entry)
    if case_pattern and with_cases:
        problems.append(f"{file}: has the column case, which case_pattern contradicts; leave one out")
    elif case_pattern:
        entries = {site: joined(found, case_pattern, problems) for site, found in entries.items()}
    if not rows:
        problems.append(f"{file}: has no line below its header, add one for each image")
    return dict(sorted(entries.items())), problems


def read_rows(file):
    """Return [(line number, {column: text})] of a table; raises BadInput for what is none, and for a double
    or a missing column."""
    with reading(file, "a table"):
        text = decoded(Path(file).read_bytes())
        own = re.match(r"(?i)\"?sep=.\"?\r?\n", text)  # a line that Excel writes for itself
        text = text[own.end():] if own else text
        separator = max(",;\t", key=text.lstrip().partition("\n")[0].count)
        table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(table.line_num + bool(own), [cell.strip() for cell in row]) for row in table]
    rows = [(number, row) for number, row in rows if any(row)]
    if not rows:
        raise BadInput(f"{file}: is empty, write the columns {', '.join(COLUMNS)} in its first line")
    columns = [as_seen(name).casefold() for name in rows[0][1]]
    check_columns(file, columns)
    for number, row in rows[1:]:
        if any(row[len(columns):]):
            raise BadInput(f"{file}: line {number}: has {len(row)} cells, its header {len(columns)}; put "
                           f"quotes around a cell that holds {separator!r}")
    return [(number, dict(zip(columns, row + [""] * len(columns)))) for number, row in rows[1:]]


def decoded(content):
    """Return the text of a file in UTF-8, in UTF-16 where it begins so, as bytes of names are elsewhere."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    return content.decode("utf-8-sig", "surrogateescape")


def is_class(column):
    """Return whether a column is one of mask_1, mask_2, ..."""
    return re.fullmatch(r"mask_[1-9]\d{0,2}", column) is not None


def check_columns(file, columns):
    """Raise BadInput for a column that is missing, double, or spelt nearly as a known one."""
    wanted = [name for name in ("image", "mask", "site") if name not in columns]
    if "mask" in wanted and any(map(is_class, columns)):
        wanted.remove("mask")
    elif "mask" in columns and any(map(is_class, columns)):
        raise BadInput(f"{file}: has the columns mask and mask_1, keep mask, or the columns of classes alone")
    if wanted:
        raise BadInput(f"{file}: has no column {wanted[0]}; its first line has to name image, mask, site, "
                       f"and if wanted case and split, not {', '.join(columns)[:200]}")
    for name in columns:
        if name and columns.count(name) > 1:
            raise BadInput(f"{file}: has two columns {name}, keep one")
        near = [] if name in COLUMNS or is_class(name) else difflib.get_close_matches(name, COLUMNS, 1, 0.8)
        near = ["case"] if name in PATIENT and "case" not in columns else near
        if near:
            raise BadInput(f"{file}: has a column {name}; call it {near[0]} if it is that, else remove it")


def read_row(folder, row, task, with_cases):
    """Return the Entry of a line and None, or None and what is wrong with it."""
    names = {column: row[column].split(";") for column in row
             if column in ("image", "mask") or (is_class(column) and row[column])}
    names = {column: [name.strip() for name in parts if name.strip()] for column, parts in names.items()}
    empty = next((name for name in ("site", "image", *["case"] * with_cases) if not row[name]), None)
    if empty:
        remedy = "leave the whole column empty" if empty == "case" else "remove the line"
        return None, f"its {empty} is empty, fill it in or {remedy}"
    if re.search(r"^\.|[/\0-\x1f]", row["site"]):
        return None, f"its site {row['site']!r} cannot be a folder's name, rename it"
    image = find_file(folder, row["image"])
    masks = [(find_file(folder, name), int(column[5:]) if is_class(column) else None)
             for column, parts in names.items() if column != "image" for name in parts]
    if not masks:
        return None, "its mask is empty, fill it in or remove the line"
    files = [image, *(file for file, _ in masks)]
    wrong = next(filter(None, (wrong_file(folder, file, task) for file in files)), None)
    if wrong or len(set(map(os.path.realpath, files))) < len(files):
        return None, wrong or "names one file twice, as image and mask or as two masks; mend it"
    mask = Masks(*map(tuple, zip(*masks))) if masks[0][1] else one_mask([file for file, _ in masks])
    return Entry(as_seen(row.get("case") or stem_of(image)), image, mask), None


def find_file(folder, name):
    """Return the path of a name in a table, below a folder; Windows writes it with backslashes."""
    path = folder / name
    if "\\" in name and "\0" not in name and not path.exists():
        path = folder / name.replace("\\", "/")
    return path


def wrong_file(folder, path, task):
    """Return what is wrong with a file that a table names, None if nothing is."""
    if "\0" in str(path):
        return f"{path.name!r} is no file name, mend it"
    shown, inside = as_seen(path), Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    if ".." in path.parts[len(folder.parts):] and not inside:
        return f"{shown} leads out of {folder}; copy the file into it, or write its full path if it is meant"
    if not path.is_file():
        return f"{shown} {'is no regular file' if path.exists() else 'does not exist'}, mend the line"
    kinds, other = (VOLUME_KINDS, IMAGE_KINDS) if task in VOLUMES else (IMAGE_KINDS, VOLUME_KINDS)
    if path.name.lower().endswith(other):
        return f"{shown} is not of task {task}; set task={'images' if task in VOLUMES else 'volumes'}"
    advice = None if path.name.lower().endswith(kinds) else format_advice(path.name)
    return advice and f"{shown} is {advice}"


def table_warnings(file, entries):
    """Return warnings on a table: columns that are not read, and masks that several images share."""
    columns = read_rows(file)[0][1] if entries else ()
    other = [name for name in columns if name and name not in COLUMNS and not is_class(name)]
    masks = Counter(os.path.realpath(mask) for entry in entries for mask in files_of(entry)[1:])
    shared = [mask for mask, number in masks.items() if number > 1]
    return [f"{file}: its column {name} is not read" for name in other] + \
        [f"{file}: {mask} is the mask of {masks[mask]} images" for mask in shared]


def table_splits(config):
    """Return {site: {split: [case]}} of a table's column split, None if it is empty or not there; raises
    BadInput if it is filled in part, has other words, divides a case, or contradicts a setting."""
    file, rows = config.data, read_rows(config.data)
    if not any(row.get("split") for _, row in rows):
        return None
    for key in ("splits", "folds"):
        if getattr(config, key):
            raise BadInput(f"{key}: contradicts the column split of {file}; leave one of the two out")
    found = list_table(file, config.task, config.case_pattern)[0]
    cases = {os.path.realpath(entry.image): entry.case for site in found.values() for entry in site}
    splits, lines = {site: {part: [] for part in ("train", "val", "test")} for site in found}, {}
    for number, row in rows:
        split, site = SPLITS.get(row["split"].casefold()), as_seen(row["site"])
        if split is None:
            raise BadInput(f"{file}: line {number}: its split is {row['split'] or 'empty'}; write train, val "
                           "or test in every line, or in none")
        case = cases.get(os.path.realpath(find_file(Path(file).parent, row["image"])))
        first, before = lines.setdefault((site, case), (number, split))
        if split != before:
            raise BadInput(f"{file}: line {number}: its split is {split}, that of line {first} {before}, and "
                           f"both are of case {case}; give a case one split")
        if first == number and case is not None:
            splits[site][split].append(case)
    return splits


# ---- Writing ----

def write_table(file, config):
    """Write what is found in a data folder, or stands in a table, as a table; return a text that says so. A
    file without a partner gets a line with an empty cell. Raises BadInput if the file exists or cannot be
    written, and for a name that is not FILE.csv."""
    if file.suffix.lower() != ".csv":
        raise BadInput(f"{file}: a table's name ends in .csv, give --write FILE.csv")
    rows, lacking = [], 0
    for site, entries, unpaired in all_found(config):
        rows += [row_of(file, site, entry) for entry in entries]
        rows += [{"site": site, column: relative(file, path), "case": stem_of(path)}
                 for pair in unpaired for column, path in zip(("image", "mask"), pair) if path]
        lacking += len(unpaired)
    classes = sorted({name for row in rows for name in row if is_class(name)}, key=lambda name: int(name[5:]))
    columns = ["image", *(classes or ["mask"]), "site", "case"]
    try:
        with open(file, "x", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            table = csv.DictWriter(stream, columns)
            table.writeheader()
            table.writerows(rows)
    except OSError as problem:
        raise BadInput(f"{file}: cannot be written ({problem.strerror}), give another --write") from None
    mend = f"; fill in the {lacking} empty cells or remove their lines" if lacking else ""
    return f"table of {len(rows)} lines: {file}{mend}; data={file} reads it"


def all_found(config):
    """Yield (site, entries, unpaired files) of a data folder or of a table; raises BadInput if it is none."""
    data = demo_data.ensure(config.task) if config.data == "demo" else config.data
    entries, _ = list_files(data, config.task, config.case_pattern)
    for site in entries:
        folder = next((path for path in visible(data) if as_seen(path.name) == site), None) \
            if not is_table(data) else None
        yield site, entries[site], find_pairs(folder, config.task)[2] if folder else []


def row_of(file, site, entry):
    """Return the line {column: text} of an entry."""
    row = {"image": relative(file, entry.image), "site": site, "case": entry.case}
    labels = entry.mask.labels if isinstance(entry.mask, Masks) else [None]
    for mask, label in zip(files_of(entry)[1:], labels):
        column = f"mask_{label}" if label else "mask"
        row[column] = ";".join(filter(None, (row.get(column), relative(file, mask))))
    return row


def relative(file, path):
    """Return a path as a table writes it: relative to its folder, in full if it lies elsewhere."""
    folder, path = os.path.abspath(Path(file).parent), os.path.abspath(path)
    return os.path.relpath(path, folder) if Path(path).is_relative_to(folder) else path
