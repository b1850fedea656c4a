"""Tests of the seam for methods of one's own: every example of docs/fork.md, and what a fork may bring along."""

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import federated
import predict
import train
from config import METHODS, BadInput, as_yaml, load_config, method_module
from datasets import batches, load_sites, samples_of, seeded
from federated import Context
from fft_style import StyleRecalibration
from methods.find import find_method, method_and_model
from methods.input_norm import AmplitudeNorm
from methods.shared import LAST
from rounds.reading import load_checkpoint
from scoring.evaluate import logits_of
from scoring.norms import own_network
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import (
    assert_same,
    eval_result,
    rows_of,
    run_eval,
    run_here,
    train_by,
    without_seconds,
)
from tests.test_methods import cosine
from unet import UNet, build_model

# ---- The seam ----

@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_bit(tmp_path, method):
    write_nuclei(tmp_path / "d")
    settings = (f"method={method}", "optimizer=adam", "lr=1e-3", "local_epochs=2")
    train.train(tiny_config(tmp_path / "d", tmp_path / "whole", *settings, "rounds=3"))
    train.train(tiny_config(tmp_path / "d", tmp_path / "run", *settings, "rounds=1"))
    train.train(tiny_config(tmp_path / "d", tmp_path / "run", *settings, "rounds=3", "resume=true"))
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(tmp_path / run / name) for run in ("whole", "run"))
        for key in a.keys() - {"config", "seconds", "history"}:
            assert_same(a[key], b[key])
    assert without_seconds(rows_of(tmp_path / "whole")) == without_seconds(rows_of(tmp_path / "run"))


def test_every_method_differs_from_fedavg(tmp_path):
    """Of one seed and one initial network, every method but FedAvg ends elsewhere, and FedAvg is
    the core with its two switches off."""
    write_nuclei(tmp_path / "d")
    heads = {}
    for method in [*METHODS, "off"]:
        settings = ["fsr=none", "prototype_weight=0"] if method == "off" else [f"method={method}"]
        train.train(tiny_config(tmp_path / "d", tmp_path / method, *settings))
        heads[method] = load_checkpoint(tmp_path / method / "last.pt")["weights"]["head.weight"]
    assert torch.equal(heads.pop("off"), heads["fedavg"])
    assert all(not torch.equal(a, b) for i, a in heads.items() for j, b in heads.items() if i < j)


def test_methods_stand_where_the_table_says_and_set_their_switches():
    for method, place in METHODS.items():
        file, _, name = place.partition(":")
        assert (HERE / file).is_file() and callable(getattr(method_module(method)[0], name))
        config = load_config(HERE / "config.yaml", [f"method={method}"])  # wins over the file's fsr
        assert config.method == method
        assert (config.fsr, config.prototype_weight) == (
            ("global", 1) if method in ("fedbcs", "released") else ("none", 0))
        assert config.weights == ("equal" if method in ("harmofl", "fedplvm") else "samples")
        assert getattr(config, "fedprox_mu", None) == (0.01 if method == "fedprox" else None)


@pytest.mark.parametrize("given, overrides, words", [
    ({"method": "fedavg", "fsr": "global"}, [], "fsr: global contradicts method: fedavg"),
    ({"method": "fedavg"}, ["prototype_weight=1"], "prototype_weight: 1.0 contradicts"),
    ({}, ["method=harmofl", "weights=samples"], "weights: samples contradicts"),
    ({}, ["method=fpl", "fedplvm_tau=0.1"], "fedplvm_tau: is read by method: fedplvm only"),
    ({"fpl_tau": 0.5}, [], "fpl_tau: is read by method: fpl only"),
    ({}, ["method=fedavg", "fedprox_mu=0.1"], "fedprox_mu: is read by method: fedprox only"),
    ({}, ["method=fedbsc"], "method: expected fedavg or fedprox"),
    ({}, ["method=1"], "method: expected"),
    ({}, ["fedprox_mu=0.1"], "fedprox_mu: is read by method: fedprox only, not by fedbcs"),
    ({}, ["method=released", "tau=0.1"], "tau: 0.1 contradicts method: released"),
    ({}, ["method=feduv", "feduv_pixels=2"], "feduv_pixels: expected a whole number of at least 4"),
])
def test_contradictions(given, overrides, words):
    with pytest.raises(BadInput) as problem:
        load_config({"task": "nuclei", "data": "d", "out": "o"} | given, overrides)
    assert str(problem.value).startswith(words)


