"""Tests of a run: checkpoints, results, resuming, kills, and what is printed."""

import copy
import csv
import errno
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import eval as scoring
import federated
import train
from config import KEYS, METHODS, BadInput, load_config, method_module
from datasets import Site
from federated import Diverged
from methods.find import find_method
from rounds import checkpoint, run_folder
from rounds.reading import load_checkpoint
from scoring import evaluate as evaluation
from scoring import pictures, results
from scoring.drawn import draw_predictions
from scoring.norms import own_network
from scoring.trained import model_of
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import (
    CPU,
    a_config,
    a_sample,
    assert_same,
    rows_of,
    run_eval,
    run_here,
    some_sites,
    write_prostate,
    write_run,
)
from unet import build_model

# ---- Checkpoints, results and the program ----

def test_stored_statistics_are_used_and_others_collected(tmp_path, capsys):
    config, sites = a_config(test_stats="site"), some_sites()
    stored = write_run(tmp_path, config, sites)
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["config"] == vars(config)
    model = model_of(checkpoint, "best.pt", CPU)
    new = Site("new", train=[], val=[], test=sites[0].test)
    found = evaluation.site_statistics(model, checkpoint["statistics"], {}, [sites[1], new], config, CPU)
    assert list(found) == ["b", "new"]
    assert all(torch.equal(found["b"][name], stored["b"][name]) for name in stored["b"])
    case = a_config(test_stats="case")
    assert evaluation.site_statistics(model, checkpoint["statistics"], {}, sites, case, CPU) == {}
    changed = copy.deepcopy(checkpoint)
    for value in changed["statistics"]["a"].values():
        value += .5
    torch.save(changed | {"round": 3}, tmp_path / "last.pt")
    found = {kind: load_checkpoint(tmp_path / f"{kind}.pt") for kind in results.KINDS}
    result, _ = evaluation.score_run(found, model, [*sites, new], config, CPU, 10., ["new"])
    best, last = result["best"]["test"]["sites"], result["last"]["test"]["sites"]
    assert best["a"] != last["a"] and best["b"] == last["b"]
    assert best["b"]["images"] == 2 and result["best"]["val"]["sites"]["b"]["images"] == 0
    assert list(result) == ["best", "last", "units", "definitions", "commit", "versions", "peak_mb",
                            "seconds"]
    assert list(result["best"]) == ["round", "val", "test"] and result["best"]["round"] == 2
    assert result["seconds"] >= 10 and result["peak_mb"] > 50
    assert set(result["versions"]) == {"python", "torch", "numpy", "nibabel", "pillow", "pyyaml"}
    assert result["definitions"]["foreign_sites"].startswith("new took no part")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    out = capsys.readouterr().out
    assert out.count("test_stats: site; took no part in training: new\n") == 4
    assert out.count("mean of sites") == out.count("mean without new") == 2  # new has test images alone


def test_no_git_gives_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.run_facts(1.)["commit"] is None


@pytest.mark.parametrize("spoil, words", [
    (lambda file: file.unlink(), "no such checkpoint"),
    (lambda file: file.write_bytes(file.read_bytes()[:3000]), "truncated"),
    (lambda file: file.write_bytes(b""), "truncated"),
    (lambda file: file.write_text("hello"), "truncated"),
    (lambda file: torch.save({"weights": {}}, file), "no checkpoint of this program"),
    (lambda file: torch.save(torch.load(file) | {"format": "other-1"}, file),
     "no checkpoint of this program"),
    (lambda file: torch.save({"format": "fedbcs-2"}, file), "an earlier version .*git checkout 22f1388"),
    (lambda file: torch.save({"format": "fedbcs-1"}, file), "an earlier version .*git checkout 8e45f15"),
    (lambda file: torch.save(nn.Linear(2, 2), file), "truncated or no checkpoint"),
    (lambda file: torch.save([1], file), "no checkpoint of this program")])
def test_bad_checkpoints(tmp_path, spoil, words):
    write_run(tmp_path, a_config(), some_sites())
    spoil(tmp_path / "best.pt")
    with pytest.raises(BadInput, match=words) as problem:
        load_checkpoint(tmp_path / "best.pt")
    text = str(problem.value)
    assert text.startswith(str(tmp_path / "best.pt")) and "\n" not in text


