"""Tests of what one hostile or broken site can do to a federation: it is named and left out, and no more."""

import contextlib
import copy
import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import federated
from config import BadInput, load_config
from flower import fit
from flower.site_rules import check_server
from rounds.reading import load_checkpoint, load_whole
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import assert_same

flwr_app = pytest.importorskip("flwr.app")
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from flower import app as flower_app
from flower import make_certificates, messages
from tests.test_flower import Federation, Hospitals, in_process, wait_for, without_facts

pytestmark = pytest.mark.flower
SKIP = ("rounds=1", "on_site_failure=skip", "min_sites=2")


# ---- Every field that travels: its type and range, what breaks it, and what is said ----

def arrays(name, change):
    """An attack on one record of arrays: change {key: tensor} in place or return another."""
    def attack(content):
        tensors = dict(content[name].to_torch_state_dict())
        content[name] = ArrayRecord(change(tensors) or tensors)
    return attack


def each(change):
    """A change of every tensor of a record."""
    return lambda tensors: {key: change(value) for key, value in tensors.items()}


def first(change):
    """A change of the first tensor of a record."""
    def attack(tensors):
        key = next(iter(tensors))
        tensors[key] = change(tensors[key])
    return attack


def floats(change):
    """A change of the numbers that are in the bytes of the weights."""
    return each(lambda v: change(v.view(torch.float32)).reshape(-1).view(torch.uint8))


def rename(tensors, new):
    """Give the first tensor another name."""
    key = next(iter(tensors))
    return {new if name == key else name: value for name, value in tensors.items()}


def metric(name, **values):
    """An attack on one record of numbers: None removes one."""
    def attack(content):
        kept = dict(content[name]) | values
        content[name] = MetricRecord({key: value for key, value in kept.items() if value is not None})
    return attack


def raw(name, **wrong):
    """An attack on the description of the first array: what it says it is is not what it is."""
    def attack(content):
        key = next(iter(content[name]))
        old = content[name][key]
        parts = {"dtype": old.dtype, "shape": old.shape, "stype": old.stype, "data": old.data} | wrong
        content[name][key] = Array(**parts)
    return attack


def without(name):
    return lambda content: content.pop(name)


def replaced(name, record):
    return lambda content: content.__setitem__(name, record)


