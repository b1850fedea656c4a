"""Many runs, settings x seeds: finished ones are skipped, broken ones resumed, several at once."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from config import BadInput
from experiments.paired import read_cases
from rounds.checkpoint import load_checkpoint


class Run(NamedTuple):
    """One training: a setting, which is a row of a table, a seed and, with folds, a fold."""

    setting: str
    seed: int
    folder: Path
    overrides: list
    fold: int | None = None


# ---- Training them ----

def rounds_done(run):
    """Return the last round in the run's metrics.csv, 0 if it has not begun."""
    file = run.folder / "metrics.csv"
    return max((int(row["round"]) for row in read_rows(file)), default=0) if file.exists() else 0


def is_finished(run, rounds):
    """Return whether the run has its result after so many rounds."""
    file = run.folder / "result.json"
    return file.exists() and json.loads(file.read_text())["last"]["round"] >= rounds


def start_training(run, base, jobs):
    """Start train.py on a run, its output in the file FOLDER.log; returns the process."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--config", str(base),
               *run.overrides, f"out={run.folder}", "resume=true"]
    with open(f"{run.folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                env={"OMP_NUM_THREADS": str(threads)} | os.environ)


def train_all(runs, base, rounds, jobs):
    """Train the runs that are not finished, `jobs` at once; raises BadInput if one fails.

    The others go on when one fails. If this program ends, so do the trainings, to be resumed.
    """
    waiting = [run for run in runs if not is_finished(run, rounds)]
    before = {run.folder: rounds_done(run) for run in waiting}
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    mine, running, failed, start = list(waiting), [], [], time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running.append((run, start_training(run, base, jobs)))
            time.sleep(0.5)
            ended = [(run, process) for run, process in running if process.poll() is not None]
            running = [pair for pair in running if pair not in ended]
            failed += [run for run, process in ended if process.returncode]
            show_progress(mine, before, rounds, start, ended, len(waiting) + len(running))
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    if failed:
        log = Path(f"{failed[0].folder}.log")
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise BadInput(f"{log}: {len(failed)} of {len(runs)} runs failed, this one with: "
                       f"{lines[-1]}; mend that and start again, the others are kept")


def show_progress(runs, before, rounds, start, ended, left):
    """Print a line for every run that ended, and on a terminal how far all of them are."""
    terminal = sys.stdout.isatty()
    if not ended and not terminal:
        return
    done = sum(rounds_done(run) - before[run.folder] for run in runs)
    wanted = sum(max(1, rounds - before[run.folder]) for run in runs)
    spent = time.perf_counter() - start
    time_left = timedelta(seconds=round(spent * (wanted - done) / done)) if done else "unknown"
    state = f"{left} of {len(runs)} runs to go, {min(1, done / wanted):.0%} done, left {time_left}"
    for run, process in ended:
        what = "failed" if process.returncode else "done"
        fold = "" if run.fold is None else f", fold {run.fold}"
        print("\r\033[K" * terminal + f"{run.setting}, seed {run.seed}{fold}: {what}; {state}", flush=True)
    if terminal and left:
        print(f"\r{state}\033[K", end="", flush=True)


# ---- What they found ----

def cases_of(run, kind, split, statistics):
    """Return the rows of a run's cases of one kind of round (best or last) and split, under one kind of
    statistics; eval.py is run for those that training did not use, and leaves cases_eval.csv."""
    for name in ("cases.csv", "cases_eval.csv", None):
        if name is None:
            score_again(run, statistics)
        rows = read_cases(run.folder / (name or "cases_eval.csv")) if (
            name is None or (run.folder / name).exists()) else []
        if rows and rows[0]["statistics"] == statistics:
            return [row for row in rows if (row["kind"], row["split"]) == (kind, split)]
    raise BadInput(f"{run.folder}: eval.py gave no cases with statistics of the {statistics}")


def score_again(run, statistics):
    """Have eval.py score a run with the other kind of statistics; raises BadInput if it fails."""
    command = [sys.executable, str(Path(__file__).parents[1] / "eval.py"), "--run", str(run.folder),
               f"test_stats={statistics}", "trust=true"]
    print(f"{run.folder}: scoring it with statistics of the {statistics} too", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        raise BadInput(f"{run.folder}: eval.py failed: {said[-1]}")


def read_rows(file):
    """Return the rows of a metrics.csv as dictionaries."""
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def result_of(run):
    """Return {sites: {site: test scores}, dice, val, round, what is sent per site and round}.

    Of the best round. Prototypes are counted in vectors, all of one length.
    """
    best = json.loads((run.folder / "result.json").read_text())["best"]
    rows = [row for row in read_rows(run.folder / "metrics.csv") if row["split"] == "train"]
    sent = {kind: statistics.mean(int(row[f"{kind}_bytes"]) for row in rows)
            for kind in ("weight", "prototype")}
    G = load_checkpoint(run.folder / "last.pt")["prototypes"]
    length = next((P.shape[1] for path in G.values() for P in path.values()), 1)
    return {"sites": best["test"]["sites"], "dice": best["test"]["mean"]["dice"],
            "val": best["val"]["mean"]["dice"], "round": best["round"],
            "weight_bytes": sent["weight"], "prototype_bytes": sent["prototype"],
            "prototypes": sent["prototype"] / 4 / length}