def test_a_methods_own_keys_can_be_set():
    for overrides in (["method=fedprox", "fedprox_mu=0.5"], ["method=fpl", "fpl_tau=0.5"],
                      ["method=feduv", "feduv_pixels=8"]):
        config = load_config(HERE / "config.yaml", overrides)
        key, value = overrides[-1].split("=")
        assert getattr(config, key) == float(value)
        given = {key: "none" if value is None else value for key, value in vars(config).items()}
        again = load_config(given | {"out": "o"})
        assert vars(again) == vars(config) | {"out": "o"}


def worked_example(name="fedproto"):
    """A worked example in docs/fork.md: its file's text and its command."""
    text = (HERE / "docs" / "fork.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
                if f"\ndef {name}(" in block)
    command = re.search(r"# mine\.py; (python train\.py .+)", code)[1]
    return code, command.split()


EXAMPLES = ("fedproto", "moon", "later", "by_site", "decay", "fedper", "logged", "small", "affine", "group_norm", "resnet")


def test_every_worked_example_is_short_and_is_run_here():
    """Each block of the page is code of at most 25 lines under its command, or the one command line."""
    text = (HERE / "docs" / "fork.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    code = [block for kind, block in blocks if kind == "python"]
    assert [len(block.splitlines()) for kind, block in blocks if kind != "python"] == [1]
    assert [re.match(r"# mine\.py; python train\.py --config config\.yaml method=mine\.py:(\w+)", block)[1]
            for block in code] == list(EXAMPLES)
    assert all(len(block.splitlines()) <= 25 and max(map(len, block.splitlines())) <= 110 for block in code)
    assert all(f"run_example(\"{name}\"" in Path(__file__).read_text() for name in EXAMPLES)
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) <= 1500
    assert all(f"`{field}" in text for field in federated.Method._fields)


def run_example(name, folder, *overrides):
    """Run a worked example by its own command, for two rounds; return its checkpoint and its rows."""
    code, command = worked_example(name)
    write_nuclei(folder / "data")
    (folder / "mine.py").write_text(code)
    (folder / "c.yaml").write_text(as_yaml(tiny_config("data", "run")))
    assert command[:4] == ["python", "train.py", "--config", "config.yaml"]
    train_by(folder, *command[4:], "out=run", *overrides)
    return load_checkpoint_in(folder, "run"), [row for row in rows_of(folder / "run") if row["split"] == "train"]


def test_the_worked_example_of_readme_runs(tmp_path):
    state, rows = run_example("fedproto", tmp_path)
    assert state["prototypes"][LAST][1].shape == (1, 2)
    assert [row["loss_pull"] == "null" for row in rows] == [True, True, False, False]
    assert all(float(row["loss_pull"]) > 0 for row in rows[2:])
    assert not any(name.startswith(("fsr", "fusion")) for name in state["weights"])  # the plain network
    assert run_eval("--run", "run", "trust=true", folder=tmp_path).returncode == 0


def test_moon_remembers_over_rounds_and_kills(tmp_path):
    """Its contrast is that of its formula; a resumed run has the memory of the uninterrupted one."""
    state, rows = run_example("moon", tmp_path, "rounds=3")
    assert [row["loss_contrast"] for row in rows[:2]] == ["null"] * 2
    assert all(0 < float(row["loss_contrast"]) < 0.01 * math.log(1 + math.exp(2 / 0.5)) for row in rows[2:])
    for rounds in ("rounds=1", "rounds=3"):
        train_by(tmp_path, "method=mine.py:moon", rounds, "out=again", "resume=true")
    again = load_checkpoint_in(tmp_path, "again")
    for key in ("weights", "kept"):
        assert_same(again[key], state[key])
    for kept in state["kept"].values():
        assert kept["memory"]["weights"].keys() == state["weights"].keys()