WEIGHTS = r"its weights are not the \d+ bytes of the network's"
VECTORS = "its prototypes of the encoder are not vectors of 48 numbers"
READ = "its answer cannot be read"
# field, its type and range: {what breaks it: (attack, what the server says)}
TRAIN = {
    "weights: as many bytes as the network's, which are its float32 numbers, finite, at most 1e8": {
        "missing record": (without("weights"), READ),
        "numbers for arrays": (replaced("weights", MetricRecord({"a": 1.0})), READ),
        "settings for arrays": (replaced("weights", ConfigRecord({"a": "b"})), READ),
        "empty": (replaced("weights", ArrayRecord({})), WEIGHTS),
        "one more": (arrays("weights", lambda t: t | {"extra": torch.zeros(1)}), WEIGHTS),
        "renamed": (arrays("weights", lambda t: rename(t, "../../x")), WEIGHTS),
        "a byte less": (arrays("weights", each(lambda v: v[:-1])), WEIGHTS),
        "a number more": (arrays("weights", each(lambda v: torch.cat([v, v[:4]]))), WEIGHTS),
        "two dimensions": (arrays("weights", each(lambda v: v[None])), WEIGHTS),
        "scalar": (arrays("weights", each(lambda v: v[0])), WEIGHTS),
        "numbers for bytes": (arrays("weights", each(lambda v: v.view(torch.float32))), WEIGHTS),
        "float64": (arrays("weights", floats(torch.Tensor.double)), WEIGHTS),
        "float16": (arrays("weights", floats(torch.Tensor.half)), WEIGHTS),
        "complex": (arrays("weights", floats(lambda v: v.to(torch.complex64))), WEIGHTS),
        "signed": (arrays("weights", each(lambda v: v.view(torch.int8))), WEIGHTS),
        "bool": (arrays("weights", each(lambda v: v > 0)), WEIGHTS),
        "nan": (arrays("weights", floats(lambda v: v * math.nan)), "its weights are not finite"),
        "one inf": (arrays("weights", floats(lambda v: v.index_fill(0, torch.tensor([0]), math.inf))), "not finite"),
        "all bits set": (arrays("weights", each(lambda v: v * 0 + 255)), "not finite"),
        "1e30": (arrays("weights", floats(lambda v: v * 0 + 1e30)), r"its weights reach 1\.0e\+30, more than 1e\+08"),
        "-1e12": (arrays("weights", floats(lambda v: v * 0 - 1e12)), r"its weights reach 1\.0e\+12"),
        "lies about its type": (raw("weights", dtype="float64"), WEIGHTS),
        "lies about its shape": (raw("weights", shape=(10**9, 10**9)), WEIGHTS),
        "negative shape": (raw("weights", shape=(-1,)), WEIGHTS),
        "another library's": (raw("weights", stype="pickle"), WEIGHTS),
        "no array inside": (raw("weights", data=b"junk"), "its answer cannot be read"),
        "nothing inside": (raw("weights", data=b""), "its answer cannot be read"),
        "too much inside": (raw("weights", data=b"x" * 10**6), WEIGHTS)},
    "prototypes: PATH/CLASS of the method, float32, its length, finite, at most 1e4; a class may be missing": {
        "missing record": (without("prototypes"), READ),
        "another path": (arrays("prototypes", lambda t: t | {"bottleneck/1": torch.zeros(48)}), "path 'bottleneck'"),
        "another class": (arrays("prototypes", lambda t: t | {"encoder/7": torch.zeros(48)}), "the class 7"),
        "negative class": (arrays("prototypes", lambda t: t | {"encoder/-1": torch.zeros(48)}), "the class -1"),
        "class that is no number": (arrays("prototypes", lambda t: t | {"encoder/x": torch.zeros(48)}), READ),
        "no class": (arrays("prototypes", lambda t: t | {"encoder": torch.zeros(48)}), READ),
        "a long name": (arrays("prototypes", lambda t: t | {"e" * 9999: torch.zeros(48)}), READ),
        "shorter": (arrays("prototypes", first(lambda v: v[:-1])), VECTORS),
        "longer": (arrays("prototypes", first(lambda v: torch.cat([v, v]))), VECTORS),
        "several": (arrays("prototypes", first(lambda v: v.repeat(1000, 1))), VECTORS),
        "one in a list": (arrays("prototypes", first(lambda v: v[None])), VECTORS),
        "empty": (arrays("prototypes", first(lambda v: v[:0])), VECTORS),
        "a number": (arrays("prototypes", first(torch.sum)), VECTORS),
        "float64": (arrays("prototypes", each(torch.Tensor.double)), VECTORS),
        "complex": (arrays("prototypes", each(lambda v: v.to(torch.complex64))), VECTORS),
        "whole numbers": (arrays("prototypes", each(torch.Tensor.long)), VECTORS),
        "nan": (arrays("prototypes", first(lambda v: v * math.nan)), "its prototypes are not finite"),
        "1e30": (arrays("prototypes", each(lambda v: v * 0 + 1e30)), r"its prototypes reach 1\.0e\+30"),
        "1e5": (arrays("prototypes", first(lambda v: v * 0 - 1e5)), r"its prototypes reach 1\.0e\+05"),
        "no array inside": (raw("prototypes", data=b"junk"), "its answer cannot be read")},
    "losses: finite numbers, names of the method's terms": {
        "missing record": (without("losses"), READ),
        "none": (replaced("losses", MetricRecord({})), "its losses are not finite numbers"),
        "another name": (metric("losses", other=1.0), "its losses are not finite numbers of the names consistency, contrast, dice"),
        "nan": (metric("losses", dice=math.nan), "its losses are not finite numbers"),
        "inf": (metric("losses", contrast=-math.inf), "its losses are not finite numbers"),
        "a list": (metric("losses", dice=[1.0, 2.0]), "its losses are not finite numbers")},
    "n: a whole number from 1 to 1e9, the same in every round": {
        "missing record": (without("scalars"), READ),
        "missing": (metric("scalars", n=None), READ),
        "zero with weights": (metric("scalars", n=0), "its prototypes|it has 0 training images"),
        "negative": (metric("scalars", n=-5), "it has -5 training images"),
        "too many": (metric("scalars", n=10**12), "it has 1000000000000 training images"),
        "a fraction": (metric("scalars", n=3.5), "it has 3.5 training images"),
        "nan": (metric("scalars", n=math.nan), "it has nan training images"),
        "a list": (metric("scalars", n=[3]), r"it has \[3\] training images")},
    "seconds: a number from 0 to 1e9": {
        "missing": (metric("scalars", seconds=None), READ),
        "nan": (metric("scalars", seconds=math.nan), "its seconds are no number of seconds"),
        "negative": (metric("scalars", seconds=-1.0), "its seconds"), "inf": (metric("scalars", seconds=math.inf), "its seconds"),
        "a list": (metric("scalars", seconds=[1.0]), "its seconds")},
    "site: its name, one printable line of at most 80 letters, and perhaps a problem": {
        "missing record": (without("site"), "its answer does not say which site it is"),
        "numbers": (replaced("site", MetricRecord({"name": 1})), "does not say which site"),
        "no name": (replaced("site", ConfigRecord({})), "does not say which site"),
        "empty": (replaced("site", ConfigRecord({"name": ""})), "its name is no"),
        "a number": (replaced("site", ConfigRecord({"name": 7})), "does not say which site"),
        "terminal codes": (replaced("site", ConfigRecord({"name": "b\x1b[2J"})), "its name is no printable text"),
        "two lines": (replaced("site", ConfigRecord({"name": "b\nsite a failed"})), "its name is no printable text"),
        "long": (replaced("site", ConfigRecord({"name": "b" * 5000})), "its name is no"),
        "hidden letters": (replaced("site", ConfigRecord({"name": "b\u202e"})), "its name is no printable text"),
        "another's": (replaced("site", ConfigRecord({"name": "a"})), "two nodes answer as one site"),
        "a problem of many lines": (replaced("site", ConfigRecord({"name": "b", "problem": "x\n\x1b[2J" * 999})), "x .\\[2Jx"),
        "a problem that is no text": (replaced("site", ConfigRecord({"name": "b", "problem": 5})), "5; it is left out")},
    "records: all of these": {
        "none": (lambda content: [content.pop(name) for name in list(content)], "does not say which site")}}
