"""The run folder: the state of the rounds so far, its checkpoints, and metrics.csv.

    last.pt  everything that the next round needs      best.pt  what the best round is scored with
"""

import csv
import io
import json
import time
from pathlib import Path

import torch

from config import METHODS, BadInput, as_yaml
from datasets import SPLITS, splits_of
from rounds.checkpoint import FORMAT, NEEDED, as_bytes, save
from rounds.lock import LOCK
from sites.files import check_regular

SHARE = 0.05  # of a run's time that may go into writing checkpoints, its first and last round apart
OF_THE_END = ("result.json", "cases.csv", "predictions.png", "curves.png", "dice.png", "result_eval.json",
              "cases_eval.csv")


def mean_dice(scores):
    """Return the sites' mean validation Dice, or None."""
    return scores["mean"]["dice"]


class RunFolder:
    """A run folder on disk and the state in it, after the last saved round or before round 1.

    Rounds are written as often as that takes less than SHARE of the time, and at the end of `with`, however
    that comes: a kill loses the rounds since, which are then trained again to the same bits. Between
    hospitals every round is written, for a site keeps what belongs to its last two alone."""

    def __init__(self, config, w, sites=(), device="cpu"):
        """Resume the run in config.out if it has a checkpoint, else begin it from the weights w. sites: those
        of one process; between hospitals the server knows none. Raises BadInput."""
        self.out, self.config, self.alone = Path(config.out), config, bool(sites)
        self.state = {"format": FORMAT, "round": 0, "prototypes": {}, "kept": {}, "history": [],
                      "seconds": 0.0, "best": {"round": 0, "dice": None}, "content": content_of(sites),
                      "weights": {name: value.clone() for name, value in w.items()}}
        self.best = None  # as in best.pt
        if config.resume or config.init:
            from rounds.resume import start_of  # which most runs do not need
            found, self.best = start_of(config, self.out / "last.pt", self.state, sites, device)
            self.state |= found
        self.state["config"] = vars(config)
        self.began, self.writing, self.latest, self.unsaved = time.perf_counter(), 0.0, 0.0, {}
        prepare_run_folder(self.out, sites, config)
        for part in self.out.glob("*.part"):  # what a killed run left half written
            part.unlink()
        if self.state["round"]:  # a kill may have come between last.pt and metrics.csv
            save(self.out / "metrics.csv", as_csv(self.state["history"]))
        if self.state["round"] < config.rounds:  # it goes on, so the results of an earlier end go
            for name in OF_THE_END:
                (self.out / name).unlink(missing_ok=True)

    w = property(lambda self: self.state["weights"])     # global weights, a state dict
    G = property(lambda self: self.state["prototypes"])  # global prototypes, {path: {class: (K, D)}}
    kept = property(lambda self: self.state["kept"])     # {site: its `Update.kept`}, updated by the loop

    def checkpoints(self):
        """Return what best.pt and last.pt hold."""
        return {"best": self.best, "last": self.state}

    def rounds_left(self):
        """Yield the numbers of the rounds to go, and take the time of each until it is saved."""
        for t in range(self.state["round"] + 1, self.config.rounds + 1):
            self.start = time.perf_counter()
            yield t

    def seconds(self):
        """Return the seconds since this round began."""
        return time.perf_counter() - self.start

    def is_due(self, t):
        """Return whether round t is validated: every `eval_every` rounds, and the last."""
        return t % self.config.eval_every == 0 or t == self.config.rounds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write()

    def save(self, t, w, G, updates, scores=None, statistics=None):
        """Save round t: weights, prototypes, updates, and validation if it had one; raises as `check_own`."""
        state = self.state
        state |= {"round": t, "weights": w, "prototypes": G, "statistics": statistics or {}}
        state["local"] = {site: kept["local"] for site, kept in self.kept.items()}
        state["seconds"] += self.seconds()
        state["history"] = state["history"] + train_rows(t, updates)
        if self.config.method not in METHODS:
            from rounds.reading import (
                check_own,  # for what this project's own methods make can be read
            )
            check_own(state)
        self.score(scores)

    def score(self, scores, middle=mean_dice):
        """Save the run with the validation scores of its last round, None if it has none. middle: scores ->
        the Dice by which the best round is chosen."""
        state = self.state
        state["history"] = state["history"] + val_rows(state["round"], scores)
        if scores and note_best(state, middle(scores)):
            self.unsaved["best.pt"] = self.best = {name: state[name] for name in ("format", *NEEDED)}
        self.unsaved["last.pt"] = state | {"kept": dict(self.kept)}  # which the next round changes
        cheap = self.writing + self.latest <= SHARE * (time.perf_counter() - self.began)
        if cheap or not self.alone or state["round"] == self.config.rounds:
            self.write()

    def write(self):
        """Write what is not on disk yet, best.pt first: a run killed between two of the files goes on from
        last.pt, which holds all rows of metrics.csv."""
        start = time.perf_counter()
        for name in ("best.pt", "last.pt"):
            if name in self.unsaved:
                save(self.out / name, as_bytes(self.unsaved[name]))
        if "last.pt" in self.unsaved:
            save(self.out / "metrics.csv", as_csv(self.unsaved["last.pt"]["history"]))
        self.unsaved, self.latest = {}, time.perf_counter() - start
        self.writing += self.latest


