"""Train: python train.py --config config.yaml [key=value ...]"""

import csv
import io
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

import eval as evaluation
from config import BadInput, Parser, as_yaml, load_config, run_program
from datasets import load_sites, read_splits, splits_of
from federated import Diverged, SiteFailed, federated_round
from methods.baselines import method_of
from scoring.norm_statistics import site_statistics
from unet import build_model

COLUMNS = ("round", "split", "site", "dice", "loss_dice", "loss_contrast", "loss_consistency",
           "seconds", "weight_bytes", "prototype_bytes")


def train(config):
    """Run all rounds of `config`, leaving its run folder complete; raises BadInput, Diverged,
    SiteFailed."""
    out, device = Path(config.out), evaluation.pick_device(config.device)
    check_run_folder(out, config)
    sites = load_sites(config)
    training_sites = [site for site in sites if site.train_slices]
    if not training_sites:
        raise BadInput("hold_out: no other site has a training case, set it to none"
                       if config.hold_out else
                       f"{config.splits}: no site has a training case, add some to the splits")
    method = method_of(config)
    model = build_model(config, method.front).to(device)
    state = start_or_resume(model, sites, config, device)
    prepare_run_folder(out, sites, config)

    def run_round(t):
        return federated_round(model, training_sites, state["weights"], state["prototypes"],
                               state["optimizers"], t, config, show_step(t), method)

    names = [site.name for site in sites]
    print(header(names), flush=True)
    run_rounds(state, config, run_round, lambda: validate(model, state, sites, config, device), names)
    finish(out, sites, config, device, state["seconds"])


def run_rounds(state, config, run_round, score, names=()):
    """Run the rounds after `state`, which is brought up to date and saved after each.

    run_round(t) -> w, G, updates; score() -> validation scores of state["weights"]; names: of the
    sites, if they are known (between hospitals they come and go).
    """
    for t in range(state["round"] + 1, config.rounds + 1):
        start, scores = time.perf_counter(), {}
        w, G, updates = run_round(t)
        state |= {"round": t, "weights": w, "prototypes": G, "statistics": {}}
        if t % config.eval_every == 0 or t == config.rounds:
            scores = score()
        state["seconds"] += time.perf_counter() - start
        state["history"] += history_rows(t, updates, scores)
        save_round(Path(config.out), state, is_best=note_best(state, scores))
        seen = list(scores["sites"]) if scores else names or [u.site for u in updates]
        if seen != names:
            names = seen
            print(header(names))
        seconds = time.perf_counter() - start
        print(round_line(t, updates, scores, names, config.rounds, seconds), flush=True)


# ---- The state of a run, which is what a checkpoint holds ----

def start_or_resume(model, sites, config, device):
    """Return the state after the last saved round, or that before round 1."""
    file = Path(config.out) / "last.pt"
    if config.resume and file.exists():
        state = evaluation.load_checkpoint(file, device)
        if "optimizers" not in state:
            raise BadInput(f"{file}: holds weights only and cannot be resumed, "
                           "train into another folder with out=FOLDER")
        evaluation.check_same_config(file, state["config"], vars(config))
        check_same_splits(file.with_name("splits.json"), splits_of(sites))
        if state["round"] > config.rounds:
            raise BadInput(f"rounds: {config.rounds} is less than the {state['round']} rounds that "
                           f"{file} has behind it, set rounds to at least that")
        print(f"resuming after round {state['round']} of {file}")
        state["config"] = vars(config)
        return state
    return {"format": evaluation.FORMAT, "config": vars(config), "round": 0,
            "weights": {name: value.clone() for name, value in model.state_dict().items()},
            "prototypes": {}, "optimizers": {}, "statistics": {}, "history": [], "seconds": 0.0,
            "best": {"round": 0, "dice": None}}


def check_same_splits(file, splits):
    """Raise BadInput if the data folder no longer gives the splits that the run began with."""
    if file.exists() and read_splits(file) != splits:
        raise BadInput(f"{file}: differs from the splits of the data now, the data have changed; "
                       "restore them, or train into another folder with out=FOLDER")


def check_run_folder(out, config, mark="splits.json"):
    """Raise BadInput if the run folder holds something already that is not to be resumed.

    mark: the file by which a run folder is known.
    """
    if not config.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out}: exists already; continue that run with resume=true, "
                       "or train into another folder with out=FOLDER")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).exists():
        raise BadInput(f"{out}: is no run folder but holds files, choose another out=FOLDER")


def prepare_run_folder(out, sites, config):
    """Make the run folder and write config.yaml to it, and splits.json if there are sites."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"{out}: cannot be made ({problem.strerror}), "
                       "choose another out=FOLDER") from None
    save(out / "config.yaml", as_yaml(config).encode())
    if sites:
        save(out / "splits.json", as_json(splits_of(sites)))


def validate(model, state, sites, config, device):
    """Return validation scores of the global weights; puts the sites' statistics into `state`."""
    model.load_state_dict(state["weights"])
    if config.test_stats == "site":
        state["statistics"] = {site.name: site_statistics(model, site, config, device)
                               for site in sites}
    return evaluation.evaluate(model, sites, "val", config, device, state["statistics"],
                               distances=False)


