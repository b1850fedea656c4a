"""Tests of who takes part between hospitals: the sites that the server means, keys of the federation, fields.

They need flower/requirements.txt. Run them with `pytest -m flower`.
"""

import math
import re
import socket
import subprocess
from types import SimpleNamespace

import pytest
import torch

import federated
from config import BadInput
from flower.fit import SiteFailed
from methods.find import find_method
from test_fedbcs import HERE, first_state, one_round, tiny_config, write_nuclei
from tests.helpers import assert_same

flwr_app = pytest.importorskip("flwr.app")
ArrayRecord, Error, Message, RecordDict = (
    flwr_app.ArrayRecord, flwr_app.Error, flwr_app.Message, flwr_app.RecordDict)
pytestmark = pytest.mark.flower
from flower import app as flower_app
from flower import fit
from flower.guards import GUARDS, load_settings
from tests.test_flower import (
    Hospitals,
    environment,
    in_process,
    sent_bytes,
    three_free_ports,
    without_facts,
)

# ---- The sites that the server means ----

@pytest.mark.parametrize("listed", [False, True])
def test_more_sites_than_expected_never_join(tmp_path, capsys, listed):
    """Neither one more of a number nor one that is not listed; it ends nothing and is named once. What is listed
    in a file stays at the server."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "x"))
    (tmp_path / "names.txt").write_text("b\n\n a \n")
    nodes = Hospitals(tmp_path, data, "xab" if listed else "abx", ("rounds=2",))
    nodes.run["sites"] = str(tmp_path / "names.txt") if listed else 2
    state, result = nodes.train()
    said = capsys.readouterr().err
    assert {row[2] for row in state["history"]} == set(result["last"]["test"]["sites"]) == {"a", "b"}
    assert said.count("is refused: it answers as x, ") == 1
    kinds = [asked.metadata.message_type for asked, reply in nodes.sent if reply.content["site"]["name"] == "x"]
    assert kinds == (["query"] if listed else ["train"])  # the weights of the others' training never reach it
    del nodes.nodes[1 if listed else 3]
    nodes.run |= {"sites": "a, b", "overrides": nodes.run["overrides"] + " rounds=3 resume=true"}
    assert nodes.train()[0]["round"] == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["East", "еast", "eαst", "east,west", "east\u034f", "ea\u3164st", "east\ufe0f", "ｅast"])
def test_names_that_look_alike_are_refused(tmp_path, capsys, name):
    """Of another case, with Cyrillic, Greek or wide letters, with letters that cannot be seen, with a comma."""
    data = write_nuclei(tmp_path / "data", ("east", "north"))
    nodes = Hospitals(tmp_path, data, ("east", "north"), ("rounds=1", "on_site_failure=skip"))
    nodes.nodes[2]["site"] = name
    state, _ = nodes.train()
    assert {row[2] for row in state["history"]} == {"east"}
    assert re.search("site of node 2 failed in round 1: its name .*(looks like that of east|is no printable text)",
                     capsys.readouterr().err)


def test_a_name_belongs_to_the_key_that_was_registered_by_it(tmp_path):
    """Even while the node of that name is away."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a", "b")), "ab", ("rounds=1",))
    nodes.get_nodes = lambda: [SimpleNamespace(node_id=1, name="a"), SimpleNamespace(node_id=2, name="mallory")]
    with pytest.raises(SiteFailed, match="its key is registered as mallory and it answers as b"):
        nodes.train()