SCORES = {
    "images, misses: whole numbers; dice: 0 to 1; hd95, assd: 0 to 1e9; of images alone": {
        "missing record": (without("val"), READ),
        "arrays": (replaced("val", ArrayRecord({"dice": torch.ones(1)})), "do not count its images"),
        "empty": (replaced("val", MetricRecord({})), "do not count its images"),
        "no cases": (metric("val", images=None), "do not count its images"),
        "negative cases": (metric("val", images=-1), "do not count its images"),
        "half a case": (metric("val", images=0.5), "do not count its images"),
        "a list of cases": (metric("val", images=[1]), "do not count its images"),
        "scores of no case": (metric("val", images=0), "has scores of no image"),
        "no dice": (metric("val", dice=None), "lack Dice or misses"),
        "dice of 2": (metric("val", dice=2.0), "its dice is not a number from 0 to 1"),
        "dice of 1e30": (metric("val", dice=1e30), "its dice is not"),
        "negative dice": (metric("val", dice=-0.1), "its dice is not"),
        "nan": (metric("val", dice=math.nan), "its dice is not"), "inf": (metric("val", dice=math.inf), "its dice is not"),
        "a list": (metric("val", dice=[0.5]), "its dice is not"),
        "distance nan": (metric("val", hd95=math.nan), "its hd95 is not"),
        "distance below 0": (metric("val", assd=-1.0), "its assd is not"),
        "more misses than cases": (metric("val", misses=99), "lack Dice or misses"),
        "half a miss": (metric("val", misses=0.5), "lack Dice or misses"),
        "a list of misses": (metric("val", misses=[1, 2]), "lack Dice or misses"),
        "another's name": (replaced("site", ConfigRecord({"name": "a"})), "has answered as b before and now as a"),
        "no name": (without("site"), "does not say which site it is")}}
HARMLESS = [  # more than was asked for, which nobody reads: (kind of the answer, attack)
    ("train", metric("scalars", other=1)), ("train", replaced("more", ArrayRecord({"x": torch.zeros(9)}))),
    ("train", replaced("val", MetricRecord({"dice": 1.0, "misses": 0, "images": 1}))),
    ("train", replaced("site", ConfigRecord({"name": "b", "admin": True}))),
    ("evaluate", metric("val", accuracy=1.0)), ("evaluate", metric("val", **{"disc/dice": 1.0})),
    ("evaluate", replaced("train", MetricRecord({"dice": 1.0})))]


def table(kinds):
    return [pytest.param(attack, words, id=f"{field.split(':')[0]}-{how}")
            for field, attacks in kinds.items() for how, (attack, words) in attacks.items()]


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A data folder with the sites a, b and c, whose `answers` {(node, kind): content} of an honest run are
    replayed in the tests, and the state of a run of a and c alone."""
    folder = tmp_path_factory.mktemp("honest")
    data = write_nuclei(folder / "data", ("a", "b", "c"))
    nodes = Hospitals(folder / "three", data, "abc", SKIP)
    state, _ = nodes.train()
    answers = {(asked.metadata.dst_node_id, asked.metadata.message_type): reply.content for asked, reply in nodes.sent}
    return SimpleNamespace(data=data, answers=answers, state=state, alone=Hospitals(folder, data, "ac", SKIP).train()[0])


def attacked(folder, honest, attack, kind, *overrides):
    """Run sites a, b, c for a round; b's answers of one kind are spoilt. Returns the last state and the result."""
    nodes = Hospitals(folder, honest.data, "abc", (*SKIP, *overrides))
    nodes.client = lambda message, context: Message(copy.deepcopy(honest.answers.get(
        (message.metadata.dst_node_id, message.metadata.message_type)) or RecordDict({"site": ConfigRecord(
            {"name": context.node_config["site"]})})), reply_to=message)  # to a query nothing but the name

    def spoil(message, reply):
        if message.metadata.dst_node_id == 2 and message.metadata.message_type == kind:
            attack(reply.content)
        return reply
    nodes.spoil = spoil
    return nodes.train()