def note_best(state, scores):
    """Return whether this round is the best so far on the sites' mean validation Dice.

    Without any site that has validation cases, the last round counts as the best.
    """
    if not scores:
        return False
    dice, best = scores["mean"]["dice"], state["best"]["dice"]
    if best is not None and (dice is None or dice <= best):
        return False
    state["best"] = {"round": state["round"], "dice": dice}
    return True


def save_round(out, state, is_best):
    """Write checkpoints and metrics.csv, each whole or not at all, last.pt before metrics.csv.

    A run killed in between is repeated from last.pt, which holds all rows of metrics.csv itself.
    """
    if is_best:
        kept = ("format", "config", "round", "weights", "statistics")
        save(out / "best.pt", as_bytes({name: state[name] for name in kept}))
    save(out / "last.pt", as_bytes(state))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["null" if value is None else value for value in row]
                     for row in state["history"])
    save(out / "metrics.csv", table.getvalue().encode())


def as_bytes(checkpoint):
    """Return the file content of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def as_json(content):
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def save(file, content):
    """Write bytes to a file so that at any moment it is the old one or the whole new one."""
    part = file.with_name(file.name + ".part")
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


# ---- What is reported ----

def history_rows(t, updates, scores):
    """Return round t's rows of metrics.csv: a train row a site, and a val row if it was scored."""
    terms = [name.removeprefix("loss_") for name in COLUMNS if name.startswith("loss_")]
    rows = [(t, "train", u.site, None, *(u.losses.get(name, 0.0) for name in terms), u.seconds,
             size_in_bytes(u.weights), size_in_bytes(u.prototypes)) for u in updates]
    for name, score in (scores["sites"] if scores else {}).items():
        if score["cases"]:
            rows.append((t, "val", name, score["dice"], *[None] * 6))
    return rows


def size_in_bytes(tensors):
    """Return the number of bytes of all tensors in a nested dictionary."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_in_bytes(value) for value in tensors.values())


def show_step(t):
    """Return progress(site, step, steps), which shows on a terminal what is being worked on."""
    def progress(site, step, steps):
        if sys.stdout.isatty():
            print(f"\r{t:5d}  {site} {step}/{steps}\033[K", end="", flush=True)
    return progress


def header(names):
    """Return the titles over `round_line`."""
    sites = "".join(f"{name[:12]:>13}" for name in names)
    return (f"{'':32}validation Dice\n{'round':>5}{'L_dice':>8}{'contrast':>10}{'consist':>9}"
            f"{sites}{'mean':>7}{'s':>8}{'left':>17}")


def round_line(t, updates, scores, names, rounds, seconds):
    """Return one line on round t: mean loss terms, validation Dice per site, seconds, time left."""
    loss = {name: sum(u.losses.get(name, 0.0) for u in updates) / len(updates)
            for name in ("dice", "contrast", "consistency")}
    cells = [scores["sites"][name]["dice"] if scores else None for name in names]
    dice = "".join(f"{'-' if value is None else f'{value:.3f}':>13}" for value in cells)
    mean = scores["mean"]["dice"] if scores else None
    left = str(timedelta(seconds=round((rounds - t) * seconds)))
    line = (f"{t:5d}{loss['dice']:8.4f}{loss['contrast']:10.4f}{loss['consistency']:9.4f}{dice}"
            f"{'-' if mean is None else f'{mean:.3f}':>7}{seconds:8.1f}{left:>17}")
    return f"\r{line}\033[K" if sys.stdout.isatty() else line


def finish(out, sites, config, device, seconds):
    """Score test data once, with best and last round; write result.json and predictions.png.

    Returns the result.
    """
    result = evaluation.score_run(out, sites, config, device, seconds)
    save(out / "result.json", as_json(result))
    picture, content = evaluation.draw_predictions(out, sites, config, device), io.BytesIO()
    if picture:
        picture.save(content, "png")
        save(out / "predictions.png", content.getvalue())
    print(f"written to {out}: result.json, metrics.csv, predictions.png, best.pt, last.pt")
    return result


def main():
    """Train by a config file and its overrides."""
    parser = Parser(description=__doc__, epilog="every key of the config can be overridden")
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    try:
        train(config)
    except (Diverged, SiteFailed) as problem:
        advice = "lower lr and start again in another out=FOLDER" if isinstance(problem, Diverged) \
            else "mend that and go on with resume=true"
        print(f"error: {problem}; {advice}. "
              f"{Path(config.out) / 'last.pt'} holds the last good round, if there was one",
              file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    run_program(main)