def test_a_site_that_is_held_out_never_trains(tmp_path, capsys):
    """Though it sends an update, made with splits of its own."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    nodes = Hospitals(tmp_path, data, "abc", ("rounds=2", "hold_out=b", "on_site_failure=skip"))
    honest = nodes.client

    def eager(message, context):
        if context.node_config["site"] == "b" and message.metadata.message_type == "train":
            message.content["turn"]["train"] = True
            context.run_config = context.run_config | {
                "overrides": context.run_config["overrides"].replace("hold_out=b", "hold_out=none")}
        return honest(message, context)
    nodes.client = eager
    state, _ = nodes.train()
    assert {row[2] for row in state["history"] if row[1] == "train"} == {"a", "c"}
    assert capsys.readouterr().err.count("it sent an update in a round that it was not drawn for") == 2


def test_hospitals_learn_nothing_of_each_other(tmp_path):
    """No name of another site is in what is sent to one, though each gets the state of its own optimizer."""
    data = write_nuclei(tmp_path / "data", ("east", "north"))
    nodes = Hospitals(tmp_path, data, ("east", "north"), ("rounds=3",))
    nodes.train()
    for asked, reply in nodes.sent:
        other = {"east": b"north", "north": b"east"}[reply.content["site"]["name"]]
        assert other not in sent_bytes(asked.content)
        if asked.metadata.message_type == "train":
            assert asked.content["turn"]["last"] == asked.content["round"]["t"] - 1


@pytest.mark.parametrize("script", ["try_it.sh", "simulate.sh"])
def test_a_port_that_is_taken_is_said_at_once(tmp_path, script):
    """Before anything is started or written; and a server that does not start shows its log."""
    port, data = three_free_ports(), write_nuclei(tmp_path / "data", ("east", "north"), 3)
    command = ["bash", HERE / "flower" / script, *([data] if script == "simulate.sh" else []), tmp_path / "out"]
    env = environment(tmp_path / "home") | {"PORT": str(port), "DATA": str(data)}

    def run():
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    for taken in (port, port + 2)[:1 if script == "simulate.sh" else 2]:
        with socket.create_server(("127.0.0.1", taken)):
            done = run()
        assert (done.returncode, done.stderr) == (2, f"error: port {taken} is in use, set PORT\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "flower-superlink").write_text("#!/bin/sh\necho address already in use >&2; exit 1\n")
    (tmp_path / "flower-superlink").chmod(0o755)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = run()
    assert done.returncode == 1 and "address already in use" in done.stderr
    assert "error: the server did not start, see above" in done.stderr


# ---- Keys of the federation, and sites that are drawn ----

def test_settings_of_the_federation_are_typed_and_kept_apart(tmp_path):
    """From the file or the overrides, which win; no config has them, and nothing else is read by them."""
    file = tmp_path / "c.yaml"
    file.write_text("task: nuclei\ndata: d\nmin_sites: 2\nmax_share: 0.5\nlr: 0.5\n")
    found, guards = load_settings(file, ["max_share=0.25", "update_norm=5", "on_site_failure=skip", "lr=0.1"])
    assert vars(guards) == {"on_site_failure": "skip", "min_sites": 2, "max_share": 0.25, "update_norm": 5.0}
    assert (found.lr, found.out) == (0.1, "runs/c") and not vars(found).keys() & GUARDS.keys()
    assert vars(load_settings(HERE / "config.yaml", [])[1]) == {
        "on_site_failure": "stop", "min_sites": 1, "max_share": 1.0, "update_norm": 10.0}
    for wrong, words in (("max_share=0", "above 0"), ("max_share=1.5", "at most 1"), ("update_norm=0.5", "at least 1"),
                         ("update_norm=x", "expected a number"), ("min_sites=0", "at least 1"), ("on_site_failure=maybe", "stop or skip")):
        with pytest.raises(BadInput, match=f"^{wrong.partition('=')[0]}: .*{words}"):
            load_settings(file, [wrong])


def test_some_sites_a_round_over_flower(tmp_path):
    """The sites that train.py draws, to the bit, in a run that is resumed after two rounds; the others score and
    send nothing; no site is told of another."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "c", "d"))
    overrides = ("rounds=4", "sites_per_round=2", "hold_out=c")
    state, result = in_process(tmp_path / "one", data, *overrides)
    first = Hospitals(tmp_path, data, "abcd", ("rounds=2", *overrides[1:]))
    first.train()
    nodes = Hospitals(tmp_path, data, "abcd", (*overrides, "resume=true"))
    served, said = nodes.train()
    trained = [[row[2] for row in state["history"] if row[:2] == (t, "train")] for t in (1, 2, 3, 4)]
    assert trained == [[row[2] for row in served["history"] if row[:2] == (t, "train")] for t in (1, 2, 3, 4)]
    assert all(len(names) == 2 and "c" not in names for names in trained) and len(set(map(tuple, trained))) > 1
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(said) == without_facts(result)
    sent = [(asked.content["round"]["t"], reply.content["site"]["name"]) for asked, reply in first.sent + nodes.sent
            if asked.metadata.message_type == "train" and "weights" in reply.content]
    assert sorted(sent) == [(t, name) for t, names in enumerate(trained, 1) for name in names]