@pytest.mark.parametrize("attack, words", table(TRAIN))
def test_a_spoilt_update_is_named_and_left_out(tmp_path, honest, capsys, attack, words):
    """The round is that of the others, to the bit."""
    state, _ = attacked(tmp_path, honest, attack, "train")
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if " failed in round 1: " in line and "its node is gone" not in line)
    assert re.search(f"^site (b|of node 2) failed in round 1: .*{words}", line) and "site a" not in line
    assert len(line) < 600 and line.isprintable()
    assert_same(dict(state["weights"]), dict(honest.alone["weights"]))
    assert_same(state["prototypes"], honest.alone["prototypes"])


@pytest.mark.parametrize("attack, words", table(SCORES))
def test_spoilt_scores_are_named_and_left_out(tmp_path, honest, capsys, attack, words):
    """The round is chosen by the others, and all are scored at the end."""
    state, result = attacked(tmp_path, honest, attack, "evaluate")
    said = capsys.readouterr().err
    assert re.search(f"site (b|of node 2) sent no scores: .*{words}", said)
    assert [row[2] for row in state["history"] if row[1] == "val"] == ["a", "c"]
    assert set(result["best"]["test"]["sites"]) >= {"a", "c"}


@pytest.mark.parametrize("kind, attack", HARMLESS)
def test_what_nobody_asked_for_changes_nothing(tmp_path, honest, capsys, kind, attack):
    state, _ = attacked(tmp_path, honest, attack, kind)
    assert "site b" not in capsys.readouterr().err
    for part in ("weights", "prototypes", "best"):
        assert_same(state[part], honest.state[part])
    assert [row[:5] for row in state["history"]] == [row[:5] for row in honest.state["history"]]


@pytest.mark.parametrize("attack, words", [case for case in table(SCORES) if case.id.split("-")[1] in (
    "missing record", "arrays", "empty", "negative cases")])
