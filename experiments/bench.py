"""Measure time and memory: python -m experiments.bench [--config config.yaml] [key=value ...]

The config and its overrides are those of the whole rounds, of which the second is measured. Prints a
table, and as its last line one JSON object. Times are medians of 5, taken in turn in one process; memory
is the peak resident size less that before the first step, in a process of its own that gives back at once
what it frees, as no other does (see settings/__init__.py). The rows `bf16` are with `amp: bf16`. It runs
on the GPU if there is one, and then has rows `graph`, with `graph: true`, and says how many kernels a step
launches and how often it waits for the device. A round's parts are training, validation, and saving what
last.pt holds.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from config import METHODS, load_config
from datasets import load_sites, store_on
from federated import Context, average_weights, local_update, make_optimizer
from fft_style import recalibrate, recalibrate_fourier
from methods.find import find_step, method_and_model
from rounds.checkpoint import as_bytes, save
from scoring.evaluate import pick_device, validate
from scoring.results import peak_mb
from settings.program import Parser, run_program

SETTING = {"task": "nuclei", "data": "demo", "out": "unused", "width": 32, "batch_size": 6}
PRINTED = {"step_s": (8, ".4f"), "step_ratio": (8, ".2f"), "peak_mb": (10, ".0f"), "memory_ratio": (8, ".2f"),
           "launches": (10, ""), "waits": (8, "")}  # of a training step: width and form


def rows_of_table():
    """Return {row: its overrides}: every method, FedAvg and FedBCS in bfloat16, and on a GPU as graphs."""
    rows = {name: [f"method={name}"] for name in METHODS}
    for kind, key in (("bf16", "amp=bf16"), ("graph", "graph=true")):
        if kind == "bf16" or torch.cuda.is_available():
            rows |= {f"{name} {kind}": [*words, key] for name, words in rows.items()
                     if name.split()[0] in ("fedavg", "fedbcs")}
    return rows


def training_step(config):
    """Return step(), a training step of a config on noise, 20 % of it foreground. It is a step of a last
    local epoch in a later round: with prototypes, 2 a class, and gathering."""
    device = pick_device(config)
    rules, model = method_and_model(config)
    model.to(device)
    optimizer = make_optimizer(model, config)
    w = {name: value.clone() for name, value in model.state_dict().items()}
    B, size = config.batch_size, config.image_size
    x, y = torch.rand(B, 3, size, size).to(device), (torch.rand(B, size, size) < 0.2).long().to(device)
    context = Context("bench", 2, w, {}, {}, {})
    with torch.no_grad():  # one image, so that this leaves little behind in the peak of memory
        rules.losses(model, x[:1], y[:1], context)
    G = rules.aggregate([rules.send(model, context)])
    context.G = {path: {j: P[:1].repeat(2, 1) for j, P in G[path].items()} for path in G}
    context.total = {}
    take = find_step(config, device)
    return lambda: take(rules, model, optimizer, x, y, context)


def fsr_passes():
    """Return {form: pass()}, forward and backward of FSR at (6, 64, 128, 128) in both forms."""
    z = torch.rand(6, 64, 128, 128).to(memory_format=torch.channels_last).requires_grad_()
    l = torch.full((6, 64, 1, 1), 0.5, requires_grad=True)
    forms = {"spatial": recalibrate, "rfft2": recalibrate_fourier}
    return {name: lambda form=form: form(z, l, l).sum().backward() for name, form in forms.items()}


def whole_round(file, overrides):
    """Return the seconds of round 2, the first with prototypes: of its training, validation and saving."""
    config = load_config(file, overrides)
    device, (method, model), kept = pick_device(config), method_and_model(config), {}
    sites, step = store_on(load_sites(config), device), find_step(config, device)
    model.to(device)
    w, G = {name: value.clone() for name, value in model.state_dict().items()}, {}
    for t in (1, 2):
        start = time.perf_counter()
        updates = [local_update(model, site, w, G, kept.get(site.name), t, config, method, take_step=step)
                   for site in sites]
        w, G = average_weights(updates), method.aggregate([u.prototypes for u in updates])
        kept = {update.site: update.kept for update in updates}
        trained = time.perf_counter()
        validate(model, w, kept, sites, config, device)
    validated = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "last.pt", as_bytes({"weights": w, "prototypes": G, "kept": kept}))
    return {"training": trained - start, "validation": validated - trained,
            "saving": time.perf_counter() - validated}


def median_seconds(calls, repeats=5):
    """Return {name: median seconds} of {name: call}, called in turn after two warm-ups: a graph is recorded
    in its second step."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def launches_and_waits(step):
    """Return how many kernels a step launches on the GPU and how often it waits for it; without one None."""
    if not torch.cuda.is_available():
        return None, None
    with torch.profiler.profile() as found:
        step()
    counts = {event.key: event.count for event in found.key_averages()}
    return tuple(sum(n for name, n in counts.items() if any(word in name for word in words))
                 for words in (("LaunchKernel", "GraphLaunch"), ("StreamSynchronize",)))


def peak_of_steps(*overrides):
    """Return the peak MB of three steps, less what was before; for a fresh process. On a GPU its own."""
    step, on_gpu = training_step(load_config(SETTING, overrides)), torch.cuda.is_available()
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else peak_mb()
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mb()) - before


def main():
    """Measure and print step times, FSR's time, peak memory and whole rounds."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=Path(__file__).parents[1] / "config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    rows, result = rows_of_table(), {"threads": torch.get_num_threads()}
    os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**17)  # of the processes below: glibc's own default
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = {name: pool.apply(peak_of_steps, words) for name, words in rows.items()}
    steps = {name: training_step(load_config(SETTING, words)) for name, words in rows.items()}
    seconds = median_seconds(steps)
    counts = {name: launches_and_waits(step) for name, step in steps.items()}  # graphs are recorded by now
    print(f"{'training step':18}{'s':>8}{'ratio':>8}{'peak MB':>10}{'ratio':>8}{'launches':>10}{'waits':>8}")
    for name in rows:
        found = dict(zip(PRINTED, (seconds[name], seconds[name] / seconds["fedavg"], peak[name],
                                   peak[name] / peak["fedavg"], *counts[name])))
        print(f"{name:18}" + "".join(f"{'-' if value is None else format(value, form):>{width}}"
                                     for value, (width, form) in zip(found.values(), PRINTED.values())))
        result |= {f"{name}_{what}": value for what, value in found.items()}
    fsr = median_seconds(fsr_passes())
    result |= {"step_ratio": result["fedbcs_step_ratio"], "memory_ratio": result["fedbcs_memory_ratio"],
               "fsr_spatial_s": fsr["spatial"], "fsr_rfft2_s": fsr["rfft2"],
               "fsr_ratio": fsr["rfft2"] / fsr["spatial"]}
    print(f"FSR layer, s: spatial {fsr['spatial']:.3f}, rfft2 {fsr['rfft2']:.3f}, "
          f"ratio {result['fsr_ratio']:.2f}")
    for name in (name for name in rows if name.split()[0] in ("fedavg", "fedbcs")):
        parts = whole_round(given.config, [*given.overrides, *rows[name]])
        result |= {f"{name}_{part}_s": seconds for part, seconds in parts.items()}
        print(f"whole round, s: {name:18}", ", ".join(f"{part} {s:.2f}" for part, s in parts.items()))
    print(json.dumps({name: value and round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    run_program(main)
