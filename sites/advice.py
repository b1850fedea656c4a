"""Advice for a data folder in which something is missing or is not read: one line, what to do in it."""

import difflib
from pathlib import Path

from config import VOLUMES
from sites.layouts import (
    DATA_KINDS,
    IMAGE_KINDS,
    VOLUME_KINDS,
    Masks,
    files_below,
    files_of,
    look,
    stem_of,
)
from sites.names import role_of

NEAREST = 50  # files among which the nearest name is looked for

TO_NIFTI = "convert it to .nii.gz, for example with 3D Slicer or SimpleITK"
TO_PNG = "save it as .png"
FORMATS = {  # endings: (what they are, what to do)
    (".dcm", ".dicom", ".ima"): ("DICOM", "convert a series to .nii.gz, as dcm2niix does, a picture to .png"),
    (".mha", ".mhd"): ("MetaImage", TO_NIFTI),
    (".nrrd", ".nhdr"): ("NRRD", TO_NIFTI),
    (".img", ".hdr"): ("an Analyze pair", TO_NIFTI),
    (".mgz",): ("FreeSurfer's format", "convert it to .nii.gz with mri_convert"),
    (".npy", ".npz"): ("a NumPy array", "save it as .png, or as .nii.gz with nibabel and its voxel size"),
    (".h5", ".hdf5", ".mat"): ("a container of arrays", "save each array as .png or .nii.gz"),
    (".xml", ".geojson"): ("a text of outlines", "draw them as .png masks, for example with QuPath"),
    (".svs", ".ndpi", ".mrxs"): ("a whole slide", "cut it into .png tiles, for example with QuPath"),
    (".webp",): ("WebP", TO_PNG), (".gif",): ("GIF", TO_PNG), (".jp2",): ("JPEG 2000", TO_PNG),
    (".heic",): ("HEIC", TO_PNG),
    (".zip", ".gz", ".tar", ".7z", ".rar"): ("an archive", "unpack it"),
}


def format_advice(name):
    """Return what a file of an unreadable format is and what to do, as a text; None for other endings."""
    lower = name.lower()
    if lower.endswith((*IMAGE_KINDS, *VOLUME_KINDS)):
        return None
    return next((f"{what}, which is not read; {remedy}" for endings, (what, remedy) in FORMATS.items()
                 if lower.endswith(endings)), None)


def is_dicom(path):
    """Return whether a file without an ending is DICOM."""
    if path.suffix or not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def warnings_on(left, entries):
    """Return the warnings on files that could be data and are not read, {folder: [name]}, and one on images
    with several masks."""
    several = [entry for entry in entries if isinstance(entry.mask, Masks)]
    return [not_read(place, names) for place, names in left.items()] + ([united(several)] if several else [])


def not_read(place, names):
    """Return the warning on the files `names` of a folder that could be data and belong to no entry."""
    one = len(names) == 1
    number = "1 file that could be data is" if one else f"{len(names)} files that could be data are"
    known = [name for name in names if format_advice(name)]
    if known:
        return f"{place}: {number} not read, such as {known[0]}: {format_advice(known[0])}"
    advice = "docs/data.md shows where data are looked for"
    if names[0].lower() == "list.txt":
        advice = "a table takes its place, see docs/data.md"
    return f"{place}: {number} not read, such as {names[0]}; {advice}"


def united(entries):
    """Return the warning on images that have several masks."""
    image, files = entries[0].image, entries[0].mask.files
    more = f", and so are those of {len(entries) - 1} other images" * (len(entries) > 1)
    return (f"{image}: its {len(files)} masks are united, {files[0].name} to {files[-1].name}{more}; if they "
            "are classes, or of several readers, say so in a table")


def table_command(site, task, data):
    """Return the command that writes a table of what was found."""
    folder = data or Path(site).parent
    return f"python check_data.py {folder} --task {task} --write {str(folder).rstrip('/')}.csv"


def problems_of(site, found, unpaired, task, data):
    """Return the problems of a site whose files have no partner, or in which nothing was found."""
    return without_partner(site, found, unpaired, task, data) if unpaired else [nothing_found(site, task)]


def without_partner(site, found, unpaired, task, data):
    """Return the problems of images without mask and of masks without image, sorted; each names the file that
    looks most like the other one. found: the entries of the site."""
    used = {file for entry in found for file in files_of(entry)}
    rest = [path for path in files_below(site) if path.name.lower().endswith(DATA_KINDS) and path not in used]
    problems = []
    for image, mask in unpaired:
        path, what, lack = (image, "image", "mask") if image else (mask, "mask", "image")
        same = {pair[0 if image else 1] for pair in unpaired}
        others = {str(other.relative_to(site)): other for other in rest if other not in same}
        near = nearest(path.relative_to(site), others)
        advice = f"{near} looks like it, rename one" if near else f"add it or remove the {what}"
        if near and format_advice(near):
            advice = f"{near} may be it: {format_advice(near)}"
        problems.append(f"{path}: has no {lack} of that name; {advice}, or mend the table that this writes: "
                        f"{table_command(site, task, data)}")
    return sorted(problems)


def nearest(path, others):
    """Return which of the names `others` looks most like a path, None without any: one of the same stem, else
    by the letters of file and folder."""
    stems = [other for other in others if look(stem_of(Path(other))) == look(stem_of(path))]
    near = stems or list(others)[:1] if len(others) > NEAREST else \
        difflib.get_close_matches(str(path), stems or others, 1, 0)
    return next(iter(near), None)


def wrong_level(data, sites):
    """Return the problem of a data folder that is the folder of one site, as a list, empty otherwise."""
    if not sites or not all(role_of([name]) for name in sites):
        return []
    return [f"{data}: is the folder of one site, since it holds {' and '.join(sites)}; give the folder above"]


def nothing_found(site, task):
    """Return the problem of a site in which no image of a task was found."""
    paths = files_below(site)
    other = IMAGE_KINDS if task in VOLUMES else VOLUME_KINDS
    text = f"{site}: has no images of task {task}"
    for path in paths:
        if path.name.lower().endswith(other):
            word = "images" if task in VOLUMES else "volumes"
            return f"{text}, but files such as {path.name}, which are of task {word}; set task={word}"
        advice = format_advice(path.name) or (is_dicom(path) and format_advice(".dcm"))
        if advice:
            return f"{text}, but files such as {path.name}: {advice}"
    if any(path.name.lower() == "list.txt" for path in paths):
        return f"{text}; list.txt is not read, give its pairs as a table: docs/data.md shows one"
    return f"{text}; lay it out as docs/data.md says or remove the folder"