def test_spoilt_scores_beside_an_update(tmp_path, capsys, attack, words):
    """Scores travel with the update of the next round, which counts without them."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a", "b", "c")), "abc", ("rounds=3", *SKIP[1:]))

    def spoil(message, reply):
        if (message.metadata.dst_node_id, message.metadata.message_type, message.content["round"].get("t")) == (2, "train", 2):
            attack(reply.content)
        return reply
    nodes.spoil = spoil
    state, _ = nodes.train()
    said = capsys.readouterr().err
    assert [(row[0], row[2]) for row in state["history"] if row[1] == "val"] == [
        (r, s) for r in (1, 2, 3) for s in "abc" if (r, s) != (1, "b")]
    assert re.search(f"site b sent no scores: .*{words}", said)
    assert said.count("site b") == 1


def test_a_class_that_a_site_lacks_is_no_fault(tmp_path, honest, capsys):
    state, _ = attacked(tmp_path, honest, arrays("prototypes", lambda t: {k: v for k, v in t.items() if k != "encoder/1"}),
                        "train")
    assert capsys.readouterr().err == ""
    assert [row[2] for row in state["history"] if row[1] == "train"] == ["a", "b", "c"]


def test_weights_travel_as_bytes():
    """Of any type and shape, in whatever order the two ends have them, back to the bit."""
    w = {"b": torch.randn(3, 2).half(), "a": torch.tensor([True]), "n": torch.tensor(7), "e": torch.zeros(0, 3),
         "c": torch.randn(2, 3, 4).transpose(0, 2), "x": torch.tensor([float("nan"), -0.0])}
    record = messages.pack_weights(w)
    like = {name: torch.empty_like(w[name]) for name in reversed(w)}
    found = messages.unpack_weights(record, like)
    assert found.keys() == w.keys() and len(record) == 1
    for name, value in w.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].numpy().tobytes() == value.numpy().tobytes()
    messages.check_weight_bytes(record, w)
    with pytest.raises(messages.Misfit, match="are not the 121 bytes of the network's"):
        messages.check_weight_bytes(record, w | {"n": torch.tensor(7, dtype=torch.int32)})


# ---- What is possible, and still too much ----

def test_an_update_that_is_too_long_is_refused(tmp_path, honest, capsys):
    """Weights times 1000 lie within the range of a number; update_norm compares them with the others."""
    attack = arrays("weights", floats(lambda v: v * 1000))
    state, _ = attacked(tmp_path / "on", honest, attack, "train", "update_norm=5")
    said = capsys.readouterr().err
    assert re.search(r"site b failed in round 1: its update is \d+\.\d times as long as the median, update_norm: 5", said)
    assert_same(dict(state["weights"]), dict(honest.alone["weights"]))
    attacked(tmp_path / "default", honest, attack, "train")
    assert "site b failed in round 1: its update is" in capsys.readouterr().err
    attacked(tmp_path / "off", honest, attack, "train", "update_norm=none")
    assert "site b failed" not in capsys.readouterr().err


def test_update_norm_by_hand():
    """|w_m - w| against X times the lower median of the round."""
    w = {"a": torch.zeros(4), "b": torch.ones(1)}

    def update(site, length):
        return federated.Update(site, 1, {"a": torch.tensor([length, 0, 0, 0]), "b": torch.ones(1)}, {}, {}, {}, 0.0)
    updates = [update(site, length) for site, length in (("p", 1.0), ("q", 2.0), ("r", 6.1))]
    assert list(fit.too_far(updates, w, 3)) == ["r"] and "3.0 times" in fit.too_far(updates, w, 3)["r"]
    assert fit.too_far(updates, w, 3.1) == {}
    assert fit.too_far(updates[1:], w, 3) == {}  # of two nobody knows which one is right
    long = [u._replace(prototypes={"encoder": {1: torch.full((2,), 1.0 + 30 * (u.site == "p"))}}) for u in updates]
    assert list(fit.too_far(long, w, 10)) == ["p"] and "prototype of class 1 on the encoder" in fit.too_far(long, w, 10)["p"]
    rare = {"p": {2: torch.full((2,), 9999.0)}}  # a class that the two other sites lack
    rare = [u._replace(prototypes={"encoder": {1: torch.ones(2)} | rare.get(u.site, {})}) for u in updates]
    assert list(fit.too_far(rare, w, 10)) == ["p"] and "longest prototype on the encoder" in fit.too_far(rare, w, 10)["p"]
    assert fit.too_far([update("p", 0.0), update("q", 0.0), update("r", 1.0)], w, 3) == {}  # nothing to compare with


@pytest.mark.parametrize("n, most, shares", [
    ((1, 1, 8), 0.5, (0.25, 0.25, 0.5)), ((1, 3, 8), 0.5, (0.125, 0.375, 0.5)), ((10, 10, 1, 1), 0.4, (0.4, 0.4, 0.1, 0.1)),
    ((1, 2, 7), 0.4, (0.2, 0.4, 0.4)), ((5, 1), 0.5, (0.5, 0.5)), ((5, 1, 1), 0.1, (1 / 3, 1 / 3, 1 / 3)),
    ((2, 3), 1.0, (0.4, 0.6)), ((9, 1), 0.95, (0.9, 0.1))])
def test_max_share_by_hand(n, most, shares):
    """No site has more than max_share; what it loses goes to the others in proportion."""
    updates = [federated.Update(str(i), m, {"w": torch.tensor(float(i == 0))}, {}, {}, {}, 0.0) for i, m in enumerate(n)]
    bounded = fit.bounded(updates, most) if most < 1 else updates
    total = sum(update.n for update in bounded)
    assert [update.n / total for update in bounded] == pytest.approx(shares)
    assert federated.average_weights(bounded)["w"].item() == pytest.approx(shares[0])


def test_a_count_is_stated_once_and_kept(tmp_path, capsys):
    data, told = write_nuclei(tmp_path / "data", ("a", "b", "c")), []
    nodes = Hospitals(tmp_path, data, "abc", ("rounds=2", "on_site_failure=skip"))

    def spoil(message, reply):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2:
            told.append(1)
            reply.content["scalars"]["n"] = 3 if len(told) == 1 else 3000
        return reply
    nodes.spoil = spoil
    nodes.train()
    assert "site b failed in round 2: it has 3000 training images, and stated 3 before" in capsys.readouterr().err


# ---- Eight rounds with the defaults ----

EIGHT = {
    "an update of 1e6 x": (arrays("weights", floats(lambda v: v * 1e6)), "its update is"),
    "weights of 9e7": (arrays("weights", floats(lambda v: v * 0 + 9e7)), "its update is"),
    "prototypes of 9999": (arrays("prototypes", each(lambda v: v * 0 + 9999)), "its prototype of class")}


@pytest.fixture(scope="module")
def eight_alone(tmp_path_factory):
    """A data folder with the sites a, b and c, and what a and c reach alone in eight rounds."""
    folder = tmp_path_factory.mktemp("eight")
    data = write_nuclei(folder / "data", ("a", "b", "c"))
    return data, Hospitals(folder, data, "ac", ("rounds=8", *SKIP[1:])).train()[0]


@pytest.mark.parametrize("attack, words", EIGHT.values(), ids=EIGHT)
def test_eight_rounds_of_an_attack_change_nothing(tmp_path, eight_alone, capsys, attack, words):
    """The attacker is named in every round, and the honest end as they do alone, to the bit."""
    data, alone = eight_alone
    nodes = Hospitals(tmp_path, data, "abc", ("rounds=8", *SKIP[1:]))
    nodes.spoil = lambda message, reply: (attack(reply.content) if message.metadata.dst_node_id == 2
                                          and message.metadata.message_type == "train" else None, reply)[1]
    state, _ = nodes.train()
    said = capsys.readouterr().err
    assert all(f"site b failed in round {t}: {words}" in said for t in range(1, 9)) and "site a" not in said
    assert_same(dict(state["weights"]), dict(alone["weights"]))
    assert_same(state["prototypes"], alone["prototypes"])


def test_a_site_that_hardly_moves_throws_nobody_out(tmp_path, capsys):
    """Of two, b moves one weight by 1e-6 in each of eight rounds: nobody can tell who is wrong, both count."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a", "b")), "ab", ("rounds=8", *SKIP[1:]))

    def spoil(message, reply):
        if message.metadata.dst_node_id == 2 and message.metadata.message_type == "train":
            came = message.content["weights"].to_torch_state_dict()["bytes"].clone()
            came.view(torch.float32)[0] += 1e-6
            reply.content["weights"] = ArrayRecord({"bytes": came})
        return reply
    nodes.spoil = spoil
    state, _ = nodes.train()
    assert "failed" not in capsys.readouterr().err
    assert [row[2] for row in state["history"] if row[1] == "train"] == ["a", "b"] * 8


