"""A hospital's own side: what it lets the server decide, where its data lie, and what it keeps in its `out`
folder, for a new process answers each message."""

import os
import shlex
from itertools import chain
from pathlib import Path

import torch
import yaml

from config import KEYS, METHODS, BadInput, as_yaml, method_module, read_override, read_yaml
from datasets import SPLITS, Site, load_site
from flower.guards import GUARDS, settings
from rounds.checkpoint import as_bytes, save
from rounds.lock import check_apart
from rounds.reading import check_same_config, load_whole
from rounds.run_folder import OF_THE_END, prepare_run_folder
from scoring.evaluate import pick_device
from sites.across import GB, compare, free_memory, look_at_files
from sites.files import warn
from sites.given_splits import given_splits
from sites.layouts import as_seen, files_below, is_table, list_files, list_site, visible
from sites.readers import Sample

PROJECT = Path(__file__).resolve().parents[1]
NEVER = {"data", "out", "splits", "trust", "case_pattern"}  # files, their names, and which code is trusted
EACH = {"data", "out", "resume", "init", "leave_out"}       # what each place has of its own
OWN = ("data", "out", "splits", "case_pattern", "device")   # keys that a site sets for itself
# The largest values of the server that a site trains with; its node-config may have others, as max_KEY.
LARGEST = {"width": 64, "levels": 5, "image_size": 1024, "batch_size": 64, "local_epochs": 20, "rounds": 2000}
ANSWERS = 3  # to one question about a round: a server that was killed asks again


# ---- What the server decides ----

def own_config(context):
    """Return the config by which this node trains, the server's with what is its own; raises BadInput."""
    node = context.node_config
    if "partition-id" in node and "site" not in node:  # a simulation on one's own machine
        name_partition(node, settings(context)[0])
    if lacks := [key for key in ("site", "data", "out") if not node.get(key)]:
        raise BadInput(f"node-config: lacks {lacks[0]}; give site, data and out")
    check_server(context)
    config = settings(context, *(f"{key}={node[key]}" for key in OWN if key in node))[0]
    os.umask(0o077)  # nobody else at the hospital reads what this process writes
    check_bounds(config, node)
    check_own_folder(config)
    return config


def name_partition(node, config):
    """Give partition i of a simulation the i-th folder of `data`: site, data and out in its node-config. Its
    own files go beside the server's run folder, to OUT_sites/SITE. Raises BadInput."""
    data, out = Path(config.data), Path(config.out)
    if not (data.is_absolute() and out.is_absolute()):
        raise BadInput("data, out: give both as full paths, for the nodes are started in another folder")
    folders = [folder for folder in visible(data) if folder.is_dir()] if data.is_dir() else []
    if len(folders) != node["num-partitions"]:
        raise BadInput(f"{data}: has {len(folders)} folders of sites and the simulation "
                       f"{node['num-partitions']} nodes, make them equal with num-supernodes")
    name = folders[node["partition-id"]].name
    node |= {"site": as_seen(name), "data": str(data / name), "out": str(Path(f"{out}_sites", name))}


def check_server(context):
    """Raise BadInput unless all that the server overrides is in the site's `allow`, by default every key that
    has to do with training. Those in NEVER are not the server's in its config file either. A method's file
    runs only where the own node-config names it."""
    node, run = context.node_config, context.run_config
    file = (PROJECT / str(run["config"])).resolve()
    if not file.is_relative_to(PROJECT):
        raise BadInput(f"config: {run['config']} lies outside of the bundle")
    changed = dict(map(read_override, shlex.split(str(run["overrides"]))))
    given = read_yaml(file) | changed
    method = given.get("method", "fedbcs")
    if method not in METHODS and method != node.get("method"):
        raise BadInput(f"method: the server wants to run the code of {str(method)[:80]!r}; "
                       "this site runs a file only if its own node-config has that as method")
    known = set(KEYS) | set(GUARDS) | set(getattr(method_module(method)[0], "SETTINGS", {}))
    permitted = set(str(node["allow"]).replace(",", " ").split()) if "allow" in node else known
    for key in sorted((key for key in given if key not in EACH), key=lambda key: key not in NEVER):
        if key in NEVER or key not in known or key in changed and key not in permitted:
            raise BadInput(f"{str(key)[:80]}: is set by the server and this site does not allow it; "
                           "see allow in flower/README.md")


