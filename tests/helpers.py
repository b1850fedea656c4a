"""What several test files use: small data, small runs, and comparisons."""

import contextlib
import csv
import importlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

import eval as scoring
import train
from config import load_config
from datasets import Site
from experiments import run_grid
from methods.find import find_method
from rounds import checkpoint
from scoring.norm_statistics import norm_statistics
from settings.program import run_program
from sites.readers import Sample
from test_fedbcs import HERE
from unet import build_model

CPU = torch.device("cpu")


def write_prostate(folder, sites=("a", "b"), cases=3):
    """A data folder of volumes (4 slices, 2 with organ) for the prostate task; returns it."""
    rng = np.random.default_rng(0)
    for site in sites:
        (folder / site).mkdir(parents=True)
        for case in range(cases):
            mask = np.zeros((32, 32, 4), np.uint8)
            mask[8:20, 10:22, 1:3] = 1
            volume = (50 * mask + rng.integers(0, 30, mask.shape)).astype(np.int16)
            for name, array in ((f"Case{case}", volume), (f"Case{case}_segmentation", mask)):
                nibabel.save(nibabel.Nifti1Image(array, np.diag([-.5, -.5, 3, 1])),
                             folder / site / f"{name}.nii.gz")
    return folder


def nuclei_config(folder, *overrides):
    """The settings for images in `folder`, at 32 pixels."""
    return load_config({"task": "nuclei", "data": str(folder), "out": "unused", "image_size": 32}, overrides)


def prostate_config(folder, *overrides):
    """The settings for volumes in `folder`, at 32 pixels."""
    return load_config({"task": "prostate", "data": str(folder), "out": "unused", "image_size": 32},
                       overrides)


def a_sample(site, case, slices=1, size=32, own=(40, 50), shift=0., seed=0, spacing=(1., 1., 1.)):
    """A sample with some organ in about half of its slices."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(slices, 3, size, size, generator=random) * .5 + shift
    masks = torch.zeros(slices, size, size, dtype=torch.uint8)
    truth = np.zeros((slices, *own), np.uint8)
    masks[::2, 8:20, 8:20] = 1
    truth[::2, 10:25, 12:30] = 1
    return Sample(site, case, f"{case}.png", images, masks, truth, spacing)


def some_sites():
    """Two sites that differ in brightness: 3 cases train, 2 test; b has no validation."""
    sites = []
    for name, shift in (("a", 0.), ("b", .5)):
        samples = [a_sample(name, f"c{i}", shift=shift, seed=10 * i + len(sites)) for i in range(6)]
        sites.append(Site(name, train=samples[:3], val=samples[3:4] if name == "a" else [],
                          test=samples[4:]))
    return sites


def a_config(**keys):
    """The settings of a small network, where no data are read."""
    return load_config({"task": "nuclei", "data": "demo", "out": "unused", "width": 4,
                        "image_size": 32, "batch_size": 2, "device": "cpu"} | keys)


def a_model(config):
    """An untrained network whose predictions are neither empty nor full."""
    model = build_model(config, find_method(config))
    weight = torch.randn(model.head.weight[0].shape, generator=torch.Generator().manual_seed(1))
    weight -= weight.mean()
    model.head.weight.data = torch.stack([weight, -weight])
    model.head.bias.data.zero_()
    return model


def write_run(folder, config, sites):
    """A run folder as train.py leaves it, of the untrained network."""
    model = a_model(config)
    statistics = {site.name: norm_statistics(model, site, config, CPU) for site in sites}
    for kind, t in (("best", 2), ("last", 3)):
        torch.save({"format": checkpoint.FORMAT, "config": vars(config), "round": t,
                    "weights": model.state_dict(), "local": {},
                    "statistics": statistics}, folder / f"{kind}.pt")
    splits = {site.name: {split: [sample.case for sample in getattr(site, split)]
                          for split in ("train", "val", "test")} for site in sites}
    (folder / "splits.json").write_text(json.dumps(splits))
    return statistics


def run_here(monkeypatch, capsys, module, folder, *arguments):
    """Run a program in this process, in `folder`; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    capsys.readouterr()
    return exit_code(module), *capsys.readouterr()


def exit_code(module):
    """Run a program's main in this process; return its exit code."""
    try:
        run_program(module.main)
    except SystemExit as end:
        return end.code
    return 0


def start_here(monkeypatch):
    """Have `reproduce` train and score in this process, in turn, for a process takes seconds to start."""
    def start(command, jobs, log):
        with monkeypatch.context() as patch, open(log, "a") as stream, contextlib.redirect_stdout(stream):
            patch.setattr(sys, "argv", list(map(str, command)))
            importlib.import_module(command[0].removesuffix(".py")).main()
        return SimpleNamespace(poll=lambda: 0, returncode=0)
    monkeypatch.setattr(run_grid, "start", start)
    monkeypatch.setattr(run_grid.time, "sleep", lambda _: None)


def run_quietly(module, *arguments, folder):
    """Run a program as `run_here` does, without fixtures; return what a process of its own would: returncode, stdout
    and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        code = exit_code(module)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def run_eval(*arguments, folder):
    """Run eval.py in `folder`."""
    return run_quietly(scoring, *arguments, folder=folder)


def eval_result(folder, *overrides):
    """Score the run named run in `folder` by eval.py; return the content of result_eval.json."""
    done = run_eval("--run", "run", *overrides, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run" / "result_eval.json").read_text())


def train_by(folder, *overrides):
    """Run train.py on c.yaml in `folder`."""
    done = run_quietly(train, "--config", "c.yaml", *overrides, folder=folder)
    assert done.returncode == 0, done.stderr


def rows_of(run):
    """The rows of a run's metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    """The rows without what a clock decides."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def start_training(folder, *overrides):
    """Start train.py on c.yaml in `folder`; return the process."""
    command = [sys.executable, HERE / "train.py", "--config", "c.yaml", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    """Wait for a process and return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err


def assert_same(a, b):
    """Equal to the bit, through nested dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b) and (isinstance(a, list) or list(a) == list(b))
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b
