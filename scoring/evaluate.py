"""Predictions, their scores, and the result of a run: what training, eval.py and predict.py share."""

import time

import torch
from torch.nn import functional

from config import VOLUMES, BadInput, class_name, method_module
from rounds.checkpoint import save
from rounds.run_folder import as_json
from scoring import pictures
from scoring.drawn import draw_predictions
from scoring.metrics import mean_scores, overlap_scores, score, site_scores
from scoring.norms import batch_norms, network_of, one_by_one
from scoring.results import KINDS, SCORED, as_table, case_rows, explained, print_result
from unet import mixed_precision

SLICES_AT_ONCE = 32  # of a volume, in one pass of a prediction
IMAGES_AT_ONCE = 8   # in one pass, for more leave a CPU's cache


def pick_device(config):
    """Return the torch device of the key `device`, and have torch keep to `deterministic`; raises BadInput if
    this machine lacks the device."""
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:  # setting it takes 2 seconds
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)  # names what is not
    best = "cuda" if torch.cuda.is_available() else "cpu"
    name = best if config.device == "auto" else config.device
    if name != "cpu" and (torch.device(name).index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: this machine has no {name}, set it to auto or cpu")
    return torch.device(name)


# ---- Predictions and scores ----

def logits_of(model, sample, config, device):
    """Yield the logits (s, C, H, W) of a sample's slices, resized (bilinear) to its file's own grid, at most
    32 at a time; with tiles strips (1, C, h, W) of the picture, from top to bottom. Nothing but this sample
    passes through the network, which is from `own_network`."""
    if config.tiles:
        from scoring.tiled import in_strips
        yield from in_strips(run_alone, model, sample, config, device)
        return
    for part in sample.images.tensor_split(-(-len(sample.images) // SLICES_AT_ONCE)):  # of nearly one length
        yield resized(run_alone(model, part, config, device), sample)


@torch.no_grad()
def run_alone(model, images, config, device):
    """Return the logits (S, C, h, w) of images (S, 3, h, w) in float32, without gradients."""
    with mixed_precision(config, device):
        return model(images.to(device, memory_format=torch.channels_last)).float()


def resized(logits, sample):
    """Return logits (S, C, h, w) on the grid of a sample's file, (S, C, H, W)."""
    return functional.interpolate(logits, sample.truth.shape[1:], mode="bilinear")


def predict(model, sample, config, device):
    """Return the classes of one sample on its file's own grid, (S, H, W) uint8."""
    return classes_of(logits_of(model, sample, config, device), config).cpu().numpy()


def classes_of(parts, config):
    """Return the classes (S, H, W) uint8 of a sample's logits, the parts of `logits_of`: argmax, and with
    keep_largest the largest connected part of each class."""
    found = torch.cat([logits.argmax(1).to(torch.uint8) for logits in parts], 1 if config.tiles else 0)
    if not config.keep_largest:
        return found
    from scoring.components import largest_parts
    return largest_parts(found, config.classes)


def predictions(model, site, split, config, device, statistics, local):
    """Yield (sample, its classes (S, H, W) uint8 on the device) of a site's split, as `predict` gives them.

    Images pass through the network several at a time; with test_stats: case each is still normalised by
    itself. statistics, local: {site name: ...}, what a site's network has besides the global weights."""
    samples = getattr(site, split)
    if not samples:
        return
    network = network_of(site.name, model, statistics, local)
    if config.task in VOLUMES or config.tiles:
        for sample in samples:
            yield sample, classes_of(logits_of(network, sample, config, device), config)
        return
    network = one_by_one(network) if config.test_stats == "case" else network
    for i in range(0, len(samples), IMAGES_AT_ONCE):
        part = samples[i:i + IMAGES_AT_ONCE]
        logits = run_alone(network, torch.cat([sample.images for sample in part]), config, device)
        for sample, own in zip(part, logits.split(1)):
            yield sample, classes_of([resized(own, sample)], config)


def score_sample(prediction, sample, config):
    """Return (slice, class, scores) of each case and foreground class of a sample; prediction: (S, H, W).

    A volume is one case, in 3-D, or each of its slices with organ; else the slice is None."""
    if config.task in VOLUMES and config.eval_slices == "all":
        cases = [(None, prediction, sample.truth, sample.spacing)]
    else:
        cases = [(s if config.task in VOLUMES else None, found, truth, sample.spacing[1:])
                 for s, (found, truth) in enumerate(zip(prediction, sample.truth))
                 if config.eval_slices == "all" or truth.any()]
    return [(s, j, score(found == j, truth == j, spacing))
            for s, found, truth, spacing in cases for j in range(1, config.classes)]


def evaluate(model, sites, split, config, device, statistics, local, rows=None, foreign=()):
    """Return {"sites": {NAME: {dice, hd95, assd, misses, images}}, "mean": {...}} of one split.

    statistics, local: as for `predictions`. rows: a list to which every case's row is added; foreign: as for
    `mean_scores`. A class that no mask of any site has is not scored: its Dice of 1 would say nothing."""
    scores = {}
    for site in sites:
        cases = {class_name(config, j): [] for j in range(1, config.classes)}
        for sample, found in predictions(model, site, split, config, device, statistics, local):
            found = score_sample(found.cpu().numpy(), sample, config)
            found = [(s, j, of_case) for s, j, of_case in found if j not in site.undrawn]
            for _, j, of_case in found:
                cases[class_name(config, j)].append(of_case)
            if rows is not None:
                rows += case_rows(split, sample, found, site.name, config)
        scores[site.name] = site_scores(cases)
    return {"sites": scores, "mean": mean_scores(scores, foreign)}


def validate(model, w, kept, sites, config, device):
    """Return validation scores of the global weights w, Dice alone, as `evaluate` does, and the statistics
    used, {site name: ...}. kept: {site name: what it keeps}, its local weights among it."""
    local = {site: of_site["local"] for site, of_site in kept.items()}
    model.load_state_dict(w)
    statistics = site_statistics(model, {}, local, sites, config, device)
    scores = {site.name: site_scores(dice_of_cases(
        predictions(model, site, "val", config, device, statistics, local), config, site.undrawn))
        for site in sites}
    return {"sites": scores, "mean": mean_scores(scores)}, statistics


def dice_of_cases(found, config, undrawn=()):
    """Return {class name: [score of each case, without distances]} of `predictions`, counted on the device,
    which is read once. Cases are those of `score_sample`; of the classes `undrawn` none is scored."""
    counts = []
    for sample, prediction in found:
        truth = torch.from_numpy(sample.truth).to(device=prediction.device)
        n = torch.stack([overlap(prediction == j, truth == j) for j in range(1, config.classes)])
        if config.eval_slices == "foreground":
            n = n[:, sample.truth.any((1, 2)).nonzero()[0].tolist()]
        counts.append(n.sum(1, keepdim=True) if config.task in VOLUMES and config.eval_slices == "all" else n)
    read = torch.cat(counts, 1).tolist() if counts else [[]] * (config.classes - 1)
    return {class_name(config, j): [overlap_scores(*n) for n in of_class] if j not in undrawn else []
            for j, of_class in enumerate(read, 1)}


def overlap(prediction, truth):
    """Return |P and T|, |P| and |T| of each slice of two bool masks (S, H, W), (S, 3)."""
    return torch.stack([(prediction & truth).sum((1, 2)), prediction.sum((1, 2)), truth.sum((1, 2))], 1)


def site_statistics(model, stored, local, sites, config, device):
    """Return {site name: statistics of its norm layers}: those stored, collected where there are none. {}
    with test_stats: case, and for a network without batch norm."""
    if config.test_stats == "case" or not batch_norms(model):
        return {}
    from scoring.norm_statistics import norm_statistics  # with test_stats: site alone
    return {site.name: stored[site.name] if site.name in stored
            else norm_statistics(network_of(site.name, model, {}, local), site, config, device)
            for site in sites}


# ---- A run ----

def with_weights(model, checkpoint, sites, config, device):
    """Load a checkpoint's weights into the network; return its sites' statistics and local weights."""
    model.load_state_dict(checkpoint["weights"])
    local = checkpoint["local"]
    if config.method == "local":
        method_module("local")[0].check_trained(local, [site.name for site in sites])
    return site_statistics(model, checkpoint["statistics"], local, sites, config, device), local


def score_run(checkpoints, model, sites, config, device, seconds, foreign):
    """Return result.json's content for a run, and cases.csv's rows; print the tables. checkpoints: {best: ..,
    last: ..}; model: its network, with any weights; seconds: what was spent before; that of scoring is
    added. foreign: sites that took no part."""
    start, result, cases, scored = time.perf_counter(), {}, [], {}
    for kind in KINDS:
        t, rows = checkpoints[kind]["round"], []
        if t not in scored:  # the last round may be the best one
            own = with_weights(model, checkpoints[kind], sites, config, device)
            scored[t] = rows, {split: evaluate(model, sites, split, config, device, *own, rows, foreign)
                               for split in SCORED}
        result[kind] = {"round": t} | scored[t][1]
        cases += [{"kind": kind} | row for row in scored[t][0]]
    normed = bool(batch_norms(model))
    print_result(result, config, normed, foreign)
    result = explained(result, config, normed, foreign, seconds + time.perf_counter() - start)
    return result, cases


def finish(folder, checkpoints, model, sites, config, device, seconds):
    """Score test data once, with best and last round; write result.json, cases.csv, predictions.png. Returns
    the result."""
    foreign = [site.name for site in sites if not site.train]
    result, cases = score_run(checkpoints, model, sites, config, device, seconds, foreign)
    save(folder / "result.json", as_json(result))
    save(folder / "cases.csv", as_table(cases))
    statistics, local = with_weights(model, checkpoints["best"], sites, config, device)

    def find(site, sample):
        return predict(network_of(site.name, model, statistics, local), sample, config, device)
    if picture := draw_predictions(sites, config, [row for row in cases if row["kind"] == "best"], find):
        save(folder / "predictions.png", pictures.as_png(picture))
    print(f"written to {folder}: result.json, cases.csv, metrics.csv, predictions.png, best.pt, last.pt")
    return result
