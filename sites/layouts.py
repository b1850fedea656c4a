"""Layouts: which files of a data folder are the images and masks of which site and case."""

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from config import VOLUMES, BadInput

IMAGE_KINDS = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
VOLUME_KINDS = (".nii", ".nii.gz")
OTHER_KINDS = (".gif", ".webp", ".jp2", ".svs", ".ndpi", ".dcm", ".mha", ".mhd", ".nrrd", ".img", ".hdr",
               ".npy", ".npz", ".h5", ".mat", ".zip", ".gz", ".tar")  # hold data that is not read here
DATA_KINDS = (*IMAGE_KINDS, *VOLUME_KINDS, *OTHER_KINDS)


class Entry(NamedTuple):
    """One image or volume on disk with its mask."""

    case: str
    image: Path
    mask: Path


def list_files(folder, task, case_pattern=None, leave_out=()):
    """Return {site: [Entry]} and a list of everything wrong with the files found, as texts; leave_out: names
    of sites that are not looked at."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: there is no such data folder; set data to one, or to demo")
    entries, problems = {}, []
    for site in visible(folder):
        name = as_seen(site.name)
        if site.is_dir() and name not in leave_out:
            if name in entries:
                problems.append(f"{site}: is a second site of that name, rename one")
            entries[name], wrong = list_site(site, task, case_pattern, folder)
            problems += wrong
    if not entries:
        problems.append(f"{folder}: has no site folders{' besides leave_out' * bool(leave_out)}; give one "
                        "folder a site")
    return entries, problems


def list_site(site, task, case_pattern=None, data=None):
    """Return the entries of one site's folder and a list of everything wrong with it, as texts; data: the
    folder of all data, out of which no list.txt may lead, by default the site's own."""
    found, problems = list_volumes(site) if task in VOLUMES else list_images(site, data or site)
    if not found and not problems:
        problems.append(f"{site}: has no images of task {task}; lay it out as docs/data.md says or remove "
                        "the folder")
    if not case_pattern:
        return found, problems
    entries = []
    for entry in found:
        match = re.search(case_pattern, as_seen(entry.image.name))
        if match and match[1]:
            entries.append(entry._replace(case=match[1]))
        else:
            problems.append(f"{entry.image}: its name does not match case_pattern {case_pattern!r}, "
                            "mend the pattern or rename the file")
    return entries, problems


def visible(folder):
    """Return what is in a folder, sorted by name, without hidden names."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def as_seen(name):
    """Return a name in Unicode's NFC, so that equal looking names are equal; other bytes as \\xe9."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def unread(folder, entries, leave_out=()):
    """Return a warning for each folder in which files that could be data belong to no entry. folder: a
    site's, or that of all sites; entries: those found in it. Hidden names are not data."""
    read, warnings = {os.path.abspath(file) for entry in entries for file in entry[1:]}, []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and (place != str(folder) or as_seen(name) not in leave_out))
        left = [name for name in sorted(names) if name.lower().endswith(DATA_KINDS)
                and not name.startswith(".") and os.path.abspath(os.path.join(place, name)) not in read]
        if left:
            files = "1 file that could be data is" if len(left) == 1 else \
                f"{len(left)} files that could be data are"
            warnings.append(f"{place}: {files} not read, such as {left[0]}; docs/data.md shows where data "
                            "are looked for")
    return warnings


def list_images(site, data):
    """Return the entries and the problems of one site of 2-D images, in any of three layouts."""
    if (site / "list.txt").is_file():
        return list_text(site / "list.txt", Path(data))
    folders = [path for path in visible(site) if path.is_dir()]
    plain = [images_in(next((path for path in folders if path.name.lower() == name), site / name))
             for name in ("images", "masks")]
    slides = [path for path in folders if re.fullmatch(r"(?i)slide_.+", path.name)]
    if not slides:
        return pair(*plain)
    if any(plain):
        return [], [f"{site}: has images and masks and {slides[0].name} as well, keep one layout"]
    entries, problems = [], []
    for slide in slides:
        found, wrong = pair(images_in(slide), images_in(site / f"GT_{slide.name[6:]}"), case=slide.name)
        entries, problems = entries + found, problems + wrong
    numbers = {slide.name[6:] for slide in slides}
    problems += [f"{path}: has no Slide_{path.name[3:]} beside it, add it or remove the masks"
                 for path in folders if path.name.startswith("GT_") and path.name[3:] not in numbers]
    return entries, problems


def list_text(file, data):
    """Return the entries and problems of a list.txt: lines 'image mask'; none may lead out of `data`."""
    entries, problems = [], []
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip().split("\t" if "\t" in line else None)
        if not words or words[0].startswith("#"):
            continue
        wrong = wrong_line(file.parent, data, words, entries)
        if wrong:
            problems.append(f"{file}: line {number}: {wrong}")
        else:
            image, mask = (file.parent / word for word in words)
            entries.append(Entry(as_seen(image.stem), image, mask))
    return entries, problems


def wrong_line(folder, data, words, entries):
    """Return what is wrong with the words of a line of list.txt, None if it names an image and its mask."""
    if len(words) != 2:
        return "expected 'image mask', mend the line; names with spaces need a tab between the two"
    image, mask = (folder / word for word in words)
    for word, path in zip(words, (image, mask)):
        if "\0" in word or not path.resolve().is_relative_to(data.resolve()):
            return f"{word!r} lies outside {data}, copy the file into it"
        if not path.is_file():
            return f"{path} {'is no regular file' if path.exists() else 'does not exist'}, mend the line"
    if image.resolve() == mask.resolve():
        return "image and mask are one file, name its mask"
    if any(as_seen(image.stem) == entry.case for entry in entries):
        return f"{words[0]} is a second image of that name, keep or rename one"
    return None


def images_in(folder):
    """Return [(stem, path)] of the images in a folder, none if there is no such folder."""
    return [(path.stem, path) for path in (visible(folder) if folder.is_dir() else [])
            if path.suffix.lower() in IMAGE_KINDS]


def list_volumes(site):
    """Return entries and problems of one site of volumes, CaseNN and CaseNN_segmentation."""
    images, masks = [], []
    for path in visible(site):
        found = re.fullmatch(r"(?is)(.*?)(_segmentation)?\.nii(\.gz)?", path.name)
        if found:
            (masks if found[2] else images).append((found[1], path))
    return pair(images, masks)


def pair(images, masks, case=None):
    """Return entries of images and masks [(stem, path)] whose names have the same `look`, and problems."""
    pictures, truths, problems = {}, {}, []
    for files, known, what in ((images, pictures, "image"), (masks, truths, "mask")):
        for stem, path in files:
            first = known.setdefault(look(stem), path)
            if first != path:
                problems.append(f"{path}: {first.name} is a second {what} of that name, keep one")
    for known, others, what, lacks in ((pictures, truths, "image", "mask"),
                                       (truths, pictures, "mask", "image")):
        problems += [f"{known[name]}: has no {lacks} of that name, add it or remove the {what}"
                     for name in known.keys() - others.keys()]
    return [Entry(as_seen(case or stem), path, truths[look(stem)])
            for stem, path in images if look(stem) in truths], sorted(problems)


def look(stem):
    """Return what is equal for names that a person takes for one, in any letters, capital or small."""
    return as_seen(stem.strip()).casefold()