def test_weights_that_do_not_fit_their_config(tmp_path):
    write_run(tmp_path, a_config(), some_sites())
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    for key, value in (("width", 8), ("prototype_weight", 0.), ("fsr", "none")):
        changed = checkpoint | {"config": checkpoint["config"] | {key: value}}
        with pytest.raises(BadInput, match=r"^best\.pt: .*do not fit"):
            model_of(changed, "best.pt", CPU)
    with pytest.raises(BadInput, match="do not fit"):
        model_of(checkpoint | {"config": {}}, "best.pt", CPU)


def test_picture_shows_two_cases_a_site_with_their_errors(tmp_path, monkeypatch):
    config, sites = a_config(), some_sites()
    write_run(tmp_path, config, sites)
    model, shown = model_of(load_checkpoint(tmp_path / "best.pt"), "best.pt", CPU), []
    sheet = pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet",
                        lambda rows, titles: shown.extend(rows) or sheet(rows, titles))
    sites[0].test.append(a_sample("a", "c9"))
    rows = [{"site": site.name, "split": "test", "file": sample.name, "dice": dice}
            for site in sites for dice, sample in zip((0.7, 0.2, 0.5), site.test)]

    def find(site, sample):
        assert sample in site.test
        return evaluation.predict(own_network(model, {}), sample, config, CPU)
    assert draw_predictions(sites, config, rows, find).width > 6 * 192
    assert [label.partition("   (white")[0] for label, _ in shown] == [
        "a: worst c5.png Dice 0.20, middle c9.png Dice 0.50", "b: worst c5.png Dice 0.20, middle c4.png Dice 0.70"]
    for _, tiles in shown:
        assert len(tiles) == 6
        assert all(t.dtype == np.uint8 and t.shape == (154, 192, 3) for t in tiles)  # of 40 x 50 pixels
        image, truth, both = (t.astype(int) for t in tiles[:3])
        assert ((image != truth).any(2) == (truth == (0, 255, 0)).all(2)).all()
        assert (truth == (0, 255, 0)).all(2).any() and (both[..., 0] - both[..., 2] > 40).any()  # orange: missed
    volume, of_volumes = a_sample("v", "c", slices=5), a_config(task="volumes")
    volume.truth[2, 2:38, 2:48] = 1
    site, rows = Site("v", train=[], val=[], test=[volume]), [
        {"site": "v", "split": "test", "file": volume.name, "dice": 0.1}]
    draw_predictions([site], of_volumes, rows, find)
    label, tiles = shown[-1]
    assert label.startswith("v: worst c.png Dice 0.10, slices 1, 2, 3, 4, 5 of 5   (white") and len(tiles) == 5
    assert draw_predictions([], config, [], find) is None


