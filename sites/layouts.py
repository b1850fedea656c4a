"""Layouts: which files of a data folder are the images and masks of which site and case."""

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from config import VOLUMES, BadInput

IMAGE_KINDS = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
VOLUME_KINDS = (".nii", ".nii.gz")
HIDDEN = (".", "__MACOSX")  # the latter is what archives of a Mac hold beside the files


class Entry(NamedTuple):
    """One image or volume on disk with its masks: mostly one file; several are united."""

    case: str
    image: Path
    masks: tuple        # of Path
    labels: tuple = ()  # the class that each mask draws; (): their own labels say so


def list_files(data, task, case_pattern=None, leave_out=()):
    """Return {site: [Entry]} of a data folder, or of a table FILE.csv, and a list of everything wrong with
    the files found, as texts; leave_out: names of sites that are not looked at."""
    if is_table(data):
        from sites.table import list_table  # a run on folders does not load the reader of tables
        entries, problems = list_table(data, task, case_pattern)
        return {name: found for name, found in entries.items() if name not in leave_out}, problems
    if not Path(data).is_dir():
        raise BadInput(f"{data}: there is no such data folder; set data to one, to a table or to demo")
    entries, problems = {}, []
    for site in visible(data):
        name = as_seen(site.name)
        if name not in leave_out and (site.is_dir() or not site.exists()):  # or a link to nowhere
            entries[name], wrong, _ = list_site(site, task, case_pattern, data)
            problems += wrong
    if not entries:
        problems.append(f"{data}: has no site folders{' besides leave_out' * bool(leave_out)}; add them")
    if problems:
        from sites.names import role_of
        if entries and all(role_of([name]) for name in entries):
            problems.insert(0, f"{data}: is the folder of one site, since it holds {' and '.join(entries)}; "
                               "give the folder above")
    return entries, problems


def is_table(data):
    """Return whether the key data names a table, FILE.csv, and no folder."""
    return str(data).lower().endswith(".csv") and not Path(data).is_dir()


def list_site(site, task, case_pattern=None, data=None):
    """Return the entries of one site's folder, a list of everything wrong with it, as texts, and
    [(image, None) or (None, mask)] of files without a partner; data: the folder of all sites, for advice."""
    files, kinds = files_below(site), VOLUME_KINDS if task in VOLUMES else IMAGE_KINDS
    paths = [path for path in files if path.name.lower().endswith(kinds)]
    found, wrong, unpaired = plain_pairs(site, paths), [], []
    if found is None:
        from sites.names import pair_files, sort_files  # a run on a plain folder does not load it
        found, wrong, unpaired = pair_files(*sort_files(site, paths))
    problems = [f"{path}: is a link to nowhere ({os.readlink(path)}), mend or remove it"
                for path in (Path(site), *files) if not path.exists()] + wrong
    if unpaired or not (found or problems):
        from sites.advice import problems_of  # a run on good data does not load it
        problems += problems_of(site, found, unpaired, task, data)
    if case_pattern:
        from sites.patients import joined  # a run without the key does not load it
        found = joined(found, case_pattern, problems)
    return found, problems, unpaired


def plain_pairs(site, paths):
    """Return the entries of a site whose files are images/NAME and masks/NAME, or NAME and NAME_segmentation;
    None for any other."""
    placed = {look(path.relative_to(site).with_name(stem_of(path))): path for path in paths}
    masks = {key: "masks/" + key[7:] if key.startswith("images/") else key + "_segmentation"
             for key in placed if not key.endswith("_segmentation")}
    entries = [Entry(as_seen(stem_of(placed[key])), placed[key], (placed[mask],))
               for key, mask in masks.items() if mask in placed]
    deep = any(key.count("/") != key.startswith(("images/", "masks/")) for key in placed)
    return entries if 2 * len(entries) == len(paths) and not deep else None


def visible(folder):
    """Return what is in a folder, sorted by name, without hidden names."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith(HIDDEN))


def files_below(folder):
    """Return the paths of all files in and below a folder, sorted, without hidden names; links to folders
    are followed, each folder is entered once."""
    found, entered = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN) and real not in entered]
        found += [Path(place, name) for name in names if not name.startswith(HIDDEN) and real not in entered]
        entered.add(real)
    return sorted(found)


def as_seen(name):
    """Return a name in Unicode's NFC, so that equal looking names are equal; other bytes as \\xe9."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def look(name):
    """Return what is equal for names that a person takes for one, in any letters, capital or small."""
    return as_seen(name).strip().casefold()


def stem_of(path):
    """Return a file's name without its ending, .nii.gz being one."""
    return re.sub(r"(?is)(\.nii)?\.[^.]*$", "", path.name)
