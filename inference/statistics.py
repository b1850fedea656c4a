"""Whose batch-norm statistics normalise new images."""

import hashlib

import torch

from config import BadInput
from datasets import seeded
from rounds.checkpoint import are_tensors, as_bytes, check_fits, load_whole, save
from scoring.norm_statistics import (
    AT_MOST,
    batch_norms,
    collect_statistics,
    parts_of,
    statistics_like,
)
from sites.readers import read_unlabelled
from unet import mixed_precision


def choose(site, model, checkpoint, config):
    """Return (statistics, what was chosen) without looking at any input; None: those of the hospital.

    site: a site of the run, or None. {} normalises each case by itself. Raises BadInput.
    """
    known = checkpoint["statistics"].keys() | checkpoint["local"].keys()
    if site is not None and site not in known:
        raise BadInput(f"site: the run has no {site} to take the statistics of, "
                       + (f"name one of {', '.join(sorted(known))}" if known else "leave it out"))
    if not batch_norms(model):
        return {}, "none: the network has no batch norm"
    if config.test_stats == "case":
        return {}, "of each case itself"
    if site is not None:
        return checkpoint["statistics"][site], f"of the run's site {site}"
    return None, ""


def of_hospital(kept, weights, model, files, name, config, device):
    """Return (statistics, what they are) of a hospital that took no part, kept in the file `kept`.

    An earlier call with the same weights has left them there; else they are collected from the inputs.
    """
    mark = hashlib.sha256(as_bytes(weights)).hexdigest()
    stored = read_kept(kept)
    if stored.get("weights") == mark:
        check_fits(kept, "statistics", stored["statistics"], statistics_like(model))
        whose = f"of the input images of an earlier call, kept in {kept}"
        print(f"statistics {whose}; for another hospital give another out=FOLDER", flush=True)
        return stored["statistics"], whose
    print("collecting statistics of the input images themselves, unlabelled", flush=True)
    statistics = of_inputs(model, files, name, config, device)
    save(kept, as_bytes({"weights": mark, "statistics": statistics}))
    return statistics, "of the input images themselves, unlabelled"


def of_inputs(model, files, name, config, device):
    """Return the statistics of up to 64 slices of the inputs, a seeded choice.

    name: of the hospital, which seeds the choice as it does in eval.py. Files that cannot be read are
    left out; raises BadInput if none can.
    """
    slices = [(file, s) for file in files for s in range(slices_in(file, config))]
    if not slices:
        raise BadInput(f"{files[0]}: no input can be read, so there is nothing to take statistics of")
    order = torch.randperm(len(slices), generator=seeded(config.seed, name, "statistics"))
    chosen = [slices[i] for i in order[:AT_MOST].tolist()]
    images = {}
    for file in dict.fromkeys(file for file, _ in chosen):
        sample = read_unlabelled(file, config.task, config.image_size)
        images |= {(file, s): sample.images[s].clone() for of, s in chosen if of == file}
    batches = (torch.stack([images[chosen[i]] for i in part]).to(device, memory_format=torch.channels_last)
               for part in parts_of(len(chosen), config.batch_size))
    with mixed_precision(config, device):
        return collect_statistics(model, batches)


def read_kept(file):
    """Return what `of_hospital` kept in a file, {} if there is none or it is damaged."""
    try:
        stored = load_whole(file) if file.exists() else {}
    except BadInput:
        return {}  # it is made anew
    whole = isinstance(stored, dict) and stored.keys() == {"weights", "statistics"} and are_tensors(
        stored["statistics"])
    return stored if whole else {}


def slices_in(file, config):
    """Return the number of slices of a file, 0 if it cannot be read."""
    try:
        return len(read_unlabelled(file, config.task, config.image_size).images)
    except BadInput:
        return 0
