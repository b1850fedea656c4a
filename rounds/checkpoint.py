"""Checkpoints: written whole or not at all, and read back with every part checked."""

import io
import math
import os
import zipfile
from pathlib import Path

import torch

from config import DEFAULTS, BadInput

FORMAT = "fedbcs-2"
NEEDED = {"config", "round", "weights", "local", "statistics"}
FREE_ON_RESUME = {"rounds", "out", "device", "resume"}
ADVICE = "give the folder of a run, or train it again"


def load_checkpoint(file, device="cpu"):
    """Return what `Run.save` saved; raises BadInput if the file is missing, damaged, foreign or malformed."""
    if not Path(file).is_file():
        raise BadInput(f"{file}: there is no such checkpoint; start the training, or go on with "
                       "it by resume=true")
    checkpoint = load_whole(file, device)
    if isinstance(checkpoint, dict) and checkpoint.get("format") == "fedbcs-1":
        raise BadInput(f"{file}: was written by version 1 of this program; score or resume it with "
                       "that version (git checkout 8e45f15), or train it again")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT \
            or not NEEDED <= checkpoint.keys():
        raise BadInput(f"{file}: is no checkpoint of this program (format {FORMAT}); {ADVICE}")
    for name, is_right in PARTS.items():
        if name in checkpoint and not is_right(checkpoint[name]):
            raise BadInput(f"{file}: its part '{name}' is not what this program writes; {ADVICE}")
    return checkpoint | {"config": DEFAULTS | checkpoint["config"]}


def load_whole(file, device="cpu"):
    """Return what torch saved in a file; raises BadInput if a byte of it is missing or changed.

    The file is a zip archive with checksums, which torch itself does not look at.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is None:
                return torch.load(file, map_location=device, weights_only=True)
    except PermissionError as problem:
        raise BadInput(f"{file}: cannot be opened ({problem.strerror}), check its permissions") from None
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001, S110 - what a foreign file raises has no common type
        pass
    raise BadInput(f"{file}: is damaged, truncated or no checkpoint; {ADVICE}")


# ---- What each part of a checkpoint is ----

def are_tensors(value):
    """Return whether a value is {name: tensor of finite floats}."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and is_finite(tensor) for name, tensor in value.items())


def is_finite(tensor):
    """Return whether a value is a tensor of finite floats."""
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and bool(
        torch.isfinite(tensor).all())


def are_of_sites(value):
    """Return whether a value is {site: {name: tensor of finite floats}}."""
    return isinstance(value, dict) and all(
        isinstance(site, str) and are_tensors(tensors) for site, tensors in value.items())


def are_prototypes(value):
    """Return whether a value is {path: {class: (K, D)}}, with one D a path."""
    return isinstance(value, dict) and all(
        isinstance(path, str) and isinstance(classes, dict) and all(
            type(j) is int and is_finite(P) and P.dim() == 2 and len(P) > 0 for j, P in classes.items())
        and len({P.shape[1] for P in classes.values()}) <= 1 for path, classes in value.items())


def are_kept(value):
    """Return whether a value is {site: what `Update.kept` holds}, or the server's part of it."""
    return isinstance(value, dict) and all(
        isinstance(site, str) and isinstance(kept, dict) and are_tensors(kept.get("local"))
        and isinstance(kept.get("memory", {}), dict) and (
            is_optimizer(kept["optimizer"]) if "optimizer" in kept else is_round(kept.get("round")))
        for site, kept in value.items())


def is_optimizer(value):
    """Return whether a value has the form of an optimizer's state, all its tensors finite."""
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"state", "param_groups"}:
        return False
    state, groups = value["state"], value["param_groups"]
    return isinstance(state, dict) and isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups) and all(
        isinstance(of_one, dict) and all(is_finite(x) for x in of_one.values() if x is not None)
        for of_one in state.values())


def is_round(value):
    """Return whether a value is the number of a round."""
    return type(value) is int and value >= 0


def is_number(value):
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


PARTS = {
    "config": lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "round": is_round,
    "weights": lambda value: are_tensors(value) and len(value) > 0,
    "local": are_of_sites,
    "statistics": are_of_sites,
    "prototypes": are_prototypes,
    "kept": are_kept,
    "history": lambda value: isinstance(value, list) and all(
        isinstance(row, (tuple, list)) and len(row) == 10 and is_round(row[0]) for row in value),
    "good": lambda value: isinstance(value, dict) and is_round(value.get("round")) and are_tensors(
        value.get("weights")) and are_prototypes(value.get("prototypes")),
    "seconds": is_number,
    "best": lambda value: isinstance(value, dict) and is_round(value.get("round")) and (
        value.get("dice") is None or is_number(value["dice"])),
}


# ---- What fits ----

def check_same_config(file, saved, wanted):
    """Raise BadInput, naming the keys, if a checkpoint was made under other settings."""
    keys = (saved.keys() | wanted.keys()) - FREE_ON_RESUME
    other = sorted(key for key in keys if saved.get(key) != wanted.get(key))
    if other:
        changes = ", ".join(f"{key} ({saved.get(key)}, now {wanted.get(key)})" for key in other)
        raise BadInput(f"{file}: belongs to another config, differing in {changes}; set them back, "
                       "or train into another folder with out=FOLDER")


def check_fits(file, what, found, expected):
    """Raise BadInput unless {name: tensor} has just the names and shapes of `expected`, {name: tensor}."""
    other = found.keys() ^ expected.keys() or {
        name for name in found if found[name].shape != expected[name].shape}
    if other:
        raise BadInput(f"{file}: its {what} do not fit the network of its config ({min(other)}), "
                       "train it again")


# ---- Files ----

def as_bytes(checkpoint):
    """Return the file content of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def save(file, content):
    """Write bytes to a file so that at any moment it is the old one or the whole new one."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise BadInput(f"{file}: cannot be written ({problem.strerror}); make room, "
                       "then go on with resume=true") from None
