"""Tests of what a site protects itself from: a server that asks too much, and its own folders' content."""

import os
import re

import pytest
import torch

from config import BadInput
from rounds.reading import load_whole
from test_fedbcs import write_nuclei

flwr_app = pytest.importorskip("flwr.app")
from flower import app as flower_app
from flower import messages, site_rules
from tests.test_flower import Hospitals

pytestmark = pytest.mark.flower


def a_site(folder, *overrides, **node):
    """A node of site a, and ask(t, last): it trains a round."""
    if not (folder / "data").exists():
        write_nuclei(folder / "data", ("a",))
    nodes = Hospitals(folder, folder / "data", "a", overrides)
    nodes.nodes[1] |= node

    def ask(t, last=0):
        content = {"weights": messages.pack_weights(flower_app.own_site(nodes.context(1))[3].state_dict()),
                   "prototypes": flwr_app.ArrayRecord(), "round": {"t": t, "score": False},
                   "turn": {"train": True, "last": last}}
        return flower_app.train_site(content, nodes.context(1))
    return nodes, ask


@pytest.mark.parametrize("key, wanted, most", [
    ("width", "65", 64), ("image_size", "1040", 1024), ("batch_size", "65", 64), ("local_epochs", "21", 20),
    ("rounds", "2001", 2000), ("levels", "[0,1,2]", 2)])
def test_bounds_hold_by_default_and_can_be_raised(tmp_path, monkeypatch, key, wanted, most):
    monkeypatch.setattr(site_rules, "free_memory", lambda: None)
    monkeypatch.setattr(flower_app, "load_decoded", lambda *_: pytest.fail("read its data first"))
    node = {"max_levels": 2} if key == "levels" else {}
    nodes, _ = a_site(tmp_path, f"{key}={wanted}", **node)
    with pytest.raises(BadInput, match=re.escape(f"this site's max_{key} is {most}")):
        flower_app.own_site(nodes.context(1))
    nodes, _ = a_site(tmp_path, f"{key}={wanted}", **{f"max_{key}": 5000})
    site_rules.check_bounds(flower_app.settings(nodes.context(1))[0], nodes.nodes[1])


@pytest.mark.parametrize("optimizer, copies", [("sgd", 5), ("adam", 9)])
def test_memory_is_looked_at_before_a_step(tmp_path, monkeypatch, optimizer, copies):
    _, ask = a_site(tmp_path, f"optimizer={optimizer}")
    need = 3 * 2**17 + copies * 4 * 32000  # maps, and weights of width 2
    monkeypatch.setattr(site_rules, "free_memory", lambda: need - 1)
    with pytest.raises(BadInput, match=r"a training step takes more than 0\.00 GB, 0\.00 GB are free"):
        ask(1)
    monkeypatch.setattr(site_rules, "free_memory", lambda: need)
    ask(1)


def test_a_round_is_not_trained_without_end(tmp_path):
    """A server may ask again after a kill, not 58 times; nor for rounds that the run does not have."""
    _, ask = a_site(tmp_path, "rounds=2")
    for _ in range(site_rules.ANSWERS):
        ask(1)
    with pytest.raises(BadInput, match=r"round 1: .* the training of this one 3 times, its max_answers is 3"):
        ask(1)
    ask(2, last=1)
    with pytest.raises(BadInput, match="round 1"):
        ask(1, last=1)
    for t in (0, -1, 3):
        with pytest.raises(BadInput, match="the run has 2 rounds"):
            ask(t)
    a_site(tmp_path, "rounds=2", max_answers=4)[1](1)


@pytest.mark.parametrize("question, task, parts", [
    ("validation", flower_app.validate_site, {"weights": {"t": 1, "best": 0}}),
    ("end", flower_app.finish_site, {"best": {"best": 1, "last": 1}, "last": {"best": 1, "last": 1}})])
def test_nor_is_it_scored_without_end(tmp_path, question, task, parts):
    nodes, ask = a_site(tmp_path, "rounds=1")
    ask(1)
    w = messages.pack_weights(flower_app.own_site(nodes.context(1))[3].state_dict())
    content = {"turn": {"train": False, "last": 1}} | {name: w for name in parts}
    content |= {"round": next(iter(parts.values()))}
    kept = load_whole(tmp_path / "a" / "kept.pt")
    for _ in range(site_rules.ANSWERS):
        task(content, nodes.context(1))
    with pytest.raises(BadInput, match=f"answered the {question} of this one 3 times"):
        task(content, nodes.context(1))
    assert load_whole(tmp_path / "a" / "kept.pt")[1].keys() == kept[1].keys()  # what it trained with is there