def test_moon_equals_its_formula(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(worked_example("moon")[0])
    config = tiny_config(write_nuclei(tmp_path / "d"), "o", "method=mine.py:moon", "moon_mu=0.5")
    method = find_method(config)
    model, (x, y) = build_model(config, method), next(batches(load_sites(config)[0].train_slices, 2, seeded(0)))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()})
    own = {name: value.clone() for name, value in model.state_dict().items()}
    z = []
    for weights in (own, *states):
        model.load_state_dict(weights)
        z.append(model.features(x)[1]["bottleneck"].mean((2, 3)))
    model.load_state_dict(own)
    terms = method.losses(model, x, y, Context("a", 2, states[0], {}, {"weights": states[1]}))
    literal = []
    for z_own, z_w, z_prev in zip(*z):
        e = [math.exp(cosine(z_own, other) / 0.5) for other in (z_w, z_prev)]
        literal.append(-math.log(e[0] / (e[0] + e[1])))
    assert terms["contrast"].item() == pytest.approx(0.5 * np.mean(literal), rel=1e-5)


def test_local_weights_stay_at_their_site_and_score_it(tmp_path):
    """FedPer: nobody's head is sent or averaged; eval.py scores each site with its own."""
    state, rows = run_example("fedper", tmp_path)
    heads = {site: kept["local"] for site, kept in state["kept"].items()}
    assert all(set(local) == {"head.weight", "head.bias"} for local in heads.values())
    assert not torch.equal(heads["a"]["head.weight"], heads["b"]["head.weight"])
    config = tiny_config(tmp_path / "data", "unused", "fsr=global")
    initial = build_model(config, find_method(config)).state_dict()
    assert torch.equal(state["weights"]["head.weight"], initial["head.weight"])
    assert not torch.equal(state["weights"]["up.0.weight"], initial["up.0.weight"])
    sent = sum(value.numel() for name, value in initial.items() if not name.startswith("head."))
    assert {row["weight_bytes"] for row in rows} == {str(4 * sent)}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    again = eval_result(tmp_path, "trust=true")
    assert again["last"] == result["last"] and again["best"] == result["best"]
    for kind in ("best", "last"):  # they may be of one round, which is scored once
        saved = torch.load(tmp_path / "run" / f"{kind}.pt", weights_only=True)
        saved["local"]["a"]["head.bias"][1] -= 9  # everything is background
        torch.save(saved, tmp_path / "run" / f"{kind}.pt")
    other = eval_result(tmp_path, "trust=true")["last"]["test"]["sites"]
    assert other["a"] != result["last"]["test"]["sites"]["a"]
    assert other["b"] == result["last"]["test"]["sites"]["b"]


