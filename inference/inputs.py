"""The images or volumes to predict, and reading them beside the network."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import VOLUMES, BadInput
from sites.files import check_regular
from sites.layouts import IMAGE_KINDS, VOLUME_KINDS
from sites.readers import read_unlabelled

OF_MASKS = re.compile(r"(?i)masks|gt_.*")             # folders that hold masks
MASK = re.compile(r"(?i).*_segmentation\.nii(\.gz)?")  # files that do


def list_inputs(path, task):
    """Return the files at or below `path` that a run of `task` can predict, masks left out, sorted.

    Raises BadInput if there are none.
    """
    kinds = VOLUME_KINDS if task in VOLUMES else IMAGE_KINDS
    if not path.is_dir():
        check_regular(path)
        return [path]
    files = []
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".") and not OF_MASKS.fullmatch(name)]
        files += [Path(place) / name for name in names if name.lower().endswith(kinds)
                  and not name.startswith(".") and not MASK.fullmatch(name)]
    if not files:
        raise BadInput(f"{path}: has no {' or '.join(kinds)} files, give a file or a folder of such")
    return sorted(files)


def read_ahead(files, config):
    """Yield (file, Sample or the BadInput it raised), the next one being read meanwhile.

    At most two samples are in memory, however many files there are.
    """
    def read(file):
        try:
            return read_unlabelled(file, config.task, config.image_size)
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
