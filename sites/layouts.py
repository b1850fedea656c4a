"""Layouts: which files of a data folder are the images and masks of which site and case."""

import re
from pathlib import Path
from typing import NamedTuple

from config import BadInput

IMAGE_KINDS = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")


class Entry(NamedTuple):
    """One image or volume on disk with its mask."""

    case: str
    image: Path
    mask: Path


def list_files(folder, task, case_pattern=None):
    """Return {site: [Entry]} and a list of everything wrong with the files found, as texts."""
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: there is no such data folder; set data to one, or to demo")
    entries, problems = {}, []
    for site in visible(folder):
        if site.is_dir():
            entries[site.name], wrong = list_site(site, task, case_pattern)
            problems += wrong
    if not entries:
        problems.append(f"{folder}: has no site folders; give one folder a site")
    return entries, problems


def list_site(site, task, case_pattern=None):
    """Return the entries of one site's folder and a list of everything wrong with it, as texts."""
    found, problems = (list_images if task == "nuclei" else list_volumes)(site)
    if not found and not problems:
        problems = [(f"{site}: has no images of task {task}; lay it out as docs/data.md says "
                    "or remove the folder")]
    cased = [with_case(entry, case_pattern, problems) for entry in found]
    return [entry for entry in cased if entry], problems


def visible(folder):
    """Return what is in a folder, sorted by name, without hidden names."""
    return sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))


def with_case(entry, case_pattern, problems):
    """Return the entry with the case that group 1 of the pattern finds in its image's file name."""
    if not case_pattern:
        return entry
    match = re.search(case_pattern, entry.image.name)
    if match and match[1]:
        return entry._replace(case=match[1])
    problems.append(f"{entry.image}: its name does not match case_pattern {case_pattern!r}, "
                    "mend the pattern or rename the file")
    return None


def list_images(site):
    """Return the entries and the problems of one site of 2-D images, in any of three layouts."""
    if (site / "list.txt").is_file():
        return list_text(site / "list.txt")
    slides = [path for path in visible(site) if re.fullmatch(r"(?i)slide_.+", path.name)]
    if not slides:
        return pair(images_in(site / "images"), images_in(site / "masks"))
    entries, problems = [], []
    for slide in slides:
        truth = slide.with_name("GT_" + slide.name[6:])
        found, wrong = pair(images_in(slide), images_in(truth), case=slide.name)
        entries, problems = entries + found, problems + wrong
    numbers = {slide.name[6:] for slide in slides}
    problems += [f"{path}: has no Slide_{path.name[3:]} beside it, add it or remove the masks"
                 for path in visible(site) if path.name.startswith("GT_")
                 and path.name[3:] not in numbers]
    return entries, problems


def list_text(file):
    """Return the entries and problems of a list.txt: lines 'image mask', relative to its folder."""
    entries, problems = [], []
    for number, line in enumerate(file.read_text("utf-8-sig", "replace").splitlines(), 1):
        words = line.split("\t") if "\t" in line else line.split()  # tabs allow names with spaces
        if not words or words[0].startswith("#"):
            continue
        paths = [file.parent / word for word in words]
        missing = [path for path in paths if not path.is_file()]
        if len(words) != 2 or missing:
            wrong = f"{missing[0]} does not exist" if len(words) == 2 else "expected 'image mask'"
            problems.append(f"{file}: line {number}: {wrong}, mend the line")
        elif paths[0] == paths[1]:
            problems.append(f"{file}: line {number}: image and mask are one file, name its mask")
        elif any(paths[0].stem == entry.image.stem for entry in entries):
            problems.append(f"{file}: line {number}: {words[0]} is a second image of that name, "
                            "keep or rename one")
        else:
            entries.append(Entry(paths[0].stem, *paths))
    return entries, problems


def images_in(folder):
    """Return [(stem, path)] of the images in a folder, none if there is no such folder."""
    return [(path.stem, path) for path in (visible(folder) if folder.is_dir() else [])
            if path.suffix.lower() in IMAGE_KINDS]


def list_volumes(site):
    """Return entries and problems of one site of volumes, CaseNN and CaseNN_segmentation."""
    files = [(re.sub(r"(?i)\.nii(\.gz)?$", "", path.name), path) for path in visible(site)
             if re.search(r"(?i)\.nii(\.gz)?$", path.name)]
    ending = re.compile(r"(?i)_segmentation$")
    masks = [(ending.sub("", stem), path) for stem, path in files if ending.search(stem)]
    return pair([(stem, path) for stem, path in files if not ending.search(stem)], masks)


def pair(images, masks, case=None):
    """Return entries of images and masks [(stem, path)] that match in any case, and problems."""
    problems, by_stem = [], ({}, {})
    for files, known, what in ((images, by_stem[0], "image"), (masks, by_stem[1], "mask")):
        for stem, path in files:
            if stem.lower() in known:
                other = known[stem.lower()].name
                problems.append(f"{path}: {other} is a second {what} of that name, keep one")
            known[stem.lower()] = path
    stems, truths = by_stem
    problems += [f"{stems[stem]}: has no mask of that name, add it or remove the image"
                 for stem in stems.keys() - truths.keys()]
    problems += [f"{truths[stem]}: has no image of that name, add it or remove the mask"
                 for stem in truths.keys() - stems.keys()]
    return [Entry(case or original, stems[original.lower()], truths[original.lower()])
            for original, _ in images if original.lower() in truths], sorted(problems)
