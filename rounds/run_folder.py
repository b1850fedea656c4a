"""The run folder: the state of the rounds so far, its checkpoints, and metrics.csv.

    last.pt  everything that the next round needs      best.pt  what the best round is scored with
"""

import csv
import io
import json
import time
from pathlib import Path

import torch

from config import BadInput, as_yaml
from datasets import read_splits, splits_of
from rounds.checkpoint import (
    FORMAT,
    as_bytes,
    check_fits,
    check_own,
    check_same_config,
    load_checkpoint,
    save,
)
from rounds.lock import LOCK

OF_THE_END = ("result.json", "cases.csv", "predictions.png", "curves.png")


class RunFolder:
    """A run folder on disk and the state in it, after the last saved round or before round 1."""

    def __init__(self, config, w, sites=(), device="cpu"):
        """Resume the run in config.out if it has a checkpoint, else begin it from the weights w. sites: those
        of one process; between hospitals the server knows none. Raises BadInput."""
        self.out, self.config = Path(config.out), config
        last = self.out / "last.pt"
        if config.resume and last.exists():
            self.state = load_to_resume(last, sites, config, device)
            check_fits(last, "weights", self.state["weights"], w)
            print(f"resuming after round {self.state['round']} of {last}")
        else:
            self.state = {"format": FORMAT, "round": 0, "prototypes": {}, "kept": {},
                          "history": [], "seconds": 0.0, "best": {"round": 0, "dice": None},
                          "weights": {name: value.clone() for name, value in w.items()}}
        self.state["config"] = vars(config)
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

    def lacks_scores(self):
        """Return whether the last saved round is due for validation and has no scores yet."""
        t = self.state["round"]
        scored = any(row[0] == t and row[1] == "val" for row in self.state["history"])
        return t > 0 and self.is_due(t) and not scored

    def save(self, t, w, G, updates, scores=None, statistics=None):
        """Save round t: weights, prototypes, updates, and validation if it had one; raises as `check_own`."""
        state = self.state
        state |= {"round": t, "weights": w, "prototypes": G, "statistics": statistics or {}}
        state["local"] = {site: kept["local"] for site, kept in self.kept.items()}
        state["seconds"] += self.seconds()
        state["history"] += train_rows(t, updates)
        check_own(state)
        self.score(scores)

    def score(self, scores):
        """Save the run with the validation scores of its last round, None if it has none.

        A run killed between two of the files goes on from last.pt, which holds all rows of metrics.csv."""
        state = self.state
        state["history"] += val_rows(state["round"], scores)
        if note_best(state, scores):
            names = ("format", "config", "round", "weights", "local", "statistics")
            save(self.out / "best.pt", as_bytes({name: state[name] for name in names}))
        save(self.out / "last.pt", as_bytes(state))
        save(self.out / "metrics.csv", as_csv(state["history"]))


# ---- Before the first round ----

def load_to_resume(file, sites, config, device):
    """Return the state in last.pt; raises BadInput if it is of other settings, data or weights alone."""
    state = load_checkpoint(file, device)
    if "kept" not in state:
        raise BadInput(f"{file}: holds weights only and cannot be resumed, "
                       "train into another folder with out=FOLDER")
    check_same_config(file, state["config"], vars(config))
    splits = file.with_name("splits.json")
    if splits.exists() and read_splits(splits) != splits_of(sites):
        raise BadInput(f"{splits}: differs from the splits of the data now, the data have changed; "
                       "restore them, or train into another folder with out=FOLDER")
    if state["round"] > config.rounds:
        raise BadInput(f"rounds: {config.rounds} is less than the {state['round']} rounds that are done in "
                       f"{file}, set rounds to at least that")
    return state


def check_run_folder(config, mark="splits.json"):
    """Raise BadInput if the run folder holds something already that is not to be resumed. mark: the file by
    which a run folder is known, the first that is written."""
    out = Path(config.out)
    names = {path.name for path in (out.iterdir() if out.is_dir() else ())
             if path.name != LOCK and path.suffix != ".part"}
    if names and not config.resume:
        raise BadInput(f"{out}: exists already; continue that run with resume=true, "
                       "or train into another folder with out=FOLDER")
    if names and mark not in names:
        raise BadInput(f"{out}: is no run folder but holds files, choose another out=FOLDER")


def prepare_run_folder(out, sites, config):
    """Make the run folder and write to it splits.json, if there are sites, and config.yaml."""
    out.mkdir(parents=True, exist_ok=True)
    if sites:
        save(out / "splits.json", as_json(splits_of(sites)))
    save(out / "config.yaml", as_yaml(config).encode())


def note_best(state, scores):
    """Return whether this round is the best so far on the sites' mean validation Dice. Without any site that
    has validation cases, the last round counts as the best."""
    if not scores:
        return False
    dice, best = scores["mean"]["dice"], state["best"]["dice"]
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
        if score["cases"]:
            rows += [(t, split, site, part["dice"], {}, None, None, None) for split, part in parts.items()]
    return rows


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
