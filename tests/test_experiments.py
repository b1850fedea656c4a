"""Tests of the comparisons: which runs, skipping and resuming, the tables' numbers, style, figures."""

import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import METHODS, BadInput, as_yaml, load_config
from experiments import curves, diagnose, figures, reproduce, run_grid, style_bias
from fft_style import StyleRecalibration
from methods.input_norm import AmplitudeNorm
from rounds.reading import load_checkpoint
from scoring import pictures
from sites.layouts import list_files
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import run_here, run_quietly, start_here
from tests.test_forks import worked_example
from unet import UNet

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}  # run in other folders


def run_program(*arguments, folder):
    """Run reproduce with all of its trainings in this process; return its exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        start_here(patch)
        return run_quietly(reproduce, *arguments, folder=folder)


def run_alone(*arguments, folder):
    """The same in processes of their own."""
    return subprocess.run([sys.executable, "-m", "experiments.reproduce", *arguments], cwd=folder, capture_output=True,
                          text=True, timeout=170, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data, a config, and a table of two methods, two seeds and two sites in out/."""
    folder = tmp_path_factory.mktemp("reproduce")
    write_nuclei(folder / "data")
    config = as_yaml(tiny_config("data", "unused"))
    config = re.sub(r"(?m)^(out|seed|method|hold_out|resume): .*\n", "", config)
    (folder / "c.yaml").write_text(config)
    ran = run_program("table", "--config", "c.yaml", "--out", "out", "--seeds", "0,1", "--jobs", "2",
                      "--methods", "fedavg,fedbcs", folder=folder)
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


def again(folder, *arguments):
    comparison, *rest = arguments
    return run_program(comparison, "--config", "c.yaml", "--out", "out", "--seeds", "0,1", "--jobs", "2",
                       *rest, folder=folder)


def result(folder, name):
    return json.loads((folder / "out" / name / "result.json").read_text())["best"]


