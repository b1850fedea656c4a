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

from config import BadInput, load_config
from rounds.reading import checkpoint_of

HERE = Path(__file__).parents[1]


class Training(NamedTuple):
    """One run: a setting, which is a row of a table, and a seed, and of several folds one."""

    setting: str
    seed: int
    folder: Path
    overrides: list


def by_setting(runs):
    """Return {setting: [[run of each fold] of each seed]}, FedAvg first: the others are compared with it."""
    found = {}
    for run in sorted(runs, key=lambda run: run.setting != "fedavg"):
        found.setdefault(run.setting, {}).setdefault(run.seed, []).append(run)
    return {name: list(seeds.values()) for name, seeds in found.items()}


def is_finished(run, rounds):
    """Return whether the run has its result after so many rounds."""
    file = run.folder / "result.json"
    return file.exists() and json.loads(file.read_text())["last"]["round"] >= rounds


def start_training(run, base, jobs):
    """Start train.py on a run, its output in the file FOLDER.log; returns the process."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, HERE / "train.py", "--config", base, *run.overrides, f"out={run.folder}",
               "resume=true"]
    with open(f"{run.folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                env={"OMP_NUM_THREADS": threads} | os.environ)


def train_all(runs, base, rounds, jobs):
    """Train the runs that are not finished, `jobs` at once; raises BadInput if one fails, when the others are
    done. If this program ends, so do the trainings, to be resumed."""
    waiting = [run for run in runs if not is_finished(run, rounds)]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    n, running, failed, start = len(waiting), [], [], time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running.append((run, start_training(run, base, jobs)))
            time.sleep(0.5)
            for run, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((run, process))
                how, left = "failed" if process.returncode else "done", len(waiting) + len(running)
                failed += [run] if process.returncode else []
                seconds = round((time.perf_counter() - start) / (n - left) * left)
                print(f"{run.folder.name}: {how}; {left} of {n} runs to go, "
                      f"about {timedelta(seconds=seconds)}", flush=True)
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    if failed:
        log = Path(f"{failed[0].folder}.log")
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise BadInput(f"{log}: {len(failed)} of {len(runs)} runs failed, this one with: "
                       f"{lines[-1]}; mend that and start again, the others are kept")


def read_rows(file):
    """Return the rows of a metrics.csv or cases.csv as dictionaries; raises BadInput if there is none."""
    try:
        with open(file, newline="", encoding="utf-8") as table:
            return list(csv.DictReader(table))
    except FileNotFoundError:
        raise BadInput(f"{file}: is not there yet, wait for the run's first round, or name another") from None


def cases_of(run, stats):
    """Return the rows of a run's cases under one kind of statistics. Those of its training are in cases.csv;
    with the others eval.py scores it once more, and leaves cases_eval.csv."""
    for file in (run.folder / "cases.csv", run.folder / "cases_eval.csv"):
        rows = read_rows(file) if file.exists() else []
        if rows and rows[0]["statistics"] == stats:
            return rows
    print(f"{run.folder}: scoring it with statistics of the {stats} too", flush=True)
    command = [sys.executable, HERE / "eval.py", "--run", run.folder, f"test_stats={stats}", "trust=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(f"{run.folder}: eval.py failed: {done.stderr.strip()}")
    return read_rows(run.folder / "cases_eval.csv")


def result_of(run):
    """Return {sites, dice, classes} of the best round's test, and `more`: its validation Dice, its number,
    and what is sent per site and round. Prototypes are counted in vectors, all of one length."""
    best = json.loads((run.folder / "result.json").read_text())["best"]
    rows = [row for row in read_rows(run.folder / "metrics.csv") if row["split"] == "train"]
    weights, prototypes = (statistics.mean(int(row[name]) for row in rows)
                           for name in ("weight_bytes", "prototype_bytes"))
    last = checkpoint_of(load_config(run.folder / "config.yaml"), run.folder / "last.pt")
    G, mean = last["prototypes"], best["test"]["mean"]
    length = next((P.shape[1] for path in G.values() for P in path.values()), 1)
    return {"sites": best["test"]["sites"], "dice": mean["dice"], "classes": mean.get("classes"),
            "more": {"val": best["val"]["mean"]["dice"], "round": best["round"], "weight_bytes": weights,
                     "prototype_bytes": prototypes, "prototypes": prototypes / 4 / length}}
