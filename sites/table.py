"""A table of the data, FILE.csv, a line for each image. Columns: image, mask, site, and if wanted case and
split. Paths are relative to the file. Several masks of one image are joined by ; and united; columns mask_1,
mask_2, ... in place of mask are the classes 1, 2, ..."""

import csv
import difflib
import io
import os
import re
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path

from config import BadInput
from sites import demo_data
from sites.advice import format_advice
from sites.files import reading
from sites.layouts import Entry, as_seen, is_table, list_files, list_site, stem_of, visible
from sites.patients import joined
from sites.readers import SPLITS

COLUMNS = ("image", "mask", "site", "case", "split")
SPLIT_WORDS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}  # of SPLITS


# ---- Reading ----

def list_table(file, task, case_pattern=None):
    """Return {site: [Entry]} of a table, and a list of everything wrong with it, as texts."""
    rows, entries, problems, lines = read_rows(file), defaultdict(list), [], {}
    with_cases = any(row.get("case") for _, row in rows)
    for number, row in rows:
        try:
            entry = read_row(Path(file).parent, row, task, with_cases)
            first = lines.setdefault(os.path.realpath(entry.image), number)
            if first != number:
                raise BadInput(f"names the image of line {first} again; give it one line, masks joined by ;")
            first = lines.setdefault((row["site"], entry.case), number)
            if first != number and not with_cases:
                raise BadInput(f"has an image called {entry.case}, as line {first} has; fill in the column "
                               "case, which says whose they are")
            entries[as_seen(row["site"])].append(entry)
        except BadInput as wrong:
            problems.append(f"{file}: line {number}: {wrong}")
    if case_pattern and with_cases:
        problems.append(f"{file}: has the column case, which case_pattern contradicts; leave one out")
    elif case_pattern:
        entries = {site: joined(found, case_pattern, problems) for site, found in entries.items()}
    if not rows:
        problems.append(f"{file}: has no line below its header, add one for each image")
    return dict(sorted(entries.items())), problems


def read_rows(file):
    """Return [(line number, {column: text})] of a table; raises BadInput for what is none, and for a column
    that is missing, double, or spelt nearly as a known one."""
    with reading(file, "a table"):
        text = decoded(Path(file).read_bytes())
        own = re.match(r"(?i)\s*\"?sep=[^\r\n]*\s*", text)  # a line that Excel writes for itself
        separator = max(",;\t", key=text[own.end() if own else 0:].lstrip().partition("\n")[0].count)
        table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        rows = [(table.line_num, [cell.strip() for cell in row]) for row in table]
    rows = [(number, row) for number, row in rows if any(row)][bool(own):]
    columns = [as_seen(name).casefold() for name in (rows[0][1] if rows else ())]
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
    classes = any(map(is_class, columns))
    if classes and "mask" in columns:
        raise BadInput(f"{file}: has the columns mask and mask_1, keep mask, or the columns of classes alone")
    for name in ("image", "site") if classes else ("image", "mask", "site"):
        if name not in columns:
            raise BadInput(f"{file}: has no column {name}; its first line has to name image, mask, site, and "
                           f"if wanted case and split, not {', '.join(columns)[:200]}")
    for name in filter(None, columns):
        if columns.count(name) > 1:
            raise BadInput(f"{file}: has two columns {name}, keep one")
        near = [] if name in COLUMNS or is_class(name) else difflib.get_close_matches(name, COLUMNS, 1, 0.8)
        if "case" not in columns and re.fullmatch("(patient|subject|case)(_?id)?", name):
            near = ["case"]
        if near:
            raise BadInput(f"{file}: has a column {name}; call it {near[0]} if it is that, else remove it")


def read_row(folder, row, task, with_cases):
    """Return the Entry of a line; raises BadInput that says what is wrong with it."""
    masks = [(find_file(folder, name.strip()), int(column[5:]) if is_class(column) else None)
             for column in row if column == "mask" or is_class(column)
             for name in row[column].split(";") if name.strip()]
    empty = [name for name in ["site", "image", "mask"] + ["case"] * with_cases
             if not (masks if name == "mask" else row[name])]
    if empty:
        remedy = "leave the whole column empty" if empty[0] == "case" else "remove the line"
        raise BadInput(f"its {empty[0]} is empty, fill it in or {remedy}")
    if re.search(r"^\.|[/\0-\x1f]", row["site"]):
        raise BadInput(f"its site {row['site']!r} cannot be a folder's name, rename it")
    files = [find_file(folder, row["image"]), *(file for file, _ in masks)]
    for file in files:
        check_file(folder, file, task)
    if len(set(map(os.path.realpath, files))) < len(files):
        raise BadInput("names one file twice, as image and mask or as two masks; mend it")
    labels = tuple(label for _, label in masks if label)
    return Entry(as_seen(row.get("case") or stem_of(files[0])), files[0], tuple(files[1:]), labels)