def test_picture_is_of_the_best_round(tmp_path, capsys):
    """Of its weights, and of what each site's network has of its own."""
    config, sites = a_config(test_stats="site"), some_sites()
    write_run(tmp_path, config, sites)
    best = load_checkpoint(tmp_path / "best.pt")
    worse = {name: value + .1 * torch.randn(value.shape) for name, value in best["weights"].items()}
    found = {"best": best | {"local": {"b": {"head.bias": torch.tensor([.2, -.2])}}},
             "last": best | {"round": 3, "weights": worse}}
    model = model_of(best, "best.pt", CPU)
    evaluation.finish(tmp_path, found, model, sites, config, CPU, 0.)
    rows = [row for row in csv.DictReader((tmp_path / "cases.csv").open()) if row["kind"] == "best"]
    rows = [row | {"dice": float(row["dice"])} for row in rows]
    model.load_state_dict(best["weights"])

    def picture(kind):
        def find(site, sample):
            local = found[kind]["local"].get(site.name, {})
            network = own_network(model, best["statistics"][site.name], local)
            return evaluation.predict(network, sample, config, CPU)
        return pictures.as_png(draw_predictions(sites, config, rows, find))
    assert (tmp_path / "predictions.png").read_bytes() == picture("best") != picture("last")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A folder with a finished run of two rounds in it, named run."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text("task: nuclei\ndata: demo\nrounds: 2\nimage_size: 32\n"
                                       "width: 4\ndevice: cpu\nout: run\ntest_stats: site\n")
    done = subprocess.run([sys.executable, HERE / "train.py", "--config", "small.yaml"], cwd=folder,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_eval_repeats_trains_numbers(small_run):
    done = subprocess.run([sys.executable, HERE / "eval.py", "--run", "run"], cwd=small_run, capture_output=True, text=True,
                          check=False)  # a process of its own, as small_run's training was
    assert done.returncode == 0, done.stderr
    told = json.loads((small_run / "run" / "result_eval.json").read_text(), parse_constant=pytest.fail)
    saved = json.loads((small_run / "run" / "result.json").read_text())
    assert list(told) == list(saved)
    for key in ("best", "last", "units", "definitions", "commit", "versions"):
        assert told[key] == saved[key]
    assert run_eval("--run", "run", "test_stats=case", folder=small_run).returncode == 0
    case = json.loads((small_run / "run" / "result_eval.json").read_text())
    assert case["definitions"]["test_stats"].startswith("case")
    assert case["last"]["test"] != saved["last"]["test"]


@pytest.mark.parametrize("arguments, words", [
    (["--run", "nowhere"], "nowhere: "),
    (["--run", "run", "lr=1"], "lr: is fixed by the run"),
    (["--run", "run", "test_stat=case"], "test_stat: unknown key, the nearest is 'test_stats'"),
    (["--run", "run", "test_stats=none"], "test_stats: "),
    (["--run", "run", "device=cuda:99"], "device: "),
    (["--run", "run", "data=nowhere"], "nowhere: "),
    ([], "command line: ")])
def test_bad_arguments_of_eval(small_run, program, arguments, words):
    code, out, err = program(scoring, small_run, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err) and err.startswith(f"error: {words}")


def test_half_a_run_and_an_edited_one(small_run, tmp_path, program):
    for name in ("config.yaml", "splits.json", "last.pt"):
        (tmp_path / name).write_bytes((small_run / "run" / name).read_bytes())
    code, _, err = program(scoring, small_run, "--run", tmp_path)
    assert code == 2 and err.startswith(f"error: {tmp_path / 'best.pt'}: ")
    assert "resume=true" in err
    (tmp_path / "best.pt").write_bytes((small_run / "run" / "best.pt").read_bytes())
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("image_size: 32", "image_size: 64"))
    code, _, err = program(scoring, small_run, "--run", tmp_path)
    assert code == 2 and "image_size (32, now 64)" in err


# ---- Runs ----

def test_run_folder(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), tmp_path / "run", "eval_every=2", "rounds=3")
    train.train(config)
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == [
        "best.pt", "cases.csv", "config.yaml", "last.pt", "metrics.csv", "predictions.png", "result.json",
        "splits.json"]
    assert vars(load_config(run / "config.yaml")) == vars(config)
    rows = rows_of(run)
    assert (run / "metrics.csv").read_text().splitlines()[0] == (
        "round,split,site,dice,loss_dice,loss_contrast,loss_consistency,seconds,weight_bytes,"
        "prototype_bytes")
    order = [(row["round"], row["split"], row["site"]) for row in rows]
    assert order == [("1", "train", "a"), ("1", "train", "b"), ("2", "train", "a"), ("2", "train", "b"),
                     ("2", "val", "a"), ("2", "val", "b"), ("3", "train", "a"), ("3", "train", "b"),
                     ("3", "val", "a"), ("3", "val", "b")]
    n = sum(p.numel() for p in build_model(config, find_method(config)).parameters())
    assert {row["weight_bytes"] for row in rows if row["split"] == "train"} == {str(4 * n)}
    assert {row["prototype_bytes"] for row in rows if row["split"] == "train"} == {str(4 * 4 * 48)}
    assert rows[0]["dice"] == rows[4]["loss_dice"] == rows[4]["weight_bytes"] == "null"
    splits = json.loads((run / "splits.json").read_text())
    assert [[len(cases) for cases in split.values()] for split in splits.values()] == [[3, 1, 1]] * 2
    result = json.loads((run / "result.json").read_text())
    assert result["last"]["round"] == 3 and result["best"]["round"] in (2, 3)
    scores = {row["round"]: float(row["dice"]) for row in rows if row["split"] == "val"
              and row["site"] == "a"}
    assert result["last"]["val"]["sites"]["a"]["dice"] == pytest.approx(scores["3"])


