"""Checkpoints are read back with every part checked, and held against the config of their run."""

import io
import math
import zipfile
from pathlib import Path

import torch

from config import DEFAULTS, BadInput
from rounds.checkpoint import FORMAT, NEEDED, as_bytes

OLD = {"fedbcs-1": "8e45f15", "fedbcs-2": "22f1388"}  # {format: last commit that reads it}
TO_RESUME = (*NEEDED, "prototypes", "kept", "history", "seconds", "best")
# What may differ from the config of a run. Where its data lie may, for their cases are compared.
FREE_ON_RESUME = {"rounds", "out", "device", "resume", "data", "splits"}
FREE_TO_SCORE = FREE_ON_RESUME | {"test_stats", "eval_slices", "case_pattern"}
ADVICE = "give the folder of a run, or train it again"


def checkpoint_of(config, file, free=FREE_TO_SCORE, needed=NEEDED, device="cpu"):
    """Return `load_checkpoint`'s checkpoint of a run with this config: every checkpoint of a run is read by
    this function before anything in it is used. Raises BadInput if it is of other settings than those."""
    checkpoint = load_checkpoint(file, device, needed)
    check_same_config(file, checkpoint["config"], vars(config), free)
    return checkpoint


def load_checkpoint(file, device="cpu", needed=NEEDED):
    """Return what `RunFolder.save` saved; raises BadInput for a file that is missing, damaged or foreign, or
    lacks a part. Whether it belongs to the run at hand is not asked: see `checkpoint_of`."""
    if not Path(file).is_file():
        raise BadInput(f"{file}: there is no such checkpoint; finish that training with resume=true, or "
                       "train it again")
    checkpoint = load_whole(file, device)
    version = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if isinstance(version, str) and version in OLD:
        raise BadInput(f"{file}: was written by an earlier version of this program; score or resume it with "
                       f"that version (git checkout {OLD[version]}), or train it again")
    if version != FORMAT:
        raise BadInput(f"{file}: is no checkpoint of this program (format {FORMAT}); {ADVICE}")
    if lacks := [name for name in needed if name not in checkpoint]:
        raise BadInput(f"{file}: lacks its part '{lacks[0]}', without which it cannot be used here; {ADVICE}")
    for name in PARTS:
        if name in checkpoint and not is_whole(name, checkpoint[name]):
            raise BadInput(f"{file}: its part '{name}' is not what this program writes; {ADVICE}")
    return checkpoint | {"config": DEFAULTS | checkpoint["config"]}


def load_whole(file, device="cpu"):
    """Return what torch saved in a file; raises BadInput if a byte of it is missing or changed. The file is a
    zip archive with checksums, which torch itself does not look at."""
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

def is_whole(name, part):
    """Return whether a part of a checkpoint is what this program writes."""
    try:
        return bool(PARTS[name](part))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # of another type
        return False


def are_finite(tensors):
    """Return whether all that {name: tensor} holds are finite numbers."""
    return all(type(name) is str and bool(torch.isfinite(value).all()) for name, value in tensors.items())


def are_prototypes(G):
    """Return whether {path: {class: (K, D)}} holds finite vectors, of one D on each path."""
    return all(P.dim() == 2 and len(P) > 0 and are_finite({path: P}) and type(j) is int
               and P.shape[1] == next(iter(classes.values())).shape[1]
               for path, classes in G.items() for j, P in classes.items())


def is_count(value):
    """Return whether a value is a whole number of at least 0, such as that of a round."""
    return type(value) is int and value >= 0


def is_kept(of_site):
    """Return whether this is what `Update.kept` holds, or the server's part of it."""
    if "optimizer" not in of_site:
        return are_finite(of_site["local"]) and is_count(of_site["round"])
    states = [] if of_site["optimizer"] is None else of_site["optimizer"]["state"].values()
    return are_finite(of_site["local"]) and type(of_site["memory"]) is dict and all(
        type(name) is str and is_state(value) for state in states for name, value in state.items())


def is_state(value):
    """Return whether this can be in an optimizer's state: finite tensors and numbers, None, lists of them."""
    if isinstance(value, list):
        return all(map(is_state, value))
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    return value is None or math.isfinite(value)


PARTS = {
    "config": lambda config: all(type(key) is str for key, _ in config.items()),
    "round": is_count,
    "weights": lambda weights: weights and are_finite(weights),
    "local": lambda sites: all(map(are_finite, sites.values())),
    "statistics": lambda sites: all(map(are_finite, sites.values())),
    "prototypes": are_prototypes,
    "kept": lambda sites: all(map(is_kept, sites.values())),
    "history": lambda rows: type(rows) is list and all(
        len(row) == 8 and is_count(row[0]) and all(map(math.isfinite, row[4].values())) for row in rows),
    "content": lambda sites: all(math.isfinite(value) for files in sites.values()
                                 for of_file in files.values() for value in of_file),
    "seconds": math.isfinite,
    "best": lambda best: is_count(best["round"]) and (best["dice"] is None or math.isfinite(best["dice"])),
}


def check_own(state):
    """Raise BadInput if what a method of one's own makes, G and memory, could not be read back."""
    memory = {site: kept["memory"] for site, kept in state["kept"].items() if "memory" in kept}
    parts = (("G", state["prototypes"], "{path: {class, an int: (K, D)}}, K at least 1, of finite numbers"),
             ("memory", memory, "of tensors and Python's numbers, texts, lists and dictionaries"))
    for name, part, form in parts:
        try:
            whole = torch.load(io.BytesIO(as_bytes(part)), weights_only=True)
        except Exception:  # noqa: BLE001 - what cannot be pickled or read raises many types
            whole = None
        if whole is None or (name == "G" and not is_whole("prototypes", whole)):
            raise BadInput(f"method: its {name} after round {state['round']} cannot be read back from a "
                           f"checkpoint; make it {form}")


# ---- What fits ----

def check_same_config(file, saved, wanted, free=FREE_ON_RESUME):
    """Raise BadInput, naming the keys, if a file was made under other settings; free: what may differ."""
    keys = (saved.keys() | wanted.keys()) - free
    other = sorted(key for key in keys if saved.get(key) != wanted.get(key))
    if other:
        changes = ", ".join(f"{key} ({saved.get(key)}, now {wanted.get(key)})" for key in other)
        raise BadInput(f"{file}: belongs to another config, differing in {changes}; set them back, "
                       "restore the file of this run, or choose another folder for the output")


def check_fits(file, what, found, expected, remedy="train it again"):
    """Raise BadInput unless {name: tensor} has just the names, shapes and types of `expected`."""
    other = found.keys() ^ expected.keys() or {name for name, value in found.items() if (
        value.shape, value.dtype) != (expected[name].shape, expected[name].dtype)}
    if other:
        raise BadInput(f"{file}: its {what} do not fit the network of the config ({min(other)}), {remedy}")