def test_an_update_that_nobody_asked_for_is_left_out(tmp_path, monkeypatch, capsys):
    """A site that trains although another was drawn."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    nodes = Hospitals(tmp_path, data, "abc", ("rounds=1", "sites_per_round=1", "on_site_failure=skip"))
    honest = nodes.client

    def eager(message, context):
        if message.metadata.message_type == "train":
            message.content["turn"]["train"] = True
        return honest(message, context)
    nodes.client = eager
    state, _ = nodes.train()
    said = capsys.readouterr().err
    assert len([row for row in state["history"] if row[1] == "train"]) == 1
    assert said.count("it sent an update in a round that it was not drawn for") == 2


# ---- What a server takes ----

def spoiled(update, how):
    """An update that something is wrong with."""
    w, c = dict(update.weights), {p: dict(v) for p, v in update.prototypes.items()}
    if how == "nan weight":
        w["head.weight"] = w["head.weight"] * math.nan
    elif how == "inf prototype":
        c["encoder"][1] = c["encoder"][1] / 0
    elif how == "prototype shape":
        c["encoder"][1] = c["encoder"][1][:-1]
    elif how == "no images":
        return update._replace(n=0)
    elif how == "raises":
        return RuntimeError("the disk has gone")
    return update._replace(weights=w, prototypes=c)


@pytest.mark.parametrize("how, words", [
    ("raises", "the disk has gone"), ("nan weight", "not finite"), ("inf prototype", "not finite"),
    ("prototype shape", "prototypes of the encoder are not vectors of 48 numbers"),
    ("no images", "0 training images")])
def test_an_update_that_is_unfit_stops_the_run_or_sits_out(tmp_path, capsys, how, words):
    config = tiny_config(write_nuclei(tmp_path / "d", ("a", "b", "c")), "unused")
    model, sites, w = first_state(config)
    fields = fit.expected_fields(model, config, find_method(config))
    updates = {u.site: u for u in one_round(model, sites, w, {}, {}, 1, config)[2]}
    results = updates | {"b": spoiled(updates["b"], how)}
    skip = load_settings(HERE / "config.yaml", ["on_site_failure=skip", "min_sites=2"])[1]
    assert [u.site for u in fit.accept(results, w, fields, 1, skip)] == ["a", "c"]
    said = capsys.readouterr().err
    assert "site b failed in round 1" in said and words in said and "left out" in said
    skip.min_sites = 3
    with pytest.raises(SiteFailed, match="2 sites are left in round 1, min_sites: 3"):
        fit.accept(results, w, fields, 1, skip)
    with pytest.raises(SiteFailed, match=f"site b failed in round 1: .*{words}"):
        fit.accept(results, w, fields, 1, load_settings(HERE / "config.yaml", [])[1])


@pytest.mark.parametrize("P", [torch.zeros(0), torch.zeros(0, 48), torch.zeros(2, 2, 48),
                               torch.zeros(47), torch.tensor(1.0)])
def test_a_prototype_of_another_shape_is_refused(P):
    update = federated.Update("a", 1, {"w": torch.zeros(2)}, {"encoder": {1: P}}, {"dice": 1.0}, {}, 0.0)
    fields = fit.Fields({"w": torch.zeros(2)}, {"encoder": (48, False)}, 2, {"dice"})
    assert fit.check_update(update, fields) == "its prototypes of the encoder are not vectors of 48 numbers"
    good = update._replace(prototypes={"encoder": {1: torch.zeros(48)}})
    assert fit.check_update(good, fields) is None
    several = fields._replace(prototypes={"encoder": (48, True)})
    assert fit.check_update(good, several) and fit.check_update(update, several)
    assert fit.check_update(good._replace(prototypes={"encoder": {1: torch.zeros(1, 48)}}), several) is None


@pytest.mark.parametrize("names, taken", [(("dice", "mine"), True), (("dice", "x" * 41), False), (("dice", "a b"), False),
                                          (tuple(f"t{i}" for i in range(17)), False)])
def test_a_method_that_declares_no_terms_may_have_any(names, taken):
    fields = fit.Fields({"w": torch.zeros(2)}, {}, 2, set())
    update = federated.Update("a", 1, {"w": torch.zeros(2)}, {}, dict.fromkeys(names, 1.0), {}, 0.0)
    assert (fit.check_update(update, fields) is None) == taken


def test_prototypes_that_a_method_does_not_declare(tmp_path, monkeypatch, capsys):
    """The site says so itself, in the first round; nothing of it is sent."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a",)), "a", ("rounds=1",))

    def local_update(*given, **more):
        update = federated.local_update(*given, **more)
        return update._replace(prototypes=update.prototypes | {"other": {1: torch.zeros(3)}})
    monkeypatch.setattr(flower_app, "local_update", local_update)
    with pytest.raises(SiteFailed, match="site a failed in round 1: BadInput: see the log of that site$"):
        nodes.train()
    assert ("method: it has prototypes of the path 'other', which the method does not have; declare in Method.vectors"
            in capsys.readouterr().err)
    assert all(set(reply.content) == {"site"} for _, reply in nodes.sent)