def find_file(folder, name):
    """Return the path of a name in a table, below a folder; Windows writes it with backslashes."""
    path = folder / name
    return folder / name.replace("\\", "/") if "\\" in name and not path.exists() else path


def check_file(folder, path, task):
    """Raise BadInput that says what is wrong with a file that a table names."""
    name = as_seen(path).replace("\0", "\\0")
    inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    if ".." in path.parts[len(folder.parts):] and not inside:
        raise BadInput(f"{name} leads out of {folder}; copy the file into it, or write its full path")
    if not path.is_file():
        raise BadInput(f"{name} {'is no regular file' if path.exists() else 'does not exist'}, mend the line")
    if advice := format_advice(path.name, task):
        raise BadInput(f"{name} is {advice}")


def table_warnings(file, entries):
    """Return warnings on a table: columns that are not read, and masks that several images share."""
    columns = read_rows(file)[0][1] if entries else ()
    other = [name for name in columns if name and name not in COLUMNS and not is_class(name)]
    masks = Counter(os.path.realpath(mask) for entry in entries for mask in entry.masks)
    return [f"{file}: its column {name} is not read" for name in other] + [
        f"{file}: {mask} is the mask of {number} images" for mask, number in masks.items() if number > 1]


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
    cases = {os.path.realpath(entry.image): (site, entry.case) for site in found for entry in found[site]}
    splits, lines = {site: {part: [] for part in SPLITS} for site in found}, {}
    for number, row in rows:
        split = SPLIT_WORDS.get(row["split"].casefold(), row["split"].casefold())
        if split not in SPLITS:
            raise BadInput(f"{file}: line {number}: its split is {row['split'] or 'empty'}; write train, val "
                           "or test in every line, or in none")
        site, case = cases[os.path.realpath(find_file(Path(file).parent, row["image"]))]
        first, before = lines.setdefault((site, case), (number, split))
        if split != before:
            raise BadInput(f"{file}: line {number}: its split is {split}, that of line {first} {before}, and "
                           f"both are of case {case}; give a case one split")
        if first == number:
            splits[site][split].append(case)
    return splits


# ---- Writing ----

def write_table(file, config):
    """Write what is found in a data folder, or stands in a table, as a table; return a text that says so. A
    file without a partner gets a line with an empty cell. Raises BadInput if that cannot be written."""
    data = demo_data.ensure(config.task) if config.data == "demo" else config.data
    folders = {} if is_table(data) else {as_seen(path.name): path for path in visible(data)}
    rows, lacking = [], 0
    for site, entries in list_files(data, config.task, config.case_pattern)[0].items():
        for entry in entries:
            row = {"image": relative(file, entry.image), "site": site, "case": entry.case}
            for mask, label in zip_longest(entry.masks, entry.labels):
                column = f"mask_{label}" if label else "mask"
                row[column] = ";".join(filter(None, (row.get(column), relative(file, mask))))
            rows.append(row)
        for pair in list_site(folders[site], config.task)[2] if folders else []:
            column, path = next((name, path) for name, path in zip(("image", "mask"), pair) if path)
            rows.append({"site": site, column: relative(file, path), "case": stem_of(path)})
            lacking += 1
    masks = sorted({name for row in rows for name in row if name.startswith("mask")} or {"mask"},
                   key=lambda name: int(name[5:] or 0))
    try:
        with open(file, "x", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            table = csv.DictWriter(stream, ["image", *masks, "site", "case"])
            table.writeheader()
            table.writerows(rows)
    except OSError as problem:
        raise BadInput(f"{file}: cannot be written ({problem.strerror}), give another --write") from None
    mend = f"; fill in the {lacking} empty cells or remove their lines" if lacking else ""
    return f"table of {len(rows)} lines: {file}{mend}; data={file} reads it"


def relative(file, path):
    """Return a path as a table writes it: relative to its folder, in full if it lies elsewhere."""
    folder, path = os.path.abspath(Path(file).parent), os.path.abspath(path)
    return os.path.relpath(path, folder) if Path(path).is_relative_to(folder) else path