def test_table_agrees_with_the_runs(finished):
    folder, printed = finished
    rows = list(csv.DictReader((folder / "out" / "table.csv").open()))
    assert len(rows) == (2 + 4) * 2 * 2  # settings x seeds x sites
    for row in rows:
        name = re.sub(r"[^\w.=-]+", "_", f"{row['setting']}_seed{row['seed']}")
        scores = result(folder, name)["test"]["sites"][row["site"]]
        assert float(row["dice"]) == scores["dice"] and float(row["hd95"]) == scores["hd95"]
        assert float(row["prototypes"]) == (4.0 if "fedbcs" in name else 0.0)
    text = (folder / "out" / "table.md").read_text()
    assert text in printed
    line = next(line for line in text.splitlines() if line.startswith("| fedbcs"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    dice = [result(folder, f"fedbcs_seed{s}")["test"]["sites"]["a"]["dice"] for s in (0, 1)]
    assert cells[1] == f"{statistics.mean(dice):.3f} ± {abs(dice[0] - dice[1]) / 2 ** .5:.3f}"
    each = [result(folder, f"fedbcs_seed{s}")["test"]["mean"]["dice"]
            - result(folder, f"fedavg_seed{s}")["test"]["mean"]["dice"] for s in (0, 1)]
    assert cells[4] == f"{sum(each) / 2:+.3f} ({each[0]:+.3f} {each[1]:+.3f})"
    held = text.split("held out")[1].splitlines()[3]  # the row of FedBCS
    dice = [result(folder, f"fedbcs_without_b_seed{s}")["test"]["sites"]["b"]["dice"] for s in (0, 1)]
    assert held.split("|")[1].strip() == "fedbcs"
    assert held.split("|")[3].strip().startswith(f"{statistics.mean(dice):.3f}")


def test_finished_runs_are_skipped_and_broken_ones_resumed(finished):
    folder, _ = finished
    files = sorted((folder / "out").glob("*/result.json"))
    kept, broken = files[0].stat().st_mtime_ns, folder / "out" / "fedbcs_seed1"
    before = load_checkpoint(broken / "last.pt")["weights"]
    (broken / "result.json").unlink()
    ran = again(folder, "table", "--methods", "fedavg,fedbcs")
    assert ran.returncode == 0, ran.stderr
    assert "12 runs, 11 of them finished already" in ran.stdout
    assert "fedbcs_seed1: done; 0 of 1 runs to go" in ran.stdout
    assert files[0].stat().st_mtime_ns == kept
    assert "resuming after round 2" in (folder / "out" / "fedbcs_seed1.log").read_text()
    after = load_checkpoint(broken / "last.pt")["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_more_rounds_go_on(finished, tmp_path):
    folder, _ = finished
    ran = run_program("table", "--config", "c.yaml", "--out", tmp_path / "o", "--seeds", "0",
                      "--methods", "fedbcs", "rounds=1", folder=folder)
    assert ran.returncode == 0, ran.stderr
    ran = run_program("ablation", "--config", "c.yaml", "--out", tmp_path / "o", "--seeds", "0",
                      "--jobs", "2", folder=folder)
    assert ran.returncode == 0 and "4 runs, 0 of them finished" in ran.stdout
    assert "resuming after round 1" in (tmp_path / "o" / "fedbcs_seed0.log").read_text()
    assert [line.split("|")[1].strip() for line in ran.stdout.splitlines() if line.startswith("|")][2:] \
        == ["fedavg", "fsr", "prototypes", "fedbcs"]
    one, two = (json.loads((root / "fedbcs_seed0" / "result.json").read_text())["best"]["test"]
                for root in (folder / "out", tmp_path / "o"))
    assert one == two  # the settings as they stand, whichever comparison ran them


@pytest.mark.parametrize("arguments, words", [
    (("table", "lr=0.5"), "out/fedavg_seed0/config.yaml: belongs to another config, differing in lr"),
    (("table", "method=fpl"), "method: is set by this program, leave it out; see --methods"),
    (("table", "seed=3"), "seed: is set by this program"),
    (("table", "--jobs", "0"), "command line: write for example"),
    (("table", "--methods", "fedavg,fedbsc"), "method: expected fedavg"),
    (("table", "rounds=1"), "out/fedavg_seed0/config.yaml: belongs to another config, differing in rounds (2, now 1)"),
    (("table", "--out", "out/fedavg_seed0"), "out/fedavg_seed0: is the folder of one run"),
    (("table", "--methods", "fpl", "fpl_tau=-1"), "fpl_tau: expected a number above 0"),
    (("nothing",), "command line: argument comparison: invalid choice"),
    (("table", "data=nowhere", "--out", "new"), "nowhere: there is no such data folder"),
])
def test_bad_arguments(finished, monkeypatch, capsys, arguments, words):
    comparison, *rest = arguments
    code, _, err = run_here(monkeypatch, capsys, reproduce, finished[0], comparison, "--config",
                            "c.yaml", "--out", "out", "--seeds", "0,1", *rest)
    assert code == 2 and err.startswith(f"error: {words}") and len(err.splitlines()) == 1


def test_a_run_that_fails_is_named_and_the_others_kept(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "fedavg_seed0").mkdir(parents=True)
    (tmp_path / "fedavg_seed0" / "foreign").write_text("")
    ran = run_alone("table", "--config", "c.yaml", "--out", tmp_path, "--seeds", "0", "--methods", "fedavg,fpl",
                    "--jobs", "2", "rounds=1", folder=folder)
    assert ran.returncode == 2 and "1 of 2 runs failed" in ran.stderr
    assert "is no run folder but holds files" in ran.stderr and "fedavg_seed0.log" in ran.stderr
    assert [file.parent.name for file in tmp_path.glob("*/result.json")] == ["fpl_seed0"]


def test_trainings_end_with_the_program(finished, tmp_path):
    folder, _ = finished
    command = [sys.executable, "-m", "experiments.reproduce", "ablation", "--config", "c.yaml", "--out", tmp_path,
               "--seeds", "0", "rounds=500"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        metrics = tmp_path / "fedavg_seed0" / "metrics.csv"
        end = time.monotonic() + 100
        while not metrics.exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(30) == 143
    rounds = int(run_grid.rows_in(metrics)[-1]["round"])
    time.sleep(1)
    assert 0 < int(run_grid.rows_in(metrics)[-1]["round"]) == rounds < 500


def test_settings():
    config = tiny_config("d", "o")
    names = list(METHODS)
    table = reproduce.settings_of("table", config, names, ["a", "b"])
    assert list(table) == [*names, "fedavg without a", "fedavg without b", "fedbcs without a",
                           "fedbcs without b"]
    assert table["fedbcs without b"] == ["method=fedbcs", "hold_out=b"]
    assert list(reproduce.settings_of("table", config, names, ["a"])) == names
    assert list(reproduce.settings_of("table", config, ["fedbcs"], ["a", "b"])) == ["fedbcs"]
    own = ["fpl_tau=0.5", "fedprox_mu=1"]
    found = reproduce.settings_of("convergence", config, ["fpl", "fedavg", "m.py:f"], [], own)
    assert found == {"fpl": ["method=fpl", "fpl_tau=0.5"], "fedavg": ["method=fedavg"],
                     "m.py:f": ["method=m.py:f"]}
    tau = reproduce.settings_of("tau", config, names, [])
    assert list(tau) == ["fedavg", "tau=0.005", "tau=0.02", "tau=0.4", "fedbcs"]
    for comparison in ("ablation", "tau", "style"):
        for overrides in reproduce.settings_of(comparison, config, names, []).values():
            load_config(HERE / "config.yaml", overrides)


def test_a_held_out_mean_is_over_the_held_out_sites():
    results = {}
    for seed, (name, site) in itertools.product((0, 1), itertools.product(("fedavg", "fedbcs"), "ab")):
        dice = 0.1 * seed + (0.2 if name == "fedbcs" else 0) + (0.4 if site == "b" else 0)
        results.setdefault(f"{name} without {site}", []).append(
            {"sites": {s: {"dice": dice if s == site else 9.0} for s in "ab"}})
    lines = figures.table_of_held_out(results).splitlines()
    assert "0.250 ± 0.071" in lines[2] and "+0.200 (+0.200 +0.200)" in lines[3]


# ---- Style ----

def test_the_same_scenes_in_every_style(tmp_path):
    for task, n, sites in (("nuclei", 24, 4), ("prostate", None, 6), ("images", 24, 3)):
        config = load_config({"task": task, "data": "unused", "out": "unused", "image_size": 32})
        batches = list(style_bias.scene_batches(tmp_path / task, config))
        entries, _ = list_files(tmp_path / task, task)
        truths = [[np.asarray(style_bias.load_sites(
            config_of_scenes(tmp_path / task, task), {s: {"test": [e.case for e in entries[s]]}
                                                      for s in entries})[i].test[0].truth)]
                  for i in range(2)]
        assert np.array_equal(truths[0][0], truths[1][0])
        assert all(len(of_scenes) == sites for of_scenes in batches)
        assert n is None or sum(len(of_scenes[0]) for of_scenes in batches) == n
        assert not torch.equal(batches[0][0], batches[0][1])


def test_scenes_differ_in_style_alone(tmp_path, monkeypatch):
    """Two sites of one stain get the same files: noise and thickness belong to the scene."""
    styles, *others = style_bias.scenes.TASKS["nuclei"]
    monkeypatch.setitem(style_bias.scenes.TASKS, "nuclei", (dict.fromkeys("ab", styles["north"]), *others))
    style_bias.write_scenes(tmp_path, "nuclei")
    for kind in ("images", "masks"):
        files = [sorted((tmp_path / site / kind).iterdir()) for site in "ab"]
        assert len(files[0]) == 24
        assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*files))


def config_of_scenes(folder, task):
    return load_config({"task": task, "data": str(folder), "out": "unused", "image_size": 32})


def test_variance_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 10, 2, 4, 5, generator=generator) + torch.arange(3).view(3, 1, 1, 1, 1)
    f = torch.cat([f, torch.ones(3, 10, 1, 4, 5)], 2)  # a dead channel
    variance = style_bias.Variance()
    variance.add(f[:, :6])
    variance.add(f[:, 6:])
    x, ratios = f.double().numpy(), []
    for c in (0, 1):
        between = total = 0
        for h, w in itertools.product(range(4), range(5)):
            between += np.mean([np.var(x[:, i, c, h, w]) for i in range(10)])
            total += np.var(x[:, :, c, h, w])
        ratios.append(between / total)
    assert variance.ratio() == pytest.approx(np.mean(ratios), rel=1e-9)


def test_variance_of_style_alone_and_of_content_alone():
    for view, expected in (((3, 1, 1, 1, 1), 1.0), ((1, 10, 1, 1, 1), 0.0)):
        variance = style_bias.Variance()
        variance.add(torch.randn(view).expand(3, 10, 2, 4, 4))
        assert variance.ratio() == pytest.approx(expected, abs=1e-6)


def test_maps_before_and_after_normalisation():
    torch.manual_seed(0)
    front = AmplitudeNorm(32)
    front.amplitude += torch.rand(3, 32, 17)
    model, x = UNet(2, fsr="global", levels=[]), torch.rand(4, 3, 32, 32)
    model.input_transform = front
    maps = style_bias.level_maps(model, x)
    assert list(maps) == list(style_bias.LEVELS)
    assert torch.equal(maps["x"][0], x) and torch.equal(maps["x"][1], front(x))
    z = model.encoder[0][:4](front(x))
    assert torch.equal(maps["e0"][0], z) and torch.equal(maps["e0"][1], model.encoder[0][4:](z))
    z = model.encoder[1][:4](torch.max_pool2d(maps["e0"][1], 2))
    assert isinstance(model.fsr[0], StyleRecalibration)
    torch.testing.assert_close(maps["e1"][0], z)
    torch.testing.assert_close(maps["e1"][1], model.fsr[0](model.encoder[1][4:](z)))
    torch.testing.assert_close(model.head(maps["d0"][1]), model(x))
    assert [maps[level][1].shape[1] for level in style_bias.LEVELS] == [3, 2, 4, 8, 16, 32, 16, 8, 4, 2]
    assert not model.encoder[0]._forward_hooks and not model.encoder[0][3]._forward_hooks


def test_instance_normalisation_removes_a_site_and_its_images_gain():
    """The measure sees what the paper claims for FSR: with l_norm = 1 alone the style is gone."""
    torch.manual_seed(0)
    scenes = torch.randn(8, 3, 16, 16)
    sites = [a * scenes + b for a, b in ((1.0, 0.0), (3.0, 1.0), (0.5, -2.0))]
    layer, ratios = StyleRecalibration(3, "global"), []
    for h in ((-9.0, 9.0), (9.0, -9.0)):  # all original, all normalised
        layer.h.data = torch.tensor(h)
        variance = style_bias.Variance()
        with torch.no_grad():
            variance.add(torch.stack([layer(x) for x in sites]))
        ratios.append(variance.ratio())
    assert ratios[0] > 0.5 and ratios[1] < 1e-4


# ---- Figures ----

@pytest.mark.parametrize("comparison", ["tau", "convergence", "style"])
def test_plots_are_drawn(finished, comparison):
    pytest.importorskip("matplotlib")
    folder, _ = finished
    ran = again(folder, comparison, "--methods", "fedavg,fedbcs", "--seeds", "0")
    assert ran.returncode == 0, ran.stderr
    picture = np.asarray(Image.open(folder / "out" / f"{comparison}.png").convert("RGB"))
    colours = {tuple(int(look["color"][i:i + 2], 16) for i in (1, 3, 5)) for look in figures.LOOKS[:2]}
    assert colours <= {tuple(pixel) for pixel in picture.reshape(-1, 3)[::1].tolist()}


def test_validation_curve(finished):
    folder, _ = finished
    file = folder / "out" / "fedbcs_seed0" / "metrics.csv"
    rows = [row for row in run_grid.rows_in(file) if row["split"] == "val"]
    curve = curves.mean_curve(curves.read_curves(file)[1])
    assert list(curve) == [1, 2]
    assert curve[2] == pytest.approx(np.mean([float(r["dice"]) for r in rows if r["round"] == "2"]))
    assert max(curve.values()) == pytest.approx(result(folder, "fedbcs_seed0")["val"]["mean"]["dice"])


def test_pictures_colour_errors(finished):
    folder, _ = finished
    ran = again(folder, "pictures", "--methods", "fedavg,fedbcs")
    assert ran.returncode == 0, ran.stderr
    sheet = Image.open(folder / "out" / "pictures.png")
    assert sheet.width > 4 * pictures.TILE and sheet.height > 2 * pictures.TILE
    config = tiny_config(folder / "data", "unused")
    sample = figures.load_sites(config)[0].test[0]
    truth = sample.truth[0]
    right = figures.coloured(sample, 0, truth).astype(int)
    nothing = figures.coloured(sample, 0, np.zeros_like(truth)).astype(int)
    everything = figures.coloured(sample, 0, np.ones_like(truth)).astype(int)
    inside = np.asarray(Image.fromarray(truth).resize((pictures.TILE,) * 2, 0)) == 1
    assert np.ptp(right, axis=2).max() == 0 and right[inside].min() >= 165  # white: no error
    assert (nothing[inside][:, 0] - nothing[inside][:, 2] > 50).all()       # orange: missed
    assert (everything[~inside][:, 2] - everything[~inside][:, 0] > 50).all()  # blue: in excess
    assert np.ptp(nothing[~inside], axis=1).max() == 0


def test_matplotlib_is_asked_for_before_training(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    ran = run_program("tau", "--config", "c.yaml", folder=folder)
    assert ran.returncode == 2
    assert ran.stderr == ("error: matplotlib: is not installed and this plot needs it; "
                          "pip install -r requirements-extra.txt\n")
    assert not (folder / "runs").exists()


def test_the_core_imports_five_packages_only():
    """Of all programs and modules; the plots' matplotlib is imported when a plot is drawn, and
    what is for Flower alone has requirements of its own."""
    modules = [path.stem for path in HERE.glob("*.py") if not path.stem.startswith("test_")]
    modules += [f"{room}.{path.stem}" for room in ("sites", "scoring", "rounds", "methods", "experiments")
                for path in (HERE / room).glob("*.py")]
    code = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                         timeout=100, check=True).stdout.split()
    assert not {"matplotlib", "flwr", "pandas", "scipy", "torchvision"} & set(out)


def test_contradicting_base(tmp_path):
    (tmp_path / "c.yaml").write_text("task: nuclei\ndata: demo\nmethod: fpl\n")
    with pytest.raises(BadInput, match="method: is set by this program, leave it out"):
        reproduce.base_config(tmp_path / "c.yaml", [], tmp_path / "out")


def test_curves_of_a_run(tmp_path, monkeypatch, capsys):
    """Also of one that is running; without matplotlib one line says how to get it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text(
        "round,split,site,dice,loss_dice,loss_contrast,loss_consistency,seconds,weight_bytes,prototype_bytes\n"
        "1,train,a,null,0.5,0.0,null,1,1,1\n1,train,b,null,0.7,0.0,null,1,1,1\n1,val,a,0.25,null,null,null,null,null,null\n"
        "2,train,a,null,0.3,0.2,null,1,1,1\n")
    losses, dice = curves.read_curves(tmp_path / "run" / "metrics.csv")
    assert losses == {"loss_dice": {1: pytest.approx(0.6), 2: 0.3}, "loss_contrast": {1: 0, 2: 0.2}}
    assert dice == {"a": {1: 0.25}}
    assert run_here(monkeypatch, capsys, curves, tmp_path, "--run", "run")[0] == 0
    assert Image.open(tmp_path / "run" / "curves.png").size[0] > 500
    code, _, err = run_here(monkeypatch, capsys, curves, tmp_path, "--run", ".")
    assert code == 2 and "is not there yet" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_here(monkeypatch, capsys, curves, tmp_path, "--run", "run")
    assert code == 2 and err == ("error: matplotlib: is not installed and this plot needs it; "
                                 "pip install -r requirements-extra.txt\n")


def test_curves_have_every_term_of_a_method(tmp_path):
    """A term of any name, also one that begins in round 3; the ticks are whole rounds."""
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.csv").write_text(
        "round,split,site,dice,loss_dice,loss_contrast,loss_proximal,seconds\n"
        "1,train,a,null,0.5,null,,1\n1,val,a,0.25,null,null,null,null\n"
        "2,train,a,null,0.4,0.0,null,1\n2,val,a,0.5,null,null,null,null\n"
        "3,train,a,null,0.3,0.0,0.5,1\n3,train,b,null,0.1,0.0,1.5,1\n3,val disc,a,0.9,null,null,null,null\n")
    losses, dice = curves.read_curves(tmp_path / "metrics.csv")
    assert losses == {"loss_dice": {1: 0.5, 2: 0.4, 3: pytest.approx(0.2)}, "loss_contrast": {2: 0, 3: 0},
                      "loss_proximal": {3: 1.0}}
    left, right = curves.draw_curves(tmp_path / "curves.png", losses, dice).axes
    drawn = {line.get_label(): list(zip(*line.get_data())) for line in left.lines}
    assert drawn == {"L_dice": list(losses["loss_dice"].items()), "mu L_contra": [(2, 0), (3, 0)],
                     "proximal": [(3, 1)]}
    assert {line.get_label(): list(zip(*line.get_data())) for line in right.lines} == {
        "a": [(1, 0.25), (2, 0.5)], "best round, 2": [(2, 0), (2, 1)]}
    for ax in (left, right):
        assert all(tick == round(tick) for tick in ax.get_xticks())


def test_boxes_of_dice_are_of_the_test_images_of_the_best_round(tmp_path, monkeypatch, capsys):
    """A box a site, its line at the median; of several classes a box each."""
    pytest.importorskip("matplotlib")
    rows = [("best", "test", "a", "1", 0.2), ("best", "test", "a", "1", 0.4), ("best", "test", "a", "1", 0.9),
            ("best", "test", "b", "1", 0.7), ("best", "val", "b", "1", 0.1), ("last", "test", "c", "1", 0.1)]
    (tmp_path / "metrics.csv").write_text("round,split,site,dice,loss_dice\n1,train,a,null,0.5\n")
    (tmp_path / "cases.csv").write_text("kind,split,site,class,dice\n" + "".join(
        ",".join(map(str, row)) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, file, dpi: drawn.append((figure.axes, file.name)))
    code, out, _ = run_here(monkeypatch, capsys, curves, tmp_path, "--run", str(tmp_path))
    (_, _), ((ax,), name) = drawn
    assert code == 0 and name == "dice.png" and f"written to {tmp_path / 'dice.png'}" in out
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    medians = [line.get_ydata()[0] for line in ax.lines if line.get_color() == curves.LOOKS[1]["color"]]
    assert medians == [0.4, 0.7]
    curves.draw_boxes(tmp_path / "dice.png", [{"site": "a", "class": j, "dice": "0.5"} for j in ("disc", "cup")])
    assert [label.get_text() for label in drawn[-1][0][0].get_xticklabels()] == ["a\ndisc", "a\ncup"]


@pytest.mark.parametrize("weight", [1, 0])
def test_diagnosis_of_another_network(tmp_path, monkeypatch, capsys, weight):
    """The network of docs/fork.md has neither FSR nor batch norm, and at weight 0 no prototypes."""
    write_nuclei(tmp_path / "data", ("a", "b"), cases=5)
    (tmp_path / "mine.py").write_text(worked_example("small")[0])
    monkeypatch.chdir(tmp_path)
    train.train(tiny_config("data", "run", "method=mine.py:small", f"prototype_weight={weight}", "width=8"))
    code, out, err = run_here(monkeypatch, capsys, diagnose, tmp_path, "--run", "run", "trust=true")
    assert code == 0, err
    for site in out.split("\n\n")[1:3]:
        assert site.count("gradient of ") == (3 if weight else 1)
        assert site.count("cosine with own class") == 2 * weight and "FSR" not in site
    assert out.count("p > ") == len(diagnose.THRESHOLDS)


@pytest.mark.parametrize("tiles", [False, True])
def test_diagnosis_of_a_run(tmp_path, monkeypatch, capsys, tiles):
    """Every term and level is there, shares add up, and at one half the Dice is that of the last validation."""
    data = write_nuclei(tmp_path / "data", ("a", "b"), cases=5, size=56 if tiles else 32)
    config = tiny_config(data, tmp_path / "run", f"tiles={tiles}".lower())
    train.train(config)
    code, out, err = run_here(monkeypatch, capsys, diagnose, tmp_path, "--run", "run")
    assert code == 0, err
    for site in out.split("\n\n")[1:3]:
        shares = [float(share) for share in re.findall(r"gradient of .*share +([\d.]+)%", site)]
        assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
        assert site.count("FSR at level") == 3 and site.count("cosine with own class") == 2
    with open(tmp_path / "run" / "metrics.csv", newline="") as stream:
        dice = [float(row["dice"]) for row in csv.DictReader(stream) if (row["round"], row["split"]) == ("2", "val")]
    rows = {t: (float(d), float(m)) for t, d, m in re.findall(r"p > ([\d.]+)  Dice ([\d.]+)  marked / true ([\d.]+)", out)}
    assert list(map(float, rows)) == list(diagnose.THRESHOLDS)
    assert rows["0.5"][0] == pytest.approx(statistics.mean(dice), abs=1e-3)
    areas = [m for _, m in rows.values()]
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[-1]