def test_a_site_that_does_not_train_is_not_scored_without_end(tmp_path):
    _, ask = a_site(tmp_path, "rounds=1", "hold_out=a")
    for _ in range(site_rules.ANSWERS):
        assert ask(1)["scalars"] == {"n": 0}
    with pytest.raises(BadInput, match="answered the training of this one 3 times"):
        ask(1)


def test_a_gpu_is_looked_at_too(tmp_path, monkeypatch):
    nodes, _ = a_site(tmp_path, "optimizer=sgd")
    config = flower_app.settings(nodes.context(1))[0]
    monkeypatch.setattr(site_rules, "pick_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**17 + 20 * 32000, 2**40))
    site_rules.check_bounds(config, nodes.nodes[1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**17 + 20 * 32000 - 1, 2**40))
    with pytest.raises(BadInput, match="a training step takes more than"):
        site_rules.check_bounds(config, nodes.nodes[1])


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch, capsys):
    honest = site_rules.save

    def full(file, content):
        if file.name == "decoded.pt":
            raise BadInput(f"{file}: No space left on device")
        honest(file, content)
    monkeypatch.setattr(site_rules, "save", full)
    assert "weights" in a_site(tmp_path)[1](1)
    assert "warning: a: the decoded images cannot be kept" in capsys.readouterr().err
    assert not (tmp_path / "a" / "decoded.pt").exists()


def test_links_that_lead_round_are_followed_once(tmp_path, monkeypatch):
    nodes, _ = a_site(tmp_path)
    for name in ("x", "y", "z"):
        os.symlink(tmp_path / "data" / "a", tmp_path / "data" / "a" / "images" / name)
    config, entered, walk = flower_app.settings(nodes.context(1), f"data={tmp_path / 'data' / 'a'}")[0], [], os.walk
    monkeypatch.setattr(os, "walk", lambda *given, **how: (
        row for row in walk(*given, **how) if not entered.append(row) and (len(entered) < 50 or pytest.fail("round"))))
    assert "images/0.png" in site_rules.mark_of(config)


@pytest.mark.parametrize("out", ["data/a/out", "data/a", "data"])
def test_out_lies_apart_from_the_data(tmp_path, out):
    with pytest.raises(BadInput, match="the data folder"):
        a_site(tmp_path, out=str(tmp_path / out))[1](1)
    assert not (tmp_path / "data" / "a" / "decoded.pt").exists()


def test_another_run_replaces_nothing(tmp_path):
    a_site(tmp_path)[1](1)
    before = (tmp_path / "a" / "kept.pt").read_bytes()
    for overrides in (("seed=1",), ("method=fedavg",)):
        with pytest.raises(BadInput, match="config.yaml: belongs to another config"):
            a_site(tmp_path, *overrides)[1](1)
    assert (tmp_path / "a" / "kept.pt").read_bytes() == before
    a_site(tmp_path, "rounds=40", "resume=true")[1](2, last=1)  # longer is the same run
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(BadInput, match="has a run's files but no config.yaml"):
        a_site(tmp_path)[1](3, last=2)


def test_what_a_site_should_have_kept_is_missed(tmp_path, capsys):
    _, ask = a_site(tmp_path)
    ask(1)
    ask(2, last=1)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "a" / "kept.pt").unlink()
    ask(3, last=2)
    assert "warning: a: kept.pt holds nothing of round 2" in capsys.readouterr().err


def test_files_of_a_site_are_its_own(tmp_path):
    before = os.umask(0o022)
    try:
        nodes, _ = a_site(tmp_path, "rounds=1")
        nodes.train()
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert {file.name for file in files} > {"kept.pt", "decoded.pt", "best.pt", "result.json", "predictions.png"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert set(load_whole(tmp_path / "a" / "kept.pt")) >= {1, "answered"} and torch.is_tensor(
        load_whole(tmp_path / "a" / "best.pt")["weights"]["head.weight"])