def test_a_network_of_ones_own(tmp_path):
    state, rows = run_example("small", tmp_path)
    assert "down.0.weight" in state["weights"] and state["prototypes"]["encoder"][1].shape == (1, 3 * 16)
    assert all(float(row["loss_contrast"]) > 0 for row in rows[2:])
    assert run_eval("--run", "run", "trust=true", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("pooling, size, words", [
    ("max_pool2d(e[-1], 1)", 32, "network: level 1 of its encoder has stride 1, prototypes need 2"),
    ("max_pool2d(e[-1], 4)", 64, "network: level 1 of its encoder has stride 4, prototypes need 2"),
    ("max_pool2d(e[-1], (1, 2))", 32, "network: level 1 of its encoder has stride 1, prototypes need 2"),
    ("max_pool2d(e[-1], (2, 1))", 32, "network: level 1 of its encoder has stride 1, prototypes need 2"),
    ("max_pool2d(e[-1], 4)", 32, "network: it cannot be given images of 32 px (")])
def test_maps_of_other_strides_are_refused(tmp_path, monkeypatch, pooling, size, words):
    monkeypatch.chdir(tmp_path)
    code = worked_example("small")[0].replace("max_pool2d(e[-1], 2)", pooling)
    (tmp_path / "mine.py").write_text(code)
    config = tiny_config("d", "o", "method=mine.py:small", "prototype_weight=1", f"image_size={size}")
    with pytest.raises(BadInput, match=re.escape(words)):
        method_and_model(config)


def test_prototypes_without_fusion_heads_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(worked_example("small")[0].replace("PATHS if levels else ()", "()"))
    with pytest.raises(BadInput, match="network: its fusion is empty; add"):
        method_and_model(tiny_config("d", "o", "method=mine.py:small", "prototype_weight=1"))
    assert not method_and_model(tiny_config("d", "o", "method=mine.py:small"))[1].fusion


def test_another_norm_layer(tmp_path, monkeypatch, capsys):
    """No statistics are collected or spoken of; a width that it cannot divide is one line."""
    state, _ = run_example("group_norm", tmp_path, "width=8")
    assert state["statistics"] == {}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["definitions"]["test_stats"] == "none: the network has no batch norm"
    code, _, err = run_here(monkeypatch, capsys, train, tmp_path, "--config", "c.yaml", "out=other", "width=6",
                            *worked_example("group_norm")[1][4:])
    assert code == 2 and err.startswith("error: network: it cannot be built with width: 6, ") and err.count("\n") == 1


def test_terms_that_begin_later_or_come_now_and_then(tmp_path):
    """A column for each term, null before it begins; where it is missing in a step it counts as 0."""
    state, rows = run_example("later", tmp_path, "rounds=3", "local_epochs=2", "batch_size=1")
    assert [row["round"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert [row["loss_entropy"] == "null" for row in rows] == [True] * 4 + [False] * 2
    assert all(0 < float(row["loss_entropy"]) < 0.07 for row in rows[4:])
    assert all(0 < float(row["loss_size"]) < 0.005 for row in rows)  # every second step: half of at most 0.01
    assert [int(row["prototype_bytes"]) for row in rows] == [0] * 4 + [8] * 2
    assert state["prototypes"]["decoder"][1].shape == (1, 2)
    assert state["kept"]["a"]["memory"] == {"batches": 3 * 2 * 3}
    assert run_eval("--run", "run", "trust=true", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("in_steps, mean", [((1, 3), 5.0), ((2,), 2.5), ((4,), 2.5), ((1, 2, 3, 4), 10.0)])
def test_a_term_is_averaged_over_all_steps(tmp_path, in_steps, mean):
    """Absent from the first batch it is not lost, absent from a later one it counts as 0."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "local_epochs=4", "batch_size=9", "weight_decay=0")
    model, site = method_and_model(config)[1], load_sites(config)[0]
    steps = iter((1, 2, 3, 4))

    def losses(model, x, y, context):
        nothing = 0 * model.head.bias.sum()
        return {"dice": 1 + nothing} | ({"mine": 10 + nothing} if next(steps) in in_steps else {})
    w = dict(model.state_dict())
    update = federated.local_update(model, site, w, {}, None, 1, config, federated.Method(losses))
    assert update.losses == pytest.approx({"dice": 1.0, "mine": mean})


def test_a_number_for_each_site(tmp_path, monkeypatch):
    """The name that a method is told is that of the folder: of one and the same first step the loss is three times."""
    _, rows = run_example("by_site", tmp_path, "batch_size=9", "rounds=1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(worked_example("by_site")[0].replace('"west": 2.0', '"b": 3.0'))
    train.train(tiny_config("data", "other", "method=mine.py:by_site", "batch_size=9", "rounds=1"))
    other = [row for row in rows_of(tmp_path / "other") if row["split"] == "train"]
    ratios = [float(b["loss_dice"]) / float(a["loss_dice"]) for a, b in zip(rows, other)]
    assert ratios == pytest.approx([1, 3], rel=1e-6)


def test_a_schedule_is_followed_in_every_round_and_after_a_kill(tmp_path):
    """lr_t is in the optimizer of round t; Adam counts on."""
    run_example("decay", tmp_path, "optimizer=adam", "lr=1e-3", "rounds=2")
    command = [*worked_example("decay")[1][4:], "out=run", "optimizer=adam", "lr=1e-3", "resume=true"]
    for rounds in (2, 4):  # stopped after 2 of 4: the schedule is that of the config it was stopped in
        train_by(tmp_path, *command, f"rounds={rounds}")
        for kept in load_checkpoint_in(tmp_path, "run")["kept"].values():
            group, = kept["optimizer"]["param_groups"]
            assert group["lr"] == pytest.approx(1e-3 * (1 - (rounds - 1) / rounds) ** 0.9)
            assert kept["optimizer"]["state"][0]["step"].item() == 2 * rounds


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_the_rounds_of_a_schedule_equal_steps_written_out(tmp_path, monkeypatch, kind):
    """One site and one batch a round: what is left is an optimizer's steps with lr_1, lr_2, lr_3, which a resumed
    run repeats to the bit."""
    monkeypatch.chdir(tmp_path)
    code = worked_example("decay")[0]
    if kind == "momentum":
        code = code.replace("make_optimizer(model, config)", "torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)")
    (tmp_path / "mine.py").write_text(f"import torch\n{code}")
    settings = ("method=mine.py:decay", "optimizer=adam", "lr=0.01", "weight_decay=0", "batch_size=9")
    config = tiny_config(write_nuclei(tmp_path / "d", ("a",)), "whole", *settings, "rounds=3")
    train.train(config)
    model, sites = method_and_model(config)[1], load_sites(config)
    optimizer = torch.optim.Adam(model.parameters()) if kind == "adam" else torch.optim.SGD(
        model.parameters(), momentum=0.9)
    model.train()
    for t in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 0.01 * ((4 - t) / 3) ** 0.9
        (x, y), = batches(sites[0].train_slices, 9, seeded(0, "a", t, 1))
        optimizer.zero_grad()
        federated.segmentation_loss(model(x), y).backward()
        optimizer.step()
    state = load_checkpoint("whole/last.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state["weights"][name], value, rtol=1e-5, atol=1e-7)
    train_until(2, monkeypatch, tiny_config(tmp_path / "d", "cut", *settings, "rounds=3"))
    assert load_checkpoint("cut/last.pt")["round"] == 2
    train.train(tiny_config(tmp_path / "d", "cut", *settings, "rounds=3", "resume=true"))
    for key in ("weights", "kept"):
        assert_same(load_checkpoint("cut/last.pt")[key], state[key])


def train_until(t, monkeypatch, config):
    """Train, and stop as if killed before round t + 1."""
    class Killed(Exception):
        pass

    def update(*arguments):
        if arguments[5] > t:
            raise Killed
        return federated.local_update(*arguments)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "local_update", update)
        train.train(config)


def test_a_logger_is_called_once_a_round(tmp_path, monkeypatch):
    """With the round, the updates, and the scores if it had any; a resumed run goes on with the next line."""
    _, rows = run_example("logged", tmp_path, "rounds=3", "eval_every=2")
    lines = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert [line[2] == "None" for line in lines] == [True, False, False]
    for t, loss, _ in lines:
        assert float(loss) == pytest.approx(np.mean([float(row["loss_dice"]) for row in rows if row["round"] == t]))
    assert float(rows[-1]["loss_contrast"]) > 0  # it is FedBCS that is logged
    command = [*worked_example("logged")[1][4:], "out=run", "eval_every=2", "rounds=4", "resume=true"]
    train_by(tmp_path, *command)
    assert run_eval("--run", "run", "trust=true", folder=tmp_path).returncode == 0
    lines = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3", "4"]
    seen = []
    monkeypatch.setattr(train, "method_and_model", lambda config: (
        (found := method_and_model(config))[0]._replace(log=lambda *given: seen.append(given)), found[1]))
    train.train(tiny_config(tmp_path / "data", tmp_path / "mine", "rounds=2", "eval_every=2"))
    assert [t for t, _, _ in seen] == [1, 2] and seen[0][2] is None and set(seen[1][2]) == {"sites", "mean"}
    assert all([update.site for update in updates] == ["a", "b"] for _, updates, _ in seen)


def test_batch_norm_with_buffers_is_scored_by_the_statistics_that_are_named(tmp_path, monkeypatch, capsys):
    """With `case` every case by its own, as in training, whatever the running averages are; its files are read."""
    state, _ = run_example("affine", tmp_path, "test_stats=case", "lr=0.1", "rounds=3")
    for kind in ("best", "last"):
        weights = load_checkpoint(tmp_path / "run" / f"{kind}.pt")["weights"]
        counts = [value for name, value in weights.items() if name.endswith("num_batches_tracked")]
        assert len(counts) == 18 and {value.dtype for value in counts} == {torch.int64}
    assert {value.item() for value in counts} == {2 * 3}  # of the last round: two steps in each
    weights = state["weights"]
    assert not torch.equal(weights["encoder.0.1.weight"], torch.ones(2))  # gamma is trained
    config = tiny_config(tmp_path / "data", "unused", "test_stats=case", "fsr=global", "prototype_weight=1")
    model = UNet(2, fsr="global", norm=nn.BatchNorm2d)
    model.load_state_dict(weights)
    network, device = own_network(model, {}), torch.device("cpu")
    for site in load_sites(config):
        for sample in samples_of(site):
            found, = logits_of(network, sample, config, device)
            with torch.no_grad():
                literal = copy.deepcopy(model).train()(sample.images)
                running = model.eval()(sample.images)
            assert (found - literal).abs().max() < 1e-5
            assert (found - running).abs().max() > 1e-3  # the running averages would give something else
    for statistics in ("case", "site"):
        assert run_eval("--run", "run", f"test_stats={statistics}", "trust=true", folder=tmp_path).returncode == 0
    images = tmp_path / "data" / "a" / "images"
    for words, code in ((["test_stats=site", "out=by_site"], 0), (["probabilities=true", "out=by_case"], 0),
                        (["test_stats=site", "site=a", "out=by_a"], 2)):  # of which it keeps none with `case`
        found, _, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", "run", images, *words, "trust=true")
        assert found == code, err
    assert err.startswith("error: site: the run was trained with test_stats: case and has no statistics of a;")
    model.load_state_dict(load_checkpoint(tmp_path / "run" / "best.pt")["weights"])
    sample = next(s for s in samples_of(load_sites(config)[0]) if s.case == "3")
    with torch.no_grad():
        p = model.train()(sample.images).softmax(1)[:, 1].numpy()
    file, = (tmp_path / "by_case").rglob("3.png.npz")
    with np.load(file) as stored:
        assert np.abs(next(iter(stored.values())).squeeze() - p.squeeze()).max() < 2e-3


def test_a_resnet_of_ones_own(tmp_path):
    """1x1 convolutions of stride 2 with few channels, whose backward pass torch cannot do in channels-last order."""
    state, rows = run_example("resnet", tmp_path, "width=4", "image_size=64")
    assert state["weights"]["beside.3.weight"].shape == (32, 16, 1, 1)
    assert all(float(row["loss_contrast"]) > 0 for row in rows[2:])
    assert run_eval("--run", "run", "trust=true", folder=tmp_path).returncode == 0


def test_only_the_unet_orders_its_maps_channels_last(tmp_path, monkeypatch):
    """In training another network gets images as they are stored, behind an input transform too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(worked_example("resnet")[0])
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "method=mine.py:resnet", "width=4", "image_size=64")
    method, model = method_and_model(config)
    features, orders = model.features, []
    front = AmplitudeNorm(64)
    front.amplitude += 1

    def watched(x):
        z = front(x)
        assert x.is_contiguous() and z.is_contiguous()  # before torch crashes
        orders.append(z.shape)
        return features(z)
    model.features = watched
    federated.local_update(model, load_sites(config)[0], dict(model.state_dict()), {}, None, 1, config, method)
    assert [shape[1:] for shape in orders] == [(3, 64, 64)] * 2


def test_some_sites_a_round(tmp_path):
    """The command line of the page: two sites train in a round, all are scored."""
    command, = re.findall(r"```bash\n(.*?)\n```", (HERE / "docs" / "fork.md").read_text(), re.DOTALL)
    assert command.split()[:4] == ["python", "train.py", "--config", "config.yaml"]
    write_nuclei(tmp_path / "data", "abc")
    (tmp_path / "c.yaml").write_text(as_yaml(tiny_config("data", "run")))
    train_by(tmp_path, *command.split()[4:])
    rows = [(row["round"], row["split"]) for row in rows_of(tmp_path / "run")]
    assert [rows.count((t, split)) for t in "12" for split in ("train", "val")] == [2, 3, 2, 3]


def test_a_file_of_ones_own_may_set_its_switches(tmp_path, monkeypatch):
    """It starts from the plain network, whatever the config file says, unless it has FIXED or the command says so."""
    monkeypatch.chdir(tmp_path)
    code, given = worked_example("fedper")[0], {"task": "nuclei", "data": "demo", "out": "o", "fsr": "adaptive"}
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "fixed.py").write_text(f'{code}\nFIXED = {{"fsr": "global", "prototype_weight": 1.0}}\n')
    for words, switches in ((["method=mine.py:fedper"], ("none", 0)), (["method=fixed.py:fedper"], ("global", 1)),
                            (worked_example("fedper")[1][4:], ("global", 1))):
        config = load_config(given, words)
        assert (config.fsr, config.prototype_weight) == switches
    with pytest.raises(BadInput, match="prototype_weight: 0.0 contradicts method: fixed.py:fedper"):
        load_config(given, ["method=fixed.py:fedper", "prototype_weight=0"])


def test_fedbn_keeps_norm_layers_at_their_site(tmp_path):
    """gamma and beta are neither sent nor averaged, differ between sites, and score their own site."""
    data = write_nuclei(tmp_path / "d", ("a", "b"))
    config = tiny_config(data, tmp_path / "run", "method=fedbn", "lr=0.5")
    assert config.test_stats == "site"
    train.train(config)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    a, b = state["local"]["a"], state["local"]["b"]
    assert len(a) == 2 * 18 and all(".1." in name or ".4." in name for name in a)
    assert not any(torch.equal(a[name], b[name]) for name in ("decoder.0.4.weight", "decoder.0.4.bias"))
    for name in a:  # the global ones are still those of the beginning
        assert torch.equal(state["weights"][name], torch.full_like(a[name], float(name.endswith("weight"))))
    sent = [int(row["weight_bytes"]) for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert set(sent) == {4 * sum(v.numel() for name, v in state["weights"].items() if name not in a)}
    method, model = method_and_model(config)
    update = federated.local_update(model, load_sites(config)[0], state["weights"], {}, state["kept"]["a"], 3, config,
                                    method)
    assert update.weights.keys() == state["weights"].keys() - a.keys() and update.kept["local"].keys() == a.keys()
    assert state["statistics"].keys() == {"a", "b"}
    assert not any("running" in name for name in state["weights"])
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    result = json.loads((tmp_path / "run" / "result.json").read_text())["best"]["test"]["sites"]
    again = eval_result(tmp_path)["best"]["test"]["sites"]
    assert again == result and result["a"]["dice"] > 0.3
    best["local"]["a"]["decoder.0.4.weight"] *= -1  # the last map of site a is another
    torch.save(best, tmp_path / "run" / "best.pt")
    other = eval_result(tmp_path)["best"]["test"]["sites"]
    assert other["a"] != result["a"] and other["b"] == result["b"]


@pytest.mark.parametrize("build, words", [
    (lambda: UNet(2, fsr="adaptve"), "fsr: expected adaptive or global, not 'adaptve'"),
    (lambda: StyleRecalibration(4, "globl"), "fsr: expected adaptive or global, not 'globl'"),
    (lambda: UNet(fsr="adaptve"), "fsr: expected adaptive or global, not 'adaptve'"),
    (lambda: UNet(2, norm="bacth"), "norm: expected batch, group or a function of the channels, not 'bacth'")])
def test_words_misspelt_in_code_are_refused(build, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build()


# ---- What a fork may bring along ----

def test_whole_numbers_are_averaged_to_the_nearest():
    """An index table that all sites share stays what it is; a flag too; a count is a whole number; a complex
    weight keeps both parts."""
    table = torch.arange(400)
    updates = [federated.Update(str(n), n, {
        "table": table, "mask": table % 2 == 0, "count": torch.tensor(count), "z": torch.tensor(1j * count)},
        {}, {}, {}, 0.0) for n, count in ((17, 4), (3, 4), (29, 4), (31, 5), (5, 5))]
    found = federated.average_weights(updates)
    assert torch.equal(found["table"], table) and torch.equal(found["mask"], table % 2 == 0)
    assert found["table"].dtype == torch.int64 and torch.equal(found["count"], torch.tensor(4))
    assert found["z"].imag.item() == pytest.approx(4 + 36 / 85)


@pytest.mark.parametrize("size", [32, 96])
def test_an_input_transform_of_a_fixed_size_goes_with_prototypes(size):
    """The strides of a network of one's own are looked at in images of the run's size."""
    config = load_config({"task": "nuclei", "data": "demo", "out": "x", "width": 2, "image_size": size})

    class Mine(UNet):
        def features(self, x):
            assert x.shape[2:] == (size, size)
            return super().features(x)
    method = federated.fedbcs(config)._replace(
        input_transform=AmplitudeNorm(size), network=lambda own, levels: Mine(own.width, levels=levels))
    assert build_model(config, method).fusion


def test_an_optimizer_of_ones_own_is_resumed(tmp_path, monkeypatch):
    """Its state may hold numbers and lists of tensors, as those of many optimizers do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("""
import torch
from federated import fedbcs
class Mine(torch.optim.SGD):
    def step(self, closure):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"], state["old"] = state.get("count", 0) + 1, [*state.get("old", []), p.grad.clone()][-2:]
            p.data -= 1e-3 * state["old"][0] / state["count"]
def mine(config):
    return fedbcs(config)._replace(optimizer=lambda model, config, t: Mine(model.parameters(), lr=1e-3))
""")
    data, settings = write_nuclei(tmp_path / "d"), ("method=mine.py:mine", "batch_size=9")
    train.train(tiny_config(data, "whole", *settings, "rounds=3"))
    train.train(tiny_config(data, "run", *settings, "rounds=1"))
    train.train(tiny_config(data, "run", *settings, "rounds=3", "resume=true"))
    whole, run = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    for key in ("weights", "kept"):
        assert_same(run[key], whole[key])
    state = run["kept"]["a"]["optimizer"]["state"][0]
    assert state["count"] == 3 and len(state["old"]) == 2


FROZEN = """
import torch
from federated import fedbcs
from unet import UNet
class Net(UNet):
    def features(self, x):
        logits, maps = super().features(x)
        return torch.nn.functional.dropout(logits, 0.5, self.training), maps
def mine(config):
    def optimizer(model, config, t):
        model.encoder.requires_grad_(t > 2)
        return torch.optim.AdamW([p for p in model.parameters() if ALL or p.requires_grad], 1e-3)
    return fedbcs(config)._replace(network=lambda own, levels: Net(own.width, levels=levels), optimizer=optimizer)
"""


def test_dropout_and_a_frozen_encoder_repeat_after_a_kill(tmp_path, monkeypatch):
    """What torch draws is seeded by site and round. A weight without a gradient stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FROZEN.replace("ALL", "True"))
    data, settings = write_nuclei(tmp_path / "d"), ("method=mine.py:mine", "rounds=3", "prototype_weight=1")
    train.train(tiny_config(data, "whole", *settings))
    train_until(2, monkeypatch, config := tiny_config(data, "cut", *settings))
    initial, cut = method_and_model(config)[1].state_dict(), load_checkpoint("cut/last.pt")["weights"]
    changed = {name.split(".")[0] for name in cut if not torch.equal(cut[name], initial[name])}
    assert changed == {"bottleneck", "up", "decoder", "fsr", "head", "fusion"}
    train.train(tiny_config(data, "cut", *settings, "resume=true"))
    cut, whole = (load_checkpoint(f"{name}/last.pt") for name in ("cut", "whole"))
    for key in ("weights", "kept"):
        assert_same(cut[key], whole[key])
    assert not torch.equal(cut["weights"]["encoder.0.0.weight"], initial["encoder.0.0.weight"])


def test_kept_state_is_not_given_to_other_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FROZEN.replace("ALL", "False"))
    with pytest.raises(ValueError, match="parameter group"):
        train.train(tiny_config(write_nuclei(tmp_path / "d"), "run", "method=mine.py:mine", "rounds=3"))


@pytest.mark.parametrize("memory, sent, words", [
    ("np.float64(3)", "{}", "its memory after round 2 cannot be read back"),
    ("(lambda: 3)", "{}", "its memory after round 2 cannot be read back"),
    ("3", "{1: torch.ones(2)}", "its G after round 2 cannot be read back"),
    ("3", "{torch.tensor(1): torch.ones(1, 2)}", "its G after round 2 cannot be read back"),
])
def test_what_no_checkpoint_can_hold_stops_the_round_that_makes_it(tmp_path, monkeypatch, memory, sent, words):
    """The round and not the end of the run; the checkpoint of the round before is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"""
import numpy as np
import torch
from federated import Method, run_network, segmentation_loss
def mine(config):
    def losses(model, x, y, context):
        context.memory["mine"] = {memory} if context.t == 2 else 3
        return {{"dice": segmentation_loss(run_network(model, x, config)[0], y)}}
    def send(model, context):
        return {{"decoder": {sent}}} if context.t == 2 else {{}}
    return Method(losses, send, aggregate=lambda sent: sent[0])
""")
    data = write_nuclei(tmp_path / "d")
    with pytest.raises(BadInput, match=words):
        train.train(tiny_config(data, "run", "method=mine.py:mine", "rounds=3"))
    assert load_checkpoint("run/last.pt")["round"] == 1


def load_checkpoint_in(folder, run):
    return torch.load(folder / run / "last.pt", weights_only=True)


@pytest.mark.parametrize("method, words", [
    ("none.py:f", "method: there is no file none.py"),
    ("mine.py:g", "method: mine.py has no function g(config)"),
    ("mine.py:f", "method: mine.py has no function f(config)"),
])
def test_a_method_that_cannot_be_had(tmp_path, monkeypatch, method, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def f(config):\n    return 3\n")
    with pytest.raises(BadInput, match=re.escape(words)):
        find_method(SimpleNamespace(method=method))
