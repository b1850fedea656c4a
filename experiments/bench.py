"""Measure time and memory: python -m experiments.bench

Prints a table, and as its last line one JSON object. Times are medians of 5, taken in turn in one
process; memory is the peak resident size less that before the first step, in a process of its own.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from config import METHODS, load_config
from datasets import load_sites
from federated import Context, average_weights, local_update, make_optimizer
from fft_style import recalibrate, recalibrate_fourier
from methods.find import build_model, find_method
from settings.program import run_program

REPEATS = 5
SETTING = {"task": "nuclei", "data": "demo", "out": "unused", "width": 32, "batch_size": 6}


def blobs(batch, size, foreground, generator):
    """Return images (B, 3, H, W) and labels (B, H, W) of blobs that cover a share `foreground`."""
    coarse = torch.randn(batch, 1, size // 8, size // 8, generator=generator)
    height = functional.interpolate(coarse, size=size, mode="bicubic")[:, 0]
    cut = height.flatten().sort().values[int((1 - foreground) * height.numel())]
    return torch.rand(batch, 3, size, size, generator=generator), (height > cut).long()


def training_step(method):
    """Return step(), a method's training step: batch 6, 3x256x256, width 32, 20 % foreground.

    It is a step of a last local epoch in a later round: with prototypes, 2 a class, and gathering.
    """
    config = load_config(SETTING, [f"method={method}"])
    rules, generator = find_method(config), torch.Generator().manual_seed(0)
    model = build_model(config, rules)
    optimizer = make_optimizer(model, config)
    w = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = blobs(config.batch_size, 256, 0.2, generator)
    x, context = x.to(memory_format=torch.channels_last), Context("bench", 2, w, {}, {}, {})
    with torch.no_grad():  # one image, so that this leaves little behind in the peak of memory
        rules.losses(model, x[:1], y[:1], context)
    G = rules.aggregate([rules.send(model, context)])
    context.G = {path: {j: P[:1].repeat(2, 1) for j, P in G[path].items()} for path in G}
    context.total = {}

    def closure():
        optimizer.zero_grad()
        L = sum(rules.losses(model, x, y, context).values())
        L.backward()
        return L
    return lambda: rules.step(optimizer, closure)


def fsr_passes():
    """Return {form: pass()}, forward and backward of FSR at (6, 64, 128, 128) in both forms."""
    z = torch.rand(6, 64, 128, 128).to(memory_format=torch.channels_last).requires_grad_()
    l = torch.full((6, 64, 1, 1), 0.5, requires_grad=True)
    forms = {"spatial": recalibrate, "rfft2": recalibrate_fourier}
    return {name: lambda form=form: form(z, l, l).sum().backward() for name, form in forms.items()}


def demo_round():
    """Return the seconds of round 2, the first with prototypes, on the demo with config.yaml."""
    config = load_config(Path(__file__).parents[1] / "config.yaml")
    sites, method, kept = load_sites(config), find_method(config), {}
    model = build_model(config, method)
    w, G = {name: value.clone() for name, value in model.state_dict().items()}, {}
    for t in (1, 2):
        start = time.perf_counter()
        updates = [local_update(model, site, w, G, kept.get(site.name), t, config, method)
                   for site in sites]
        w, G = average_weights(updates), method.aggregate([u.prototypes for u in updates])
        kept = {update.site: update.kept for update in updates}
    return time.perf_counter() - start


def median_seconds(calls):
    """Return {name: median seconds} of {name: call}, called in turn after one warm-up."""
    seconds = {name: [] for name in calls}
    for repeat in range(REPEATS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_of_steps(method):
    """Return the peak resident MB of three steps, less what was before; for a fresh process."""
    step = training_step(method)
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * unit / 2**20


def main():
    """Measure and print step times, FSR's time and peak memory."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = {method: pool.apply(peak_of_steps, (method,)) for method in METHODS}
    step = median_seconds({method: training_step(method) for method in METHODS})
    fsr = median_seconds(fsr_passes())
    result, base = {"threads": torch.get_num_threads()}, "fedavg"
    print(f"{'training step':14}{'s':>8}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    for name in METHODS:
        print(f"{name:14}{step[name]:8.3f}{step[name] / step[base]:8.2f}"
              f"{peak[name]:10.0f}{peak[name] / peak[base]:8.2f}")
        result |= {f"{name}_step_s": step[name], f"{name}_peak_mb": peak[name],
                   f"{name}_step_ratio": step[name] / step[base],
                   f"{name}_memory_ratio": peak[name] / peak[base]}
    result |= {"step_ratio": result["fedbcs_step_ratio"],
               "memory_ratio": result["fedbcs_memory_ratio"],
               "fsr_spatial_s": fsr["spatial"], "fsr_rfft2_s": fsr["rfft2"],
               "fsr_ratio": fsr["rfft2"] / fsr["spatial"], "demo_round_s": demo_round()}
    print(f"FSR layer, s: spatial {fsr['spatial']:.3f}, rfft2 {fsr['rfft2']:.3f}, "
          f"ratio {result['fsr_ratio']:.2f}")
    print(f"round on the demo, s: {result['demo_round_s']:.3f}")
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    run_program(main)