def test_a_round_without_validation_keeps_no_older_statistics(tmp_path):
    """They belong to the weights that they were collected with."""
    config = tiny_config("unused", tmp_path / "run", "eval_every=2", "rounds=4")
    run = run_folder.RunFolder(config, {"w": torch.zeros(2)})
    mean = {"dice": 0.5}
    for t in run.rounds_left():
        due = run.is_due(t)
        assert due == (t % 2 == 0)
        run.save(t, {"w": torch.full((2,), float(t))}, {}, [], {"sites": {}, "mean": mean} if due else None,
                 {"a": {"norm": torch.tensor(float(t))}} if due else {})
        last = load_checkpoint(tmp_path / "run" / "last.pt")
        assert last["statistics"] == ({"a": {"norm": torch.tensor(float(t))}} if due else {})
        assert last["weights"]["w"].tolist() == [t, t]
    assert load_checkpoint(tmp_path / "run" / "best.pt")["round"] == 2  # equal ones do not follow


@pytest.mark.parametrize("overrides", [(), ("task=prostate",), ("task=prostate", "eval_slices=foreground")])
def test_site_means_follow_from_the_cases(tmp_path, monkeypatch, capsys, overrides):
    """Exactly, of best and last round and both splits; eval.py writes the same again, beside it."""
    write = write_prostate if overrides else write_nuclei
    config = tiny_config(write(tmp_path / "d"), tmp_path / "run", "lr=0.2", *overrides)
    train.train(config)
    content = (tmp_path / "run" / "cases.csv").read_bytes()
    rows = list(csv.DictReader(content.decode().splitlines()))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    unit = "mm" if overrides else "px"
    for kind in ("best", "last"):
        for split in ("val", "test"):
            for site, scores in result[kind][split]["sites"].items():
                own = [row for row in rows if (row["kind"], row["split"], row["site"]) == (kind, split, site)]
                assert len(own) == scores["images"] and {row["unit"] for row in own} == {unit}
                for name in ("dice", "hd95", "assd"):
                    assert np.mean([float(row[name]) for row in own]) == scores[name]
                assert sum(int(row["miss"]) for row in own) == scores["misses"]
                for row in own:
                    p, r = float(row["precision"]), float(row["recall"])
                    assert float(row["dice"]) == pytest.approx(2 * p * r / (p + r) if p + r else 0)
                assert {row["class"] for row in own} == {"1"} and {row["statistics"] for row in own} == {"site"}
    assert ("slice" in rows[0]["file"]) == (len(overrides) == 2)
    assert run_here(monkeypatch, capsys, scoring, tmp_path, "--run", "run")[0] == 0
    assert (tmp_path / "run" / "cases_eval.csv").read_bytes() == content
    assert run_here(monkeypatch, capsys, scoring, tmp_path, "--run", "run", "test_stats=case")[0] == 0
    assert (tmp_path / "run" / "cases.csv").read_bytes() == content
    assert b",case\n" in (tmp_path / "run" / "cases_eval.csv").read_bytes()


def test_best_round_is_that_of_the_best_validation():
    state, kept = {"best": {"round": 0, "dice": None}}, []
    for t, dice in enumerate([0.1, 0.5, None, 0.4, 0.5, 0.6], 1):  # None: this round is not validated
        state["round"] = t
        kept.append(dice is not None and run_folder.note_best(state, dice))
    assert kept == [True, True, False, False, False, True]
    assert state["best"] == {"round": 6, "dice": 0.6}
    alone = {"round": 4, "best": {"round": 3, "dice": None}}
    assert run_folder.note_best(alone, None)  # nobody validates: the last round