# ---- Before the first round ----

def check_run_folder(config, mark="splits.json"):
    """Raise BadInput if the run folder holds something already that is not to be resumed. mark: the file by
    which a run folder is known, the first that is written."""
    out = Path(config.out)
    names = {path.name for path in (out.iterdir() if out.is_dir() else ())
             if path.name != LOCK and path.suffix != ".part"}
    if names and mark not in names:
        raise BadInput(f"{out}: is no run folder but holds files, choose another out=FOLDER")
    if names and not config.resume:
        raise BadInput(f"{out}: exists already; continue that run with resume=true, "
                       "or train into another folder with out=FOLDER")
    if config.init:
        check_regular(config.init)


def prepare_run_folder(out, sites, config):
    """Make the run folder and write to it splits.json, if there are sites, and config.yaml."""
    out.mkdir(parents=True, exist_ok=True)
    if sites:
        save(out / "splits.json", as_json(splits_of(sites)))
    save(out / "config.yaml", as_yaml(config).encode())


def note_best(state, dice):
    """Return whether this round is the best so far by its validation Dice. If that is None, for no site has
    validation cases, the last round counts as the best."""
    best = state["best"]["dice"]
    if best is not None and (dice is None or dice <= best):
        return False
    state["best"] = {"round": state["round"], "dice": dice}
    return True


# ---- Files ----

def train_rows(t, updates):
    """Return round t's rows `train` of the history, one a site, as `as_csv` reads them."""
    return [(t, "train", u.site, None, u.losses, u.seconds, size_in_bytes(u.weights),
             size_in_bytes(u.prototypes)) for u in updates]


def val_rows(t, scores):
    """Return round t's rows of the history, `val` of every site that was scored; with several foreground
    classes `val CLASS` of each too."""
    rows = []
    for site, score in (scores["sites"] if scores else {}).items():
        parts = {"val": score} | {f"val {j}": of_class for j, of_class in score.get("classes", {}).items()}
        if score["images"]:
            rows += [(t, split, site, part["dice"], {}, None, None, None) for split, part in parts.items()]
    return rows


def content_of(sites):
    """Return {site: {file: means}} of the images' channels and the masks, on a grid: by these a resumed run
    sees images that were exchanged under the same names."""
    return {site.name: {sample.name: [*sample.images[..., ::5, ::5].float().mean((0, 2, 3)).tolist(),
                                      sample.masks[..., ::5, ::5].float().mean().item()]
                        for split in SPLITS for sample in getattr(site, split)} for site in sites}


def size_in_bytes(tensors):
    """Return the number of bytes of all tensors in a nested dictionary."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_in_bytes(value) for value in tensors.values())


def as_csv(rows):
    """Return the content of metrics.csv: a column for every term of the loss that any row has."""
    terms = list(dict.fromkeys(term for row in rows for term in row[4]))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("round", "split", "site", "dice", *(f"loss_{term}" for term in terms),
                     "seconds", "weight_bytes", "prototype_bytes"))
    for *first, losses, seconds, weights, prototypes in rows:
        row = (*first, *map(losses.get, terms), seconds, weights, prototypes)
        writer.writerow("null" if value is None else value for value in row)
    return table.getvalue().encode()


def as_json(content):
    """Return the content of a JSON file."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