def test_the_best_round_is_that_of_the_median_site(tmp_path):
    """b says 1 after the first round and 0 ever after; by the mean round 1 would be the best."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a", "b", "c")), "abc", ("rounds=8", *SKIP[1:]))

    def spoil(message, reply):
        if "val" in reply.content:
            t = message.content["round"]["t"] - (message.metadata.message_type == "train")
            dice = {1: 0.1 + 0.05 * t, 2: float(t == 1), 3: 0.11 + 0.05 * t}[message.metadata.dst_node_id]
            metric("val", dice=dice)(reply.content)
        return reply
    nodes.spoil = spoil
    state, result = nodes.train()
    assert state["best"] == {"round": 8, "dice": pytest.approx(0.5)} and result["best"]["round"] == 8


# ---- The same over a real server ----

# what a hostile hospital runs: Python reads it at the start of every process of its node, and it changes each answer
HOSTILE = '''
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp

honest = ClientApp.__call__


def change(content, name, how):
    content[name] = ArrayRecord({key: how(value) for key, value in content[name].to_torch_state_dict().items()})


ATTACKS = {
    1: lambda content: change(content, "prototypes", torch.Tensor.double),
    2: lambda content: change(content, "prototypes", lambda v: v.to(torch.complex64)),
    3: lambda content: change(content, "weights", lambda v: (v.view(torch.float32) * 0 + 1e30).view(torch.uint8)),
    4: lambda content: change(content, "weights", lambda v: (v.view(torch.float32) / 0).view(torch.uint8)),
    5: lambda content: content.__setitem__("site", ConfigRecord({"name": "a"}))}


def spoilt(app, message, context):
    reply = honest(app, message, context)
    if "weights" in reply.content:
        ATTACKS[message.content["round"]["t"]](reply.content)
    for record in reply.content.metric_records.values():
        if "dice" in record:
            record["dice"] = 2.0
    return reply


ClientApp.__call__ = spoilt
'''
SAID = ("round 1: its prototypes of the encoder are not vectors of 48 numbers",
        "round 2: its prototypes of the encoder are not vectors of 48 numbers",
        r"round 3: its weights reach 1\.0e\+30, more than 1e\+08",
        "round 4: its weights are not finite",
        "round 5: its node has answered as c before and now as a")


def test_the_five_worst_attacks_over_a_real_server(tmp_path):
    """The run is that of the honest site alone, to the bit; all that the other sends is named and left out."""
    data = write_nuclei(tmp_path / "data", ("a", "c"))
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "sitecustomize.py").write_text(HOSTILE)
    settings = ("rounds=5", "eval_every=5", "on_site_failure=skip")
    with contextlib.closing(Federation(tmp_path)) as federation:
        federation.start_link()
        federation.start_node("a", data / "a")
        federation.env["PYTHONPATH"] = str(tmp_path / "hostile")
        federation.start_node("c", data / "c")
        del federation.env["PYTHONPATH"]
        federation.start_run(*settings, timeout=60)
        wait_for(lambda: "written to" in federation.log("run"), 240)
        said = federation.log("run")
    for t, words in enumerate(SAID, 1):
        assert len(re.findall(rf"site (?:c|of node \d+) failed in {words}; it is left out", said)) == 1, words
        assert said.count(f" failed in round {t}: ") == 1
    assert len(re.findall("site c sent no scores: its dice is not a number from 0 to 1", said)) >= 2
    (data / "c").rename(tmp_path / "c elsewhere")
    state, result = in_process(tmp_path / "one", data, *settings)
    served = load_checkpoint(tmp_path / "server" / "last.pt")
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(json.loads((tmp_path / "server" / "result.json").read_text())) == without_facts(result)


# ---- What a site lets the server decide ----

@pytest.mark.parametrize("node, overrides, words", [
    ({}, ("splits=/etc/passwd",), "splits: is set by the server"),
    ({"allow": "task rounds splits"}, ("splits=x",), "splits: is set by the server"),  # never, whatever is allowed
    ({}, ("trust=true",), "trust: is set by the server"),
    ({}, ("method=evil.py:run",), "method: the server wants to run the code of 'evil.py:run'"),
    ({"method": "mine.py:f"}, ("method=evil.py:f",), "method: the server wants to run the code of 'evil.py:f'"),
    ({"allow": "task,rounds,lr"}, ("lr=0.1",), "is set by the server and this site does not allow it"),
    ({"max_image_size": 16}, (), "image_size: the server wants 32, this site's max_image_size is 16"),
    ({"max_batch_size": 1}, (), "batch_size: the server wants 2, this site's max_batch_size is 1"),
    ({"min_images": 4}, (), "min_images: this site has 3 training images, fewer than 4"),
    ({}, ("nonsense=1",), "nonsense: is set by the server"),
])
def test_a_site_decides_what_it_runs(tmp_path, capsys, node, overrides, words):
    data = write_nuclei(tmp_path / "data", ("a",))
    nodes = Hospitals(tmp_path, data, "a", overrides)
    nodes.nodes[1] |= node
    with pytest.raises(BadInput, match=re.escape(words)):
        flower_app.train_site({}, nodes.context(1))
    assert not (tmp_path / "a" / "kept.pt").exists()


def test_readmes_allow_binds_what_the_server_overrides():
    """config.yaml's own keys are not overrides; case_pattern, which reads names of files, is never the server's."""
    allow = re.search(r"`allow='([^']*)'`", (HERE / "flower" / "README.md").read_text())[1]

    def check(overrides, node):
        check_server(SimpleNamespace(node_config=node, run_config={"config": "config.yaml", "overrides": overrides}))
    check("rounds=3 lr=0.1 batch_size=2 out=x init=y", {"allow": allow})
    for overrides, node in (("rounds=3 optimizer=adam", {"allow": allow}), ("case_pattern=(x)", {"allow": "case_pattern"}),
                            ("case_pattern=(x)", {})):
        with pytest.raises(BadInput, match="is set by the server and this site does not allow it"):
            check(overrides, node)


def test_a_class_has_a_bounded_number_of_prototypes():
    fields = fit.Fields({}, {"decoder": (2, True)}, 2, set())

    def found(rows):
        update = federated.Update("a", 10**6, {}, {"decoder": {1: torch.ones(rows, 2)}}, {}, {}, 0.0)
        return fit.check_prototypes(update, fields)
    assert found(fit.MOST_ROWS) is None and "are not vectors of 2 numbers" in found(fit.MOST_ROWS + 1)


def test_a_site_allows_training_by_default(tmp_path):
    """All keys of config.yaml and of the methods' own; and a site has its own device and splits."""
    data = write_nuclei(tmp_path / "data", ("a",))
    nodes = Hospitals(tmp_path, data, "a", ("method=fedprox", "fedprox_mu=0.5", "norm=group", "test_stats=none", "width=8"))
    nodes.nodes[1] |= {"device": "cpu", "case_pattern": r"(\d)\.png"}
    config, site, _, _ = flower_app.own_site(nodes.context(1))
    assert (config.fedprox_mu, config.device, config.case_pattern) == (0.5, "cpu", r"(\d)\.png")
    assert {sample.case for sample in site.train} <= set("01234")


