"""Predictions, their scores, and the result of a run: what training, eval.py and predict.py share."""

import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

from config import VOLUMES, BadInput, class_name
from datasets import read_splits
from methods.find import method_and_model
from rounds.checkpoint import check_fits, load_checkpoint, save
from rounds.run_folder import as_json
from scoring import pictures
from scoring.metrics import mean_scores, score, site_scores
from scoring.norm_statistics import batch_norms, norm_statistics, own_network, statistics_like
from scoring.results import KINDS, SCORED, as_table, case_rows, explained, print_result
from unet import mixed_precision

AT_ONCE = 32  # slices in one pass of a prediction


def pick_device(name):
    """Return the torch device of the key `device`; raises BadInput if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: this machine has no {name}, set it to auto or cpu")
    return torch.device(name)


# ---- Predictions and scores ----

@torch.no_grad()
def logits_of(model, sample, config, device):
    """Yield the logits (s, C, H, W) of a sample's slices, resized (bilinear) to its file's own grid, at most
    32 at a time. Nothing but this sample passes through the network, which is from `own_network`."""
    for part in sample.images.tensor_split(-(-len(sample.images) // AT_ONCE)):  # of nearly one length
        x = part.to(device, memory_format=torch.channels_last)
        with mixed_precision(config, device):
            logits = model(x)
        yield functional.interpolate(logits.float(), sample.truth.shape[1:], mode="bilinear")


def predict(model, sample, config, device):
    """Return the classes of one sample on its file's own grid, (S, H, W) uint8: argmax."""
    return np.concatenate([logits.argmax(1).to(torch.uint8).cpu().numpy()
                           for logits in logits_of(model, sample, config, device)])


def score_sample(prediction, sample, config, distances=True):
    """Return (slice, class, scores) of each case and foreground class of a sample; prediction: (S, H, W).

    A volume is one case, in 3-D, or each of its slices with organ; else the slice is None."""
    if config.task in VOLUMES and config.eval_slices == "all":
        cases = [(None, prediction, sample.truth, sample.spacing)]
    else:
        cases = [(s if config.task in VOLUMES else None, found, truth, sample.spacing[1:])
                 for s, (found, truth) in enumerate(zip(prediction, sample.truth))
                 if config.eval_slices == "all" or truth.any()]
    return [(s, j, score(found == j, truth == j, spacing, distances))
            for s, found, truth, spacing in cases for j in range(1, config.classes)]


def evaluate(model, sites, split, config, device, statistics, local, distances=True, rows=None):
    """Return {"sites": {NAME: {dice, hd95, assd, misses, cases}}, "mean": {...}} of one split.

    statistics, local: {site name: ...}, what a site's `own_network` has besides the global weights.
    distances=False: Dice only, as during training. rows: a list to which every case's row is added."""
    scores = {}
    for site in sites:
        samples, cases = getattr(site, split), {class_name(config, j): [] for j in range(1, config.classes)}
        if samples:
            network = own_network(model, statistics.get(site.name, {}), local.get(site.name, {}))
        for sample in samples:
            found = score_sample(predict(network, sample, config, device), sample, config, distances)
            for _, j, of_case in found:
                cases[class_name(config, j)].append(of_case)
            if rows is not None:
                rows += case_rows(split, sample, found, site.name, config)
        scores[site.name] = site_scores(cases)
    return {"sites": scores, "mean": mean_scores(scores)}


def validate(model, w, kept, sites, config, device):
    """Return validation scores of the global weights w, and the statistics used, {site name: ...}. kept:
    {site name: what it keeps}, its local weights among it."""
    local = {site: of_site["local"] for site, of_site in kept.items()}
    model.load_state_dict(w)
    statistics = site_statistics(model, {}, local, sites, config, device)
    return evaluate(model, sites, "val", config, device, statistics, local, distances=False), statistics


def site_statistics(model, stored, local, sites, config, device):
    """Return {site name: statistics of its norm layers}: those stored, collected where there are none. {}
    with test_stats: case, and for a network without batch norm."""
    if config.test_stats == "case" or not batch_norms(model):
        return {}
    return {site.name: stored[site.name] if site.name in stored
            else norm_statistics(own_network(model, {}, local.get(site.name, {})), site, config, device)
            for site in sites}


