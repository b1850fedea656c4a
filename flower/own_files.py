"""What a site keeps in its `out` folder between messages, for a new process answers each."""

import sys
from itertools import chain
from pathlib import Path

import torch
import yaml

from config import BadInput, as_yaml, read_yaml
from datasets import SPLITS, Site, load_site
from rounds.checkpoint import as_bytes, save
from rounds.lock import check_apart
from rounds.reading import check_same_config, load_whole
from rounds.run_folder import OF_THE_END, prepare_run_folder
from sites import across
from sites.files import warn
from sites.given_splits import given_splits
from sites.layouts import files_below, is_table, list_files, list_site
from sites.readers import Sample


def read(file):
    """Return what this site saved in a file, {} before the first time. A damaged file is named and counts
    as none, so that the site goes on without it and writes it anew."""
    try:
        return load_whole(file) if file.exists() else {}
    except BadInput as problem:
        print(f"warning: {problem}; this site goes on without it and writes it anew",
              file=sys.stderr, flush=True)
        return {}


def keep(file, kept, config):
    """Save what this site keeps, in its run folder."""
    prepare_run_folder(file.parent, (), config)
    save(file, as_bytes(kept))


def load_decoded(name, config):
    """Return `load_own_site`'s Site, from decoded.pt in config.out if no setting and no file has changed.

    Files are compared by path, size and time. Raises as `load_own_site`.
    """
    file, mark = Path(config.out) / "decoded.pt", mark_of(config)
    stored = read(file)
    if isinstance(stored, dict) and stored.get("mark") == mark:
        return Site(name, **{part: [Sample(*row)._replace(truth=row[5].numpy()) for row in stored[part]]
                             for part in SPLITS})
    site = load_own_site(name, config)
    rows = {part: [tuple(sample._replace(truth=torch.from_numpy(sample.truth)))
                   for sample in getattr(site, part)] for part in SPLITS}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file, as_bytes({"mark": mark} | rows))
    except (BadInput, OSError, MemoryError) as problem:  # without it, they are only decoded again
        warn(name, [f"the decoded images cannot be kept ({problem})"])
    return site


def check_own_folder(config):
    """Raise BadInput if a site's out lies in its data, or holds another run's files."""
    out, file = Path(config.out), Path(config.out, "config.yaml")
    check_apart(out, Path(config.data))
    if file.exists():
        check_same_config(file, read_yaml(file), yaml.safe_load(as_yaml(config)))
    elif any((out / name).exists() for name in ("best.pt", "last.pt", "kept.pt", *OF_THE_END)):
        raise BadInput(f"{out}: has a run's files but no config.yaml; give another out in the node-config")


def load_own_site(name, config):
    """Return the Site of one hospital, its own folder being config.data; raises as `datasets.load_sites`."""
    entries, problems = list_own(name, config.data, config.task, config.case_pattern)
    if problems:
        raise BadInput(problems[0])
    splits = given_splits(config)
    across.look_at_files(name, config.data, {name: entries}, splits, config)
    site = load_site(name, entries, splits, config)
    warn(name, across.compare([site], config, hospital=True))
    return site


def list_own(name, data, task, case_pattern=None):
    """Return the entries and problems of the site `name`, whose own folder, or whose table, is `data`."""
    if is_table(data):
        entries, problems = list_files(data, task, case_pattern)
        missing = [f"{data}: has no site {name}, write it into the column site"] * (name not in entries)
        return entries.get(name, []), problems or missing
    if not Path(data).is_dir():
        raise BadInput(f"{data}: there is no such folder of site {name}")
    return list_site(Path(data), task, case_pattern)[:2]


def mark_of(config):
    """Return a text that changes with any setting but the run's length, and with any file of the data."""
    files = files_below(config.data)  # which follows links that lead round once
    if is_table(config.data):
        entries = chain(*list_files(config.data, config.task, config.case_pattern)[0].values())
        files = [Path(config.data), *(file for entry in entries for file in (entry.image, *entry.masks))]
    lines = [line for line in as_yaml(config).splitlines() if not line.startswith(("rounds:", "resume:"))]
    return "\n".join(lines + [facts(file) for file in sorted(files) + [Path(config.splits or "")]])


def facts(file):
    """Return a file's path, size and times as a text; of a broken link the path alone."""
    found = file.stat() if file.exists() else None
    return f"{file} {found and (found.st_size, found.st_mtime_ns, found.st_ctime_ns)}"