def test_every_config_key_is_read(tmp_path):
    """Every key is looked up as an attribute somewhere in a run of either task."""
    seen = set()

    class Recorder(SimpleNamespace):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    for task, write in (("nuclei", write_nuclei), ("prostate", write_prostate)):
        config = tiny_config(write(tmp_path / task), tmp_path / f"run_{task}", f"task={task}", "rounds=2",
                             "folds=3")
        train.train(Recorder(**vars(config)))
    keys = set(KEYS)
    for method in METHODS:
        keys |= set(getattr(method_module(method)[0], "SETTINGS", {}))
        config = tiny_config(tmp_path / "nuclei", tmp_path / method, f"method={method}")
        train.train(Recorder(**vars(config)))
    assert len(keys) > len(KEYS) and keys - seen == set()


def test_training_repeats_to_the_bit(tmp_path):
    states = []
    for run, seed in (("one", 0), ("two", 0), ("other", 1)):
        config = tiny_config(tmp_path / "d", tmp_path / run, f"seed={seed}")
        if run == "one":
            write_nuclei(tmp_path / "d")
        train.train(config)
        states.append(load_checkpoint(tmp_path / run / "last.pt")["weights"])
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_resume_rules(workplace, program):
    """No silent overwrite; only rounds, out, device and resume may change; more rounds go on."""
    def run(*overrides):
        return program(train, workplace, "--config", "c.yaml", "optimizer=sgd", "local_epochs=1",
                       *overrides)

    assert run("rounds=1", "resume=true")[0] == 0  # without a checkpoint it starts at round 1
    code, out, err = run("rounds=1")
    assert (code, out) == (2, "") and "resume=true" in err and "out=FOLDER" in err
    code, _, err = run("rounds=1", "resume=true", "tau=0.3", "width=3")
    assert code == 2 and "tau (0.1, now 0.3)" in err and "width (2, now 3)" in err
    code, out, err = run("rounds=2", "resume=true")
    assert code == 0 and "resuming after round 1" in out, err
    assert [row["round"] for row in rows_of(workplace / "run") if row["split"] == "train"] == list("1122")
    code, _, err = run("rounds=1", "resume=true")
    assert code == 2 and err.startswith("error: rounds: ")
    extra = workplace / "data" / "a" / "images" / "9.png"
    extra.write_bytes((extra.parent / "0.png").read_bytes())
    (workplace / "data" / "a" / "masks" / "9.png").write_bytes(
        (workplace / "data" / "a" / "masks" / "0.png").read_bytes())
    code, _, err = run("rounds=3", "resume=true")
    assert code == 2 and "splits.json" in err
    for kind in ("images", "masks"):
        (workplace / "data" / "a" / kind / "9.png").unlink()
    for broken in (b"", (workplace / "run" / "best.pt").read_bytes(), b"x" * 1000):
        (workplace / "run" / "last.pt").write_bytes(broken)
        code, _, err = run("rounds=3", "resume=true")
        assert code == 2 and err.startswith("error: run/last.pt: ") and err.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(workplace, program):
    code, _, err = program(train, workplace, "--config", "c.yaml", "lr=1e30", "optimizer=sgd")
    assert code == 3 and re.match(r"error: .*site a, round 1, step 2", err) and err.count("\n") == 1
    assert not (workplace / "run" / "last.pt").exists()


def test_divergence_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(write_nuclei(tmp_path / "d"), tmp_path / "run", "rounds=3")
    original = federated.fedbcs_losses

    def poisoned(model, x, y, context, config):
        terms = original(model, x, y, context, config)
        return terms | {"dice": terms["dice"] * math.inf} if context.G else terms  # from round 2 on

    monkeypatch.setattr(federated, "fedbcs_losses", poisoned)
    with pytest.raises(Diverged, match="site a, round 2, step 1"):
        train.train(config)
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["round"] == 1
    assert all(torch.isfinite(value).all() for value in saved["weights"].values())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    checkpoint.save(file, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match="last.pt: .*No space left"):
            def full(*_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(checkpoint.os, name, full)
            checkpoint.save(file, b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and file.read_bytes() == b"old"
