"""Whose batch-norm statistics normalise new images."""

import contextlib
import hashlib

from config import BadInput, method_module
from inference.export import OF_CASE
from inference.inputs import read_ahead, read_unlabelled
from inference.outputs import STATISTICS
from rounds.checkpoint import as_bytes, save
from rounds.reading import load_whole
from scoring.norm_statistics import choose_slices, statistics_like, statistics_of
from sites.readers import slice_of, slices_of


def choose(site, model, checkpoint, config):
    """Return (statistics, what was chosen) without looking at any input; None: those of the hospital. site: a
    site of the run, or None. {} normalises each case by itself. Raises BadInput."""
    known = checkpoint["statistics"].keys() | checkpoint["local"].keys()
    if site is not None and site not in known:
        raise BadInput(f"site: the run has no {site} to take the statistics of, "
                       + (f"name one of {', '.join(sorted(known))}" if known else "leave it out"))
    if config.method == "local":
        method_module("local")[0].check_trained(checkpoint["local"], [site])
    if not statistics_like(model):
        return {}, "none: the network has no batch norm"
    if config.test_stats == "case":
        if site is not None and not checkpoint["local"].get(site):
            raise BadInput("site: with test_stats: case each image is normalised by itself, whatever its "
                           "site; leave site out")
        return {}, OF_CASE
    if site is not None:
        if site not in checkpoint["statistics"]:
            raise BadInput("site: the run was trained with test_stats: case and has no statistics of "
                           f"{site}; leave site out, for those of the input images, or test_stats")
        return checkpoint["statistics"][site], f"of the run's site {site}"
    return None, ""


def of_hospital(out, weights, model, files, name, config, device):
    """Return (statistics, what they are) of a hospital that took no part: those that an earlier call with the
    same weights left in the folder `out`, else, left there, those of up to 64 slices of the inputs, chosen as
    eval.py does for a site of this name. Raises BadInput if no file can be read."""
    kept, mark = out / STATISTICS, hashlib.sha256(as_bytes(weights)).hexdigest()
    with contextlib.suppress(BadInput, KeyError, TypeError):  # of a file that is missing or damaged
        stored = load_whole(kept)
        if stored["weights"] == mark:
            whose = f"of the input images of an earlier call, kept in {kept}"
            print(f"statistics {whose}; for another hospital give another out=FOLDER", flush=True)
            return stored["statistics"], whose
    whose = "of the input images themselves, unlabelled"
    print(f"collecting statistics {whose}", flush=True)
    slices = [(file, s) for file, sample in read_ahead(files, config) if not isinstance(sample, BadInput)
              for s in slices_of(sample)]
    if not slices:
        raise BadInput(f"{files[0]}: no input can be read, so there is nothing to take statistics of")
    chosen, images = choose_slices(slices, name, config), {}
    for file in {file for file, _ in chosen}:
        sample = read_unlabelled(file, config)
        images |= {(file, s): slice_of(sample, s)[0].clone() for of, s in chosen if of == file}
    statistics = statistics_of(model, [images[place] for place in chosen], config, device)
    save(kept, as_bytes({"weights": mark, "statistics": statistics}))
    return statistics, whose
