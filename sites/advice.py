"""Advice for a data folder in which something is missing or is not read: one line, what to do in it."""

import difflib
from pathlib import Path

from config import VOLUMES
from sites.layouts import IMAGE_KINDS, VOLUME_KINDS, files_below, look, stem_of

TO_NIFTI = "convert it to .nii.gz, for example with 3D Slicer or SimpleITK"
TO_PNG = "save it as .png"
NOT_READ = {  # endings: (what they are, what to do)
    (".dcm", ".dicom", ".ima"): ("DICOM", "convert a series to .nii.gz, as dcm2niix does, a picture to .png"),
    (".mha", ".mhd"): ("MetaImage", TO_NIFTI),
    (".nrrd", ".nhdr"): ("NRRD", TO_NIFTI), (".img", ".hdr"): ("an Analyze pair", TO_NIFTI),
    (".mgz",): ("FreeSurfer's format", "convert it to .nii.gz with mri_convert"),
    (".npy", ".npz"): ("a NumPy array", "save it as .png, or as .nii.gz with nibabel and its voxel size"),
    (".h5", ".hdf5", ".mat"): ("a container of arrays", "save each array as .png or .nii.gz"),
    (".xml", ".geojson"): ("a text of outlines", "draw them as .png masks, for example with QuPath"),
    (".svs", ".ndpi", ".mrxs"): ("a whole slide", "cut it into .png tiles, for example with QuPath"),
    (".webp",): ("WebP", TO_PNG), (".gif",): ("GIF", TO_PNG), (".jp2",): ("JPEG 2000", TO_PNG),
    (".heic",): ("HEIC", TO_PNG),
    (".zip", ".gz", ".tar", ".7z", ".rar"): ("an archive", "unpack it"),
}
DATA_KINDS = (*IMAGE_KINDS, *VOLUME_KINDS, *(ending for endings in NOT_READ for ending in endings))


def format_advice(name, task=None):
    """Return what a file is that cannot be read, or not for a task, and what to do; None for any other."""
    lower = name.lower()
    for kinds, word in ((IMAGE_KINDS, "images"), (VOLUME_KINDS, "volumes")):
        if lower.endswith(kinds):
            other = task and (task in VOLUMES) != (word == "volumes")
            return f"of task {word}, which is not read; set task={word}" if other else None
    return next((f"{what}, which is not read; {remedy}" for endings, (what, remedy) in NOT_READ.items()
                 if lower.endswith(endings)), None)


def is_dicom(path):
    """Return whether a file without an ending is DICOM."""
    if path.suffix or not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def problems_of(site, found, unpaired, task, data):
    """Return the problems of a site whose files (image, None) or (None, mask) have no partner, or in which
    nothing was found. Each names the file that looks most like the partner. found: the site's entries."""
    if not unpaired:
        return [nothing_found(site, task)]
    used = {file for entry in found for file in (entry.image, *entry.masks)}
    folder, problems = str(data or Path(site).parent), []
    rest = [path for path in files_below(site) if path.name.lower().endswith(DATA_KINDS) and path not in used]
    for image, mask in unpaired:
        path, what, lack = (image, "image", "mask") if image else (mask, "mask", "image")
        same = {pair[0 if image else 1] for pair in unpaired}
        others = [other for other in rest if other not in same]
        alike = [other for other in others if look(stem_of(other)) == look(stem_of(path))] or others
        names = [str(other.relative_to(site)) for other in alike[:50]]  # of more, it takes long
        near = next(iter(difflib.get_close_matches(str(path.relative_to(site)), names, 1, 0)), None)
        known = near and format_advice(near)
        advice = f"{near} may be it: {known}" if known else \
            f"{near} looks like it, rename one" if near else f"add it or remove the {what}"
        problems.append(f"{path}: has no {lack} of that name; {advice}, or mend the table that this writes: "
                        f"python check_data.py {folder} --task {task} --write {folder.rstrip('/')}.csv")
    return sorted(problems)


def nothing_found(site, task):
    """Return the problem of a site in which no image of a task was found."""
    text, paths = f"{site}: has no images of task {task}", files_below(site)
    for path in paths:
        if advice := format_advice("x.dcm" if is_dicom(path) else path.name, task):
            return f"{text}, but files such as {path.name}: {advice}"
    if any(look(path.name) == "list.txt" for path in paths):
        return f"{text}; list.txt is not read, give its pairs as a table: docs/data.md shows one"
    return f"{text}; lay it out as docs/data.md says or remove the folder"