@pytest.mark.parametrize("name", ["kept.pt", "decoded.pt"])
@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: b"x" * 999,
                                    lambda content: content[:300] + b"\0" + content[301:]])
def test_a_damaged_file_of_a_site_is_replaced(tmp_path, capsys, damage, name):
    """The site warns, goes on with a fresh optimizer or decodes again, and writes the file anew."""
    data, damaged = write_nuclei(tmp_path / "data", ("a", "b")), []
    nodes = Hospitals(tmp_path, data, "ab", ("rounds=3", "optimizer=adam", "lr=1e-3"))

    def spoil(message, reply):
        file = tmp_path / "a" / name
        if message.metadata.dst_node_id == 1 and not damaged:
            damaged.append(file.write_bytes(damage(file.read_bytes())))
        return reply
    nodes.spoil = spoil
    state, _ = nodes.train()
    said = capsys.readouterr().err
    assert state["round"] == 3 and name in said and "goes on without it and writes it anew" in said
    assert set(load_whole(tmp_path / "a" / "kept.pt")) == {2, 3, "answered"}


# ---- Keys ----

def make(monkeypatch, *arguments):
    """Run make_certificates here; return what it ends with, None if it goes well."""
    monkeypatch.setattr(sys, "argv", ["make_certificates", *map(str, arguments)])
    try:
        make_certificates.main()
    except SystemExit as end:
        return str(end.code)


