"""The images or volumes to predict, and reading them beside the network."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import VOLUMES, BadInput
from sites.files import check_regular, enough_memory
from sites.layouts import IMAGE_KINDS, VOLUME_KINDS
from sites.readers import Sample, as_input, reader_of

SKIPPED_FOLDER = re.compile(r"(?is)\..*|masks|gt_.*")                # hidden folders and those of masks
SKIPPED_FILE = re.compile(r"(?is)\..*|.*_segmentation\.nii(\.gz)?")  # hidden files and masks


def list_inputs(path, task):
    """Return the files at or below `path` that a run of `task` can predict, sorted, masks left out;
    raises BadInput if there are none."""
    if not path.is_dir():
        check_regular(path)
        return [path]
    kinds, files = VOLUME_KINDS if task in VOLUMES else IMAGE_KINDS, []
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not SKIPPED_FOLDER.fullmatch(name)]
        files += [Path(place) / name for name in names
                  if name.lower().endswith(kinds) and not SKIPPED_FILE.fullmatch(name)]
    if not files:
        raise BadInput(f"{path}: has no {' or '.join(kinds)} files, give a file or a folder of such")
    return sorted(files)


def read_unlabelled(file, task, size, window=None, tiles=False):
    """Return the Sample of an image or volume without a mask: its truth is empty, on the file's own grid.
    size, window, tiles: as for `read_sample`."""
    with enough_memory(file):
        image, spacing, found = reader_of(task, tiles).read_alone(file, window)
        truth = np.broadcast_to(np.uint8(0), (len(image), *image.shape[2:]))
        return Sample("", "", file.name, as_input(image, task, size, tiles), None, truth, spacing,
                      tuple(found), tile=size if tiles else 0)


def read_ahead(files, config):
    """Yield (file, Sample or the BadInput it raised); meanwhile the next one is read, and no other."""
    def read(file):
        try:
            return read_unlabelled(file, config.task, config.image_size, config.window, config.tiles)
        except BadInput as problem:
            return problem

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, files[0])
        for file, following in zip(files, [*files[1:], None]):
            found = coming.result()
            coming = following and reader.submit(read, following)
            yield file, found


def output_names(files, path, ending):
    """Return {file: its output's path below the output folder}; two inputs of one stem keep their endings."""
    top = path if path.is_dir() else path.parent
    short = {file: re.sub(r"(?i)\.(nii\.gz|[^.]+)$", "", str(file.relative_to(top))) for file in files}
    stems = [stem.casefold() for stem in short.values()]
    return {file: Path((stem if stems.count(stem.casefold()) == 1 else str(file.relative_to(top))) + ending)
            for file, stem in short.items()}
