"""Many runs, settings x seeds: finished ones are skipped, broken ones resumed, several at once."""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from config import BadInput, method_module
from datasets import load_sites
from experiments.bench import median_seconds, training_step
from methods.find import method_and_model
from scoring.history import rows_of

HERE = Path(__file__).parents[1]


class Training(NamedTuple):
    """One run: a setting, which is a row of a table, and a seed, and of several folds one."""

    setting: str
    seed: int
    folder: Path
    overrides: list          # of the config that all runs share
    config: SimpleNamespace  # the two together


def by_setting(runs, base="fedavg"):
    """Return {setting: [[run of each fold] of each seed]}, first the base, with which they are compared."""
    found = {}
    for run in sorted(runs, key=lambda run: run.setting != base):
        found.setdefault(run.setting, {}).setdefault(run.seed, []).append(run)
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in found.items()}


# ---- Training and scoring ----

def threads_of(jobs):
    """Return the number of threads, as text, of each of so many programs at once."""
    return os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


def start(command, jobs, log):
    """Start one of this project's programs, one of `jobs` at once, its output added to a file."""
    with open(log, "a") as stream:
        return subprocess.Popen([sys.executable, HERE / command[0], *command[1:]], stdin=subprocess.DEVNULL,
                                stdout=stream, stderr=stream,
                                env=os.environ | {"OMP_NUM_THREADS": threads_of(jobs)})


def is_finished(run):
    """Return whether the run has its result after all of its rounds."""
    file = run.folder / "result.json"
    return file.exists() and json.loads(file.read_text())["last"]["round"] >= run.config.rounds


def train_all(runs, base, jobs):
    """Train the runs that are not finished, as `work` does; base: the file of settings that all share."""
    waiting = [run for run in runs if not is_finished(run)]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    if waiting:
        print("timing a training step of each setting, to say how long they take", flush=True)
        print(f"about {math.ceil(minutes_of(waiting, jobs) / jobs)} min of training steps, from one step of "
              f"each setting, taken as {jobs} times as fast if {jobs} are done at once", flush=True)
    work([(run, ["train.py", "--config", base, *run.overrides, "resume=true"]) for run in waiting], jobs,
         "runs")


def score_all(runs, kinds, jobs):
    """Score the finished runs with each of these kinds of statistics, where no file of theirs has it yet."""
    for stats in kinds:  # one after the other, for a run has one cases_eval.csv
        work([(run, ["eval.py", "--run", run.folder, f"test_stats={stats}", "trust=true"])
              for run in runs if not find_cases(run, stats)], jobs,
             f"scorings with statistics of the {stats}")


def work(waiting, jobs, what):
    """Run the programs of [(run, command)], `jobs` at once; prints progress. Raises BadInput if one fails,
    when the others are done. If this program ends, so do they; a training is resumed the next time."""
    n, running, failed, begun = len(waiting), [], [], time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, command = waiting.pop(0)
                running.append((run, start(command, jobs, f"{run.folder}.log")))
            time.sleep(0.2)
            for run, process in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((run, process))
                how, left = "failed" if process.returncode else "done", len(waiting) + len(running)
                failed += [run] if process.returncode else []
                seconds = round((time.perf_counter() - begun) / (n - left) * left)
                print(f"{run.folder.name}: {how}; {left} of {n} {what} to go, "
                      f"about {timedelta(seconds=seconds)}", flush=True)
    finally:
        for _, process in running:
            process.terminate()
            process.wait()
    if failed:
        log = Path(f"{failed[0].folder}.log")
        lines = ["no output", *log.read_text(errors="replace").strip().splitlines()]
        raise BadInput(f"{log}: {len(failed)} of {n} {what} failed, this one with: "
                       f"{lines[-1]}; mend that and start again, the others are kept")


def minutes_of(runs, jobs):
    """Return the minutes that the steps of all rounds to go take, one run after the other, with the threads
    of one of `jobs`. A setting's step is timed once; the number of steps is that of the first run's sites."""
    torch.set_num_threads(int(threads_of(jobs)))
    sites, seconds, total = load_sites(runs[0].config), {}, 0.0
    for run in runs:
        name, config = run.setting, run.config
        if name not in seconds:
            seconds[name] = median_seconds({"step": training_step(config)}, 1)["step"]
        steps = sum(site.steps(config) for site in sites if site.name != config.hold_out)
        done = max((int(row["round"]) for row in rows_of(run.folder)), default=0)
        total += seconds[name] * steps * config.local_epochs * (config.rounds - done)
    return total / 60


# ---- What runs have left ----

def rows_in(file):
    """Return the rows of a metrics.csv or cases.csv as dictionaries; raises BadInput if there is none."""
    if not file.exists():
        raise BadInput(f"{file}: is not there yet, wait for the run's first round, or name another")
    with open(file, newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def find_cases(run, stats):
    """Return the rows of a run's cases under one kind of statistics, [] if they are in none of its files. A
    method that fixes whose statistics a prediction uses, as FedBN does, has these alone."""
    stats = getattr(method_module(run.config.method)[0], "FIXED", {}).get("test_stats", stats)
    files = [run.folder / name for name in ("cases.csv", "cases_eval.csv")]
    tables = [rows_in(file) for file in files if file.exists()]
    return next((rows for rows in tables if rows and rows[0]["statistics"] == stats), [])


def result_of(run):
    """Return {sites, dice, classes} of the best round's test, and `more`: its validation Dice, its number,
    and what is sent per site and round. Prototypes are counted in vectors of the length that the method
    declares, nan if it sends some and declares none."""
    best = json.loads((run.folder / "result.json").read_text())["best"]
    rows = [row for row in rows_in(run.folder / "metrics.csv") if row["split"] == "train"]
    weights, prototypes = (statistics.mean(int(row[name]) for row in rows)
                           for name in ("weight_bytes", "prototype_bytes"))
    method, model = method_and_model(run.config)
    length = next((length for length, _ in method.vectors(model).values()), math.nan)
    mean = best["test"]["mean"]
    return {"sites": best["test"]["sites"], "dice": mean["dice"], "classes": mean.get("classes"),
            "more": {"val": best["val"]["mean"]["dice"], "round": best["round"], "weight_bytes": weights,
                     "prototype_bytes": prototypes,
                     "prototypes": prototypes / 4 / length if prototypes else 0.0}}


def collect(runs, base, file):
    """Pack into a .tar.gz what the tables need of runs, finished or not: no weights, no pictures. From it
    `reproduce` draws the tables again, without data or a GPU."""
    names = ("config.yaml", "splits.json", "result.json", "metrics.csv", "cases.csv", "cases_eval.csv")
    with tarfile.open(file, "w:gz") as archive:
        for path in [base, *(run.folder / name for run in runs for name in names)]:
            if path.exists():
                archive.add(path, path.relative_to(base.parent))
    finished = sum((run.folder / "result.json").exists() for run in runs)
    print(f"written to {file}: {finished} finished of {len(runs)} runs, without weights")