def test_keys_are_for_their_owner_alone(tmp_path, monkeypatch):
    assert make(monkeypatch, tmp_path / "keys", "east", "north.2") is None
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert files == dict.fromkeys(("ca.crt", "server.pem", "server.key", "east", "east.pub", "north.2", "north.2.pub"), 0o600)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("node", ["../x", "/tmp/x", "a/b", "..", ".", "", "-x", "a\nb", "server.key", "ca.crt", "CA.CRT",
                                  "server.pem", "b.pub", "x" * 99, "a\0b"])
def test_names_that_are_no_nodes_are_refused(tmp_path, monkeypatch, node):
    """Names that leave the folder or mean one of its own files; nothing is written."""
    found = make(monkeypatch, tmp_path / "keys", "b", node)
    assert found and found.startswith("error: ") and not (tmp_path / "keys").exists()


@pytest.mark.parametrize("name", ["ca.crt", "server.pem", "server.key", "east", "east.pub"])
@pytest.mark.parametrize("link", [False, True])
def test_nothing_is_written_over(tmp_path, monkeypatch, name, link):
    """Neither a file that is there nor what a link leads to, even one that leads nowhere."""
    (tmp_path / "keys").mkdir()
    target = tmp_path / "precious"
    if link:
        (tmp_path / "keys" / name).symlink_to(target)
    else:
        (tmp_path / "keys" / name).write_text("mine")
    found = make(monkeypatch, tmp_path / "keys", "east")
    assert found == f"error: {tmp_path / 'keys' / name}: is there already, choose another folder"
    assert not target.exists() and [path.name for path in (tmp_path / "keys").iterdir()] == [name]
    with pytest.raises(SystemExit, match="is there already"):
        make_certificates.write(tmp_path / "keys" / name, b"x")
    assert not target.exists()


# ---- The dry run that tells the fields ----

@pytest.mark.parametrize("method", ["fedavg", "fedprox", "harmofl", "fpl", "fedplvm", "feduv", "input_norm", "released",
                                    "fedbcs"])
def test_expected_fields_are_those_of_an_update(tmp_path, method):
    """Names, shapes, types and terms of a real site's update; the network and the random numbers stay as they are."""
    from datasets import load_sites
    from methods.find import find_method
    from unet import build_model
    config = tiny_config(write_nuclei(tmp_path / "d", ("a",)), "unused", f"method={method}")
    rules, site = find_method(config), load_sites(config)[0]
    model = build_model(config, rules)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fields = fit.expected_fields(model, config, rules)
    assert_same(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), random)
    w, G = dict(model.state_dict()), {}
    for t in (1, 2):
        update = federated.local_update(model, site, w, G, None, t, config, rules)
        assert fit.check_update(update, fields) is None and update.losses.keys() <= fields.losses
        assert update.prototypes.keys() == fields.prototypes.keys()
        w, G = w | update.weights, rules.aggregate([update.prototypes])


def test_settings_of_protection_are_checked():
    start = {"task": "nuclei", "data": "d", "out": "o"}
    for wrong in ({"max_share": 0}, {"max_share": 1.5}, {"update_norm": 0.5}, {"update_norm": "x"}):
        with pytest.raises(BadInput, match=f"{next(iter(wrong))}: "):
            load_config(start | wrong)
