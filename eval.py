"""Score a run again: python eval.py --run FOLDER [data=OTHER] [test_stats=case] [key=value ...]"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import PIL
import torch
import yaml
from torch.nn import functional

from check_data import contact_sheet, draw_outline, image_tile
from config import DEFAULTS, BadInput, Parser, load_config, run_program
from datasets import load_sites, read_splits
from methods.baselines import method_of
from scoring.metrics import definitions, format_table, mean_scores, score, site_scores, units
from scoring.norm_statistics import mixed_precision, parts_of, site_statistics, with_statistics
from unet import build_model

FORMAT = "fedbcs-1"
NEEDED = {"config", "round", "weights", "statistics"}
AT_ONCE = 32  # slices in one pass of a prediction
FREE_ON_RESUME = {"rounds", "out", "device", "resume"}
KINDS, SCORED = ("best", "last"), {"val": "validation", "test": "test"}
FREE_ON_EVAL = {"data", "device", "test_stats", "eval_slices", "case_pattern"}


# ---- Predictions and scores ----

@torch.no_grad()
def predict(model, sample, config, device):
    """Return the foreground of one sample on its file's own grid, (S, H, W) bool.

    model: from `with_statistics`. Nothing but this sample passes through the network, in
    consecutive parts of at most 32 slices; its logits are resized (bilinear) before the argmax.
    """
    found = []
    for part in parts_of(len(sample.images), AT_ONCE):
        x = sample.images[part[0]:part[-1] + 1].to(device, memory_format=torch.channels_last)
        with mixed_precision(config, device):
            logits = model(x)
        logits = functional.interpolate(logits.float(), sample.truth.shape[1:], mode="bilinear")
        found.append((logits.argmax(1) > 0).cpu().numpy())
    return np.concatenate(found)


def score_sample(prediction, sample, config, distances=True):
    """Return the scores of each case that a sample is: one image, one volume, or slices with organ.

    prediction: (S, H, W) bool. A volume is scored in 3-D, all else in 2-D.
    """
    if config.task == "prostate" and config.eval_slices == "all":
        return [score(prediction, sample.truth, sample.spacing, distances)]
    return [score(found, truth, sample.spacing[1:], distances)
            for found, truth in zip(prediction, sample.truth)
            if config.eval_slices == "all" or truth.any()]


def evaluate(model, sites, split, config, device, statistics, distances=True):
    """Return {"sites": {NAME: {dice, hd95, assd, misses, cases}}, "mean": {...}} of one split.

    statistics: {site name: `site_statistics`} for test_stats: site, else {}. A site without samples
    has None and cases 0. distances=False: Dice only, for the validation during training.
    """
    scores = {}
    for site in sites:
        samples, cases = getattr(site, split), []
        if samples:
            local = with_statistics(model, statistics[site.name] if statistics else {})
        for sample in samples:
            prediction = predict(local, sample, config, device)
            cases += score_sample(prediction, sample, config, distances)
        scores[site.name] = site_scores(cases)
    return {"sites": scores, "mean": mean_scores(scores)}


# ---- Checkpoints ----

def load_checkpoint(file, device="cpu"):
    """Return what train.py saved; raises BadInput if the file is missing, truncated or foreign."""
    advice = "give the folder of a run, or train it again"
    if not Path(file).is_file():
        raise BadInput(f"{file}: there is no such checkpoint; start the training, or go on with "
                       "it by resume=true")
    try:
        checkpoint = torch.load(file, map_location=device, weights_only=True)
    except Exception:  # noqa: BLE001 - what a foreign file raises has no common type
        raise BadInput(f"{file}: is truncated or no checkpoint; {advice}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT \
            or not NEEDED <= checkpoint.keys():
        raise BadInput(f"{file}: is no checkpoint of this program (format {FORMAT}); {advice}")
    return checkpoint | {"config": DEFAULTS | checkpoint["config"]}


def model_of(checkpoint, file, device):
    """Return the checkpoint's network; raises BadInput if its weights do not fit its config."""
    try:
        config = SimpleNamespace(**checkpoint["config"])
        model = build_model(config, method_of(config).front)
        model.load_state_dict(checkpoint["weights"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as problem:
        reason = str(problem).splitlines()[0]
        raise BadInput(f"{file}: has weights that do not fit its config ({reason}), "
                       "train it again") from None
    return model.to(device)


def check_same_config(file, saved, wanted):
    """Raise BadInput, naming the keys, if a checkpoint was made under other settings."""
    keys = (saved.keys() | wanted.keys()) - FREE_ON_RESUME
    other = sorted(key for key in keys if saved.get(key) != wanted.get(key))
    if other:
        changes = ", ".join(f"{key} ({saved.get(key)}, now {wanted.get(key)})" for key in other)
        raise BadInput(f"{file}: belongs to another config, differing in {changes}; set them back, "
                       "or train into another folder with out=FOLDER")


def local_statistics(model, checkpoint, sites, config, device):
    """Return {site name: statistics}: those in the checkpoint, collected where it has none."""
    if config.test_stats == "case":
        return {}
    stored = checkpoint["statistics"]
    return {site.name: stored[site.name] if site.name in stored
            else site_statistics(model, site, config, device) for site in sites}


def score_checkpoint(file, sites, config, device):
    """Return {round, val, test} of one checkpoint, each split as `evaluate` gives it."""
    checkpoint = load_checkpoint(file)
    model = model_of(checkpoint, file, device)
    statistics = local_statistics(model, checkpoint, sites, config, device)
    scores = {split: evaluate(model, sites, split, config, device, statistics)
              for split in SCORED}
    return {"round": checkpoint["round"]} | scores


# ---- The result of a run ----

def score_run(folder, sites, config, device, seconds):
    """Return result.json's content for the run in `folder` and print its tables.

    seconds: what was spent before; that of scoring is added. Training and eval.py both end here.
    """
    start, result = time.perf_counter(), {}
    splits = read_splits(folder / "splits.json")
    foreign = [site.name for site in sites if not splits.get(site.name, {}).get("train")]
    for kind in KINDS:
        result[kind] = score_checkpoint(folder / f"{kind}.pt", sites, config, device)
        print_scores(kind, result[kind], config)
    return explained(result, config, foreign, seconds + time.perf_counter() - start)


def print_scores(kind, scores, config):
    """Print the tables of `best` or `last`, whose scores are {round, val, test}."""
    for split, title in SCORED.items():
        print(f"\n{kind} round {scores['round']}, {title}, statistics of the {config.test_stats}")
        print(format_table(scores[split], units(config)["hd95"]), flush=True)


def explained(result, config, foreign, seconds):
    """Return the result with its units, its definitions and the facts of the run."""
    return (result | {"units": units(config), "definitions": definitions(config, foreign)}
            | run_facts(seconds))


def run_facts(seconds):
    """Return {commit, versions, peak_mb, seconds}; None for what this machine cannot tell."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "numpy": np.__version__, "nibabel": nibabel.__version__, "pillow": PIL.__version__,
                "pyyaml": yaml.__version__}
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], check=True, text=True,
                                cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"commit": commit, "versions": versions, "peak_mb": peak_mb(),
            "seconds": round(seconds, 1)}


def peak_mb():
    """Return the largest resident memory in MiB, plus the largest GPU allocation, or None."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round((resident + on_gpu) / 2**20, 1)


def draw_predictions(folder, sites, config, device):
    """Return a picture of the best round, a row a site: two test cases' image, truth, prediction.

    Of a volume it shows the slice with most organ. None if no site has test cases.
    """
    checkpoint, rows = load_checkpoint(folder / "best.pt"), []
    model = model_of(checkpoint, folder / "best.pt", device)
    statistics = local_statistics(model, checkpoint, sites, config, device)
    for site in sites:
        local = with_statistics(model, statistics.get(site.name, {}))
        samples = list({sample.case: sample for sample in site.test}.values())[:2]
        if samples:
            tiles = [prediction_tiles(local, sample, config, device) for sample in samples]
            rows.append((f"{site.name}: {', '.join(sample.case for sample in samples)}",
                         [tile for row in tiles for tile in row]))
    titles = ["image", "truth: green", "prediction: red, truth: green"]
    return contact_sheet(rows, 2 * titles) if rows else None


def prediction_tiles(local, sample, config, device):
    """Return three tiles of a sample's slice with most foreground: plain, with truth, with both."""
    s = int(sample.truth.sum((1, 2)).argmax())
    image = image_tile(sample, s)
    with_truth = draw_outline(image, sample.truth[s], (0, 255, 0))
    found = predict(local, sample, config, device)[s]
    return [image, with_truth, draw_outline(with_truth, found, (255, 0, 0))]


def main():
    """Print the tables of a run and its result as JSON, with the overrides that scoring allows."""
    start = time.perf_counter()
    allowed, parser = ", ".join(sorted(FREE_ON_EVAL)), Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {allowed}")
    given = parser.parse_intermixed_args()
    folder = Path(given.run)
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such run folder; give the one that train.py wrote")
    saved = load_config(folder / "config.yaml")
    config = load_config(folder / "config.yaml", given.overrides)
    changed = {argument.partition("=")[0] for argument in given.overrides}
    if changed - FREE_ON_EVAL:
        raise BadInput(f"{min(changed - FREE_ON_EVAL)}: is fixed by the run, leave it out; "
                       f"only {allowed} can be changed here")
    for file in (folder / "best.pt", folder / "last.pt"):
        check_same_config(file, load_checkpoint(file)["config"], vars(saved))
    splits, device = read_splits(folder / "splits.json"), pick_device(config.device)
    sites = load_sites(config, splits, strict="data" not in changed)
    result = score_run(folder, sites, config, device, time.perf_counter() - start)
    print(json.dumps(result, allow_nan=False))


def pick_device(name):
    """Return the torch device of the key `device`; raises BadInput if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: this machine has no {name}, set it to auto or cpu")
    return torch.device(name)


if __name__ == "__main__":
    run_program(main)