# ---- A run ----

def model_of(checkpoint, file, device):
    """Return the checkpoint's network; raises BadInput if what it holds does not fit its config."""
    try:
        config = SimpleNamespace(**checkpoint["config"])
        model = method_and_model(config)[1]
        model.load_state_dict(checkpoint["weights"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as problem:
        reason = str(problem).splitlines()[0]
        raise BadInput(f"{file}: has weights that do not fit its config ({reason}), train it again") from None
    for weights in checkpoint["local"].values():
        check_fits(file, "local weights", weights, {name: value for name, value in model.state_dict().items()
                                                    if name in weights})
    for of_site in checkpoint["statistics"].values():
        check_fits(file, "statistics", of_site, statistics_like(model))
    return model.to(device)


def load_run(file, sites, config, device):
    """Return a checkpoint's round, its network, and its sites' statistics and local weights."""
    checkpoint = load_checkpoint(file)
    model, local = model_of(checkpoint, file, device), checkpoint["local"]
    statistics = site_statistics(model, checkpoint["statistics"], local, sites, config, device)
    return checkpoint["round"], model, statistics, local


def score_run(folder, sites, config, device, seconds):
    """Return result.json's content for the run in `folder`, and cases.csv's; print the tables. seconds: what
    was spent before; that of scoring is added. Training and eval.py both end here."""
    start, result, cases = time.perf_counter(), {}, []
    splits = read_splits(folder / "splits.json")
    foreign = [site.name for site in sites if not splits.get(site.name, {}).get("train")]
    for kind in KINDS:
        t, model, *own = load_run(folder / f"{kind}.pt", sites, config, device)
        rows = []
        result[kind] = {"round": t} | {split: evaluate(model, sites, split, config, device, *own, rows=rows)
                                       for split in SCORED}
        cases += [{"kind": kind} | row for row in rows]
    normed = bool(batch_norms(model))
    print_result(result, config, normed)
    result = explained(result, config, normed, foreign, seconds + time.perf_counter() - start)
    return result, as_table(cases)


def finish(folder, sites, config, device, seconds):
    """Score test data once, with best and last round; write result.json, cases.csv, predictions.png. Returns
    the result."""
    result, cases = score_run(folder, sites, config, device, seconds)
    save(folder / "result.json", as_json(result))
    save(folder / "cases.csv", cases)
    if picture := draw_predictions(folder, sites, config, device):
        save(folder / "predictions.png", pictures.as_png(picture))
    print(f"written to {folder}: result.json, cases.csv, metrics.csv, predictions.png, best.pt, last.pt")
    return result


def draw_predictions(folder, sites, config, device):
    """Return a picture of the best round, a row a site: two test cases' image, truth, prediction. Of a volume
    it shows the slice with most organ. None if no site has test cases."""
    _, model, statistics, local = load_run(folder / "best.pt", sites, config, device)
    rows = []
    for site in sites:
        network = own_network(model, statistics.get(site.name, {}), local.get(site.name, {}))
        samples = list({sample.case: sample for sample in site.test}.values())[:2]
        if samples:
            tiles = [prediction_tiles(network, sample, config, device) for sample in samples]
            key = "" if rows else pictures.legend([class_name(config, j) for j in range(config.classes)])
            rows.append((f"{site.name}: {', '.join(sample.case for sample in samples)}{key}",
                         [tile for row in tiles for tile in row]))
    titles = ["image", "truth: green", "prediction: red, truth: green"] if config.classes == 2 else \
        ["image", "truth", "prediction"]
    return pictures.contact_sheet(rows, 2 * titles) if rows else None


def prediction_tiles(network, sample, config, device):
    """Return three tiles of a sample's slice with most foreground: plain, with truth, with both. With more
    than two classes the last has the prediction alone."""
    image, with_truth = pictures.outlined_tiles(sample, sample.truth, config.classes, pictures.GREEN)
    found = predict(network, sample, config, device)[pictures.fullest_slice(sample.truth)]
    below = with_truth if config.classes == 2 else image
    return [image, with_truth, pictures.draw_classes(below, found, config.classes, pictures.RED)]