def check_bounds(config, node):
    """Raise BadInput if the server wants more than the site's LARGEST, or than there is memory for."""
    for key, largest in LARGEST.items():
        wanted, most = getattr(config, key), int(node.get(f"max_{key}", largest))
        if (len(wanted) if key == "levels" else wanted) > most:
            raise BadInput(f"{key}: the server wants {wanted}, this site's max_{key} is {most}")
    need = 96 * config.batch_size * config.image_size**2 * config.width  # measured: 26 maps of float32, and
    need += 32000 * config.width**2 * (9 if config.optimizer == "adam" else 5)  # so many times the weights
    device = pick_device(config)
    free = (free_memory() or need) if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise BadInput(f"batch_size: a training step takes more than {need / GB:.2f} GB, {free / GB:.2f} GB "
                       "are free; close other programs, or lower max_batch_size, max_image_size or max_width")


def check_images(site, node):
    """Raise BadInput for fewer training images than `min_images`, 2 unless the node-config says otherwise: an
    update of one image can be inverted to that image."""
    least = int(node.get("min_images", 2))
    tiled = any(sample.tile for sample in site.train)  # tiles of one image are one image
    number = len(site.train if tiled else site.train_slices)
    if 0 < number < least:
        raise BadInput(f"min_images: this site has {number} training images, fewer than {least}")


# ---- Its files ----

def check_own_folder(config):
    """Raise BadInput if a site's out lies in its data, or holds another run's files."""
    out, file = Path(config.out), Path(config.out, "config.yaml")
    check_apart(out, Path(config.data))
    if file.exists():
        check_same_config(file, read_yaml(file), yaml.safe_load(as_yaml(config)))
    elif any((out / name).exists() for name in ("best.pt", "last.pt", "kept.pt", *OF_THE_END)):
        raise BadInput(f"{out}: has a run's files but no config.yaml; give another out in the node-config")


def read(file):
    """Return what this site saved in a file, {} before the first time. A damaged file is named and counts
    as none, so that the site goes on without it and writes it anew."""
    try:
        return load_whole(file) if file.exists() else {}
    except BadInput as problem:
        warn("this site", [f"{problem}; it goes on without it and writes it anew"])
        return {}


def keep(kept, config):
    """Save what this site keeps from round to round, in its run folder."""
    prepare_run_folder(Path(config.out), (), config)
    save(Path(config.out) / "kept.pt", as_bytes(kept))


def count_answer(question, t, config, node):
    """Return what the site kept, with one more answer to a question about round t counted in `answered`.
    Raises BadInput for a round of no run, or too many answers."""
    kept, most = read(Path(config.out) / "kept.pt"), int(node.get("max_answers", ANSWERS))
    answered = kept.get("answered", {})
    times = answered.get(f"{question} {t}", 0)
    if not 1 <= t <= config.rounds or times >= most:
        raise BadInput(f"round {t}: the run has {config.rounds} rounds and this site has answered the "
                       f"{question} of this one {times} times, its max_answers is {most}; ask those who run "
                       "the server why")
    return kept | {"answered": answered | {f"{question} {t}": times + 1}}


def load_decoded(name, config):
    """Return `load_own_site`'s Site, from decoded.pt in config.out if no setting has changed, and no file by
    path, size or time. Raises as `load_own_site`."""
    file, mark = Path(config.out) / "decoded.pt", mark_of(config)
    stored = read(file)
    if stored.get("mark") == mark:
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


def load_own_site(name, config):
    """Return the Site of one hospital, whose own folder or table is config.data; raises as `load_sites`."""
    data, table = config.data, is_table(config.data)
    if not table and not Path(data).is_dir():
        raise BadInput(f"{data}: there is no such folder of site {name}")
    list_own = list_files if table else list_site
    entries, problems = list_own(Path(data), config.task, config.case_pattern)[:2]
    if table and name not in entries:
        problems = problems or [f"{data}: has no site {name}, write it into the column site"]
    if problems:
        raise BadInput(problems[0])
    entries, splits = entries[name] if table else entries, given_splits(config)
    look_at_files(name, data, {name: entries}, splits, config)
    site = load_site(name, entries, splits, config)
    warn(name, compare([site], config, hospital=True))
    return site


def mark_of(config):
    """Return a text that changes with any setting but the run's length, and with any file of the data."""
    files = files_below(config.data)  # which follows links that lead round once
    if is_table(config.data):
        entries = chain(*list_files(config.data, config.task, config.case_pattern)[0].values())
        files = [Path(config.data), *(file for entry in entries for file in (entry.image, *entry.masks))]
    lines = [line for line in as_yaml(config).splitlines() if not line.startswith(("rounds:", "resume:"))]
    for file in sorted(files) + [Path(config.splits or "")]:
        found = file.stat() if file.exists() else None  # of a broken link the path alone
        lines.append(f"{file} {found and (found.st_size, found.st_mtime_ns, found.st_ctime_ns)}")
    return "\n".join(lines)
