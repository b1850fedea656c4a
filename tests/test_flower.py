"""Tests of the federation on Flower: a real SuperLink and SuperNodes on loopback, and what travels.

They need flower/requirements.txt. Run them with `pytest -m flower`.
"""

import contextlib
import copy
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import federated
import train
from config import BadInput, load_config
from federated import Diverged
from flower.fit import SiteFailed
from rounds.reading import load_checkpoint
from settings import from_file
from test_fedbcs import HERE, first_state, one_round, write_nuclei
from tests.helpers import assert_same, write_prostate
from tests.test_classes import write_images
from tests.test_forks import worked_example

flwr_app = pytest.importorskip("flwr.app")
ArrayRecord, Error, Message, RecordDict = (
    flwr_app.ArrayRecord, flwr_app.Error, flwr_app.Message, flwr_app.RecordDict)
pytestmark = pytest.mark.flower
identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
from flower import app as flower_app
from flower import messages as flower_messages
from flower import site_rules
from flower.guards import GUARDS

identity.run_id = identity.task_id = identity.node_id = 1
PROGRAMS = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
         "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}
SETTINGS = ("task=nuclei", "image_size=32", "width=2", "batch_size=2", "device=cpu", "optimizer=adam",
            "lr=1e-3", "test_stats=site")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Federation:
    """One SuperLink and its SuperNodes on loopback, without TLS."""

    def __init__(self, folder):
        self.folder, self.port, self.nodes, self.others = folder, free_port(), {}, []
        self.env = environment(folder / "home")
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink.loop]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n')

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen([*map(str, command)], env=self.env, stdout=log, stderr=log,
                                    start_new_session=True, cwd=HERE)

    def start_link(self):
        self.link = self.start("link", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port",
                               self.port, "--database", self.folder / "link.db")
        self.others.append(self.link)
        wait_for(lambda: is_open(self.port), 60)

    def start_node(self, site, data, name=None, secure=("--insecure",)):
        name = name or site
        self.nodes[name] = self.start(
            name, "flower-supernode", *secure, "--superlink", f"127.0.0.1:{self.port}", "--host",
            "127.0.0.1", "--port", free_port(), "--node-config",
            f"site='{site}' data='{data}' out='{self.folder / name}'")

    def start_run(self, *overrides, timeout, sites=2):
        words = shlex.join((*SETTINGS, *overrides, f"out={self.folder / 'server'}"))
        self.others.append(self.start("run", "flwr", "run", ".", "loop", "--stream", "--run-config",
                                      f'overrides="{words}" timeout={timeout} sites={sites}'))

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def kill(self, process):
        """Kill a SuperLink or SuperNode and all that it started, as a power cut does."""
        family = {process.pid}
        while True:  # a task's process has a session of its own, so the group is not all
            found = family | {pid for pid, parent in parents() if parent in family}
            if found == family:
                break
            family = found
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20)

    def close(self):
        for process in [*self.nodes.values(), *self.others]:
            self.kill(process)


def environment(home):
    """Return what every process of Flower gets: the virtual environment's programs, nothing sent out."""
    return os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}


def parents():
    """Return [(process, its parent)] of this machine."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    return [tuple(map(int, line.split())) for line in lines.stdout.splitlines()]


def is_open(port):
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.2)


@pytest.fixture
def federation(tmp_path):
    one = Federation(tmp_path)
    yield one
    one.close()


def in_process(folder, data, *overrides):
    """The same run in one process, without what a federation alone has; returns its state and result."""
    config = load_config({"task": "nuclei", "data": str(data), "out": str(folder)},
                         [text for text in (*SETTINGS, *overrides) if text.partition("=")[0] not in GUARDS])
    train.train(config)
    return load_checkpoint(folder / "last.pt"), json.loads((folder / "result.json").read_text())


def without_facts(result):
    return {key: result[key] for key in ("best", "last", "units", "definitions")}


def three_free_ports():
    """Return a port that is free and followed by two free ones."""
    while True:
        port = free_port()
        if port < 65000 and not is_open(port + 1) and not is_open(port + 2):
            return port


def test_try_it_equals_one_process(federation, tmp_path):
    """flower/try_it.sh, plain and then TLS, bit for bit; nodes without a registered key never join; each keeps
    its own to itself; nothing is left running."""
    data, home = write_nuclei(tmp_path / "data", ("east", "north")), tmp_path / "try it"
    write_nuclei(tmp_path / "more", ("south",))
    federation.port = three_free_ports()
    federation.env |= {"DATA": str(data), "PORT": str(federation.port), "LIMIT": "170", "TIMEOUT": "100",
                       "OVERRIDES": f"{' '.join(SETTINGS)} rounds=2 eval_every=2 local_epochs=2"}
    run = federation.start("run", "bash", HERE / "flower" / "try_it.sh", home)
    federation.others.append(run)
    wait_for((home / "keys" / "ca.crt").exists, 200)  # the plain run comes first
    wait_for(lambda: is_open(federation.port), 60)
    subprocess.run([sys.executable, HERE / "flower" / "make_certificates.py", tmp_path / "other", "a"], check=True)
    tls = ["--root-certificates", home / "keys" / "ca.crt"]
    for name, site, folder, key in (  # one with no key, one that claims to be east with a key of its own
            ("keyless", "south", tmp_path / "more" / "south", []),
            ("foreign", "east", data / "east", ["--auth-supernode-private-key", tmp_path / "other" / "a"])):
        federation.start_node(site, folder, name, (*tls, *key))
    assert run.wait(300) == 0, federation.log("run")
    assert not any(is_open(federation.port + i) for i in range(3))
    assert subprocess.run(["bash", HERE / "flower" / "try_it.sh", home], capture_output=True, check=False).returncode == 2
    state, result = in_process(tmp_path / "one", data, "rounds=2", "eval_every=2", "local_epochs=2")
    assert_same(dict(load_checkpoint(home / "plain" / "last.pt")["weights"]), dict(state["weights"]))
    served = load_checkpoint(home / "tls" / "last.pt")
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(json.loads((home / "tls" / "result.json").read_text())) == without_facts(result)
    assert {path.name for path in (home / "tls").iterdir()} == {
        "best.pt", "last.pt", "config.yaml", "metrics.csv", "result.json"}
    for site in ("east", "north"):
        assert {path.name for path in (home / f"tls_{site}").iterdir()} == {
            "best.pt", "last.pt", "cases.csv", "config.yaml", "decoded.pt", "kept.pt", "predictions.png", "result.json",
            "splits.json"}
        kept = torch.load(home / f"tls_{site}" / "kept.pt", weights_only=True)
        assert_same(kept[2], state["kept"][site])
    for name in ("keyless", "foreign"):
        assert "Failed to initialize the connection" in federation.log(name), federation.log(name)
        assert federation.nodes[name].poll() not in (None, 0)
        assert not (tmp_path / name).exists()


class Hospitals:
    """A Grid whose nodes, {number: node-config}, are in this process.

    spoil(message, reply) -> reply or None is done to every answer; `sent` keeps all that travels.
    """

    def __init__(self, folder, data, sites, overrides=(), sites_wanted=None, timeout=1):
        self.client, self.spoil, self.sent, self.folder = flower_app.client, lambda _, r: r, [], folder
        self.run = {"config": "config.yaml", "sites": sites_wanted or len(sites), "timeout": timeout,
                    "overrides": shlex.join((*SETTINGS, *overrides, f"out={folder / 'server'}"))}
        self.nodes, self.numbers, self.ids = {}, itertools.count(1), itertools.count()
        for site in sites:
            self.join(site, data / site)

    def join(self, site, data):
        self.nodes[next(self.numbers)] = {"site": site, "data": str(data),
                                          "out": str(self.folder / site)}

    def context(self, node):
        return SimpleNamespace(run_config=self.run, node_config=self.nodes[node])

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, timeout=None):
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = str(next(self.ids))
            assert node in self.nodes
            identity.node_id = node  # as the process that Flower starts for a task
            reply = self.spoil(message, self.client(copy.deepcopy(message), self.context(node)))
            if reply is not None:
                self.sent.append((message, reply))
                yield copy.deepcopy(reply)

    def train(self):
        """Run the server; return its last checkpoint and its result."""
        flower_app.run_server(self, SimpleNamespace(run_config=self.run))
        return (load_checkpoint(self.folder / "server" / "last.pt"),
                json.loads((self.folder / "server" / "result.json").read_text()))


METHOD_SETTINGS = {"released": (), "fedprox": (), "harmofl": (), "fpl": (), "fedplvm": (), "feduv": (),
                   "input_norm": ("hold_out=b",), "fedavg": (), "fedbcs": ("fsr=adaptive", "weights=equal"),
                   "fedbcs hold_out": ("hold_out=b", "eval_every=2"), "fedbcs case": ("test_stats=case",),
                   "fedbcs classes": ("task=images", "classes=3", "class_names=[disc,cup]"),
                   "fedbcs tiles": ("tiles=true", "test_stats=case"),
                   "fedbcs early": ("lr=0.05",)}  # whose best round is the first


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_every_method_equals_one_process(tmp_path, method, capsys):
    """Bit for bit, though the nodes are asked in another order than that of their names."""
    size = {"size": 40} if "tiles" in method else {}
    data = (write_images if "classes" in method else write_nuclei)(tmp_path / "data", ("a", "b", "c"), **size)
    overrides = ("rounds=2", f"method={method.split()[0]}", *METHOD_SETTINGS[method])
    state, result = in_process(tmp_path / "one", data, *overrides)
    capsys.readouterr()
    served, said = Hospitals(tmp_path, data, "cab", overrides).train()
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.split()[:3] == ["validation", "Dice", "round"]
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(said) == without_facts(result)
    assert [row[:4] for row in served["history"]] == [row[:4] for row in state["history"]]
    for kind in ("best", "last"):  # a site has a run of its own, for eval.py
        kept = load_checkpoint(tmp_path / "a" / f"{kind}.pt")
        assert_same(kept["weights"], load_checkpoint(tmp_path / "server" / f"{kind}.pt")["weights"])
        assert kept["round"] == result[kind]["round"]
        assert set(kept["statistics"]) == ({"a"} if method not in ("fedbcs case", "fedbcs tiles") else set())
    assert method != "fedbcs early" or result["best"]["round"] == 1


def test_a_method_of_ones_own_travels(tmp_path, monkeypatch):
    """It lies beside the program at a site, whatever the folder that its node was started in."""
    data, overrides = write_nuclei(tmp_path / "data", ("a", "b")), ("rounds=2", "method=mine.py:fedproto")
    (tmp_path / "mine.py").write_text(worked_example()[0])
    monkeypatch.setattr(from_file, "__file__", str(tmp_path / "settings" / "from_file.py"))
    state, result = in_process(tmp_path / "one", data, *overrides, "fsr=none", "prototype_weight=0")
    hospitals = Hospitals(tmp_path, data, "ab", (*overrides, "fsr=none", "prototype_weight=0"))
    with pytest.raises(SiteFailed, match="site a failed in round 1: BadInput"):
        hospitals.train()  # no site runs a file that its own node-config does not name
    shutil.rmtree(tmp_path / "server")
    for node in hospitals.nodes.values():
        node["method"] = "mine.py:fedproto"
    served, said = hospitals.train()
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert served["prototypes"] and without_facts(said) == without_facts(result)


def test_local_weights_stay_at_their_site_over_flower(tmp_path, monkeypatch):
    """FedPer: bit for bit as in one process, and no head is ever on the wire."""
    data, overrides = write_nuclei(tmp_path / "data", ("a", "b")), ("rounds=2", "method=mine.py:fedper")
    (tmp_path / "mine.py").write_text(worked_example("fedper")[0])
    monkeypatch.setattr(from_file, "__file__", str(tmp_path / "settings" / "from_file.py"))
    state, result = in_process(tmp_path / "one", data, *overrides, "prototype_weight=1")
    hospitals = Hospitals(tmp_path, data, "ab", (*overrides, "prototype_weight=1"))
    for node in hospitals.nodes.values():
        node["method"] = "mine.py:fedper"
    served, said = hospitals.train()
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(said) == without_facts(result)
    for _, reply in hospitals.sent:
        if "weights" in reply.content:
            assert not [name for name in reply.content["weights"] if name.startswith("head.")]
    for site in "ab":
        assert_same(dict(load_checkpoint(tmp_path / site / "last.pt")["local"][site]),
                    state["kept"][site]["local"])


@pytest.mark.parametrize("name", ["later", "affine", "moon", "logged"])
def test_worked_examples_are_the_same_between_hospitals(tmp_path, monkeypatch, name):
    """To the bit as in one process: prototypes that begin late, a norm's whole numbers, what a site keeps, a log."""
    code, command = worked_example(name)
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    overrides = ("rounds=3", "fsr=none", "prototype_weight=0", *command[4:])
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr(from_file, "__file__", str(tmp_path / "settings" / "from_file.py"))
    state, result = in_process(tmp_path / "one", data, *overrides)
    hospitals = Hospitals(tmp_path, data, "ab", overrides)
    for node in hospitals.nodes.values():
        node["method"] = f"mine.py:{name}"
    served, said = hospitals.train()
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(said) == without_facts(result)
    if name == "logged":
        one, other = (Path(run["config"]["out"], "log.csv").read_text() for run in (state, served))
        assert one == other and one.count("\n") == 3


def failing(how, node_of_b):
    """Return spoil(message, reply): site b fails from its second training on."""
    trained = []

    def spoil(message, reply):
        if message.metadata.dst_node_id == node_of_b and message.metadata.message_type == "train":
            trained.append(message)
        if len(trained) < 2 or message is not trained[-1]:
            return reply
        if how == "silent":
            return None
        if how == "crashed":
            reply = Message(Error(1, "the client app crashed"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # of the SuperLink, as when a node is lost
            return reply
        if how == "lacking":
            del reply.content["scalars"]
            return reply
        if how == "count":
            reply.content["scalars"]["n"] = torch.nan
            return reply
        name, wrong = {"nan": ("weights", torch.nan), "inf": ("prototypes", torch.inf)}.get(how, (how, 0))
        tensors = dict(reply.content[name].to_torch_state_dict())
        key = next(iter(tensors))
        numbers = tensors[key].view(torch.float32) if name == "weights" else tensors[key]
        tensors[key] = (numbers[..., :-1] if wrong == 0 else numbers * wrong).view(tensors[key].dtype)
        reply.content[name] = ArrayRecord(tensors)
        return reply
    return spoil


@pytest.mark.parametrize("how, words", [
    ("silent", "no answer within 1 s"), ("crashed", "the client app crashed"), ("nan", "not finite"),
    ("lacking", "its answer cannot be read: KeyError.'scalars'."), ("count", "it has nan training images"),
    ("inf", "not finite"), ("weights", "its weights are not the"), ("prototypes", "are not vectors")])
def test_a_site_that_fails_stops_the_run_or_sits_out(tmp_path, capsys, how, words):
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    for skip in (False, True):
        folder = tmp_path / str(skip)
        overrides = ("rounds=2", *(["on_site_failure=skip", "min_sites=2"] * skip))
        nodes = Hospitals(folder, data, "abc", overrides)
        nodes.spoil = failing(how, 2)
        if not skip:
            with pytest.raises(SiteFailed, match=f"site b failed in round 2: .*{words}"):
                nodes.train()
            assert load_checkpoint(folder / "server" / "last.pt")["round"] == 1
            continue
        capsys.readouterr()
        state, _ = nodes.train()
        said = capsys.readouterr().err
        assert re.search(f"site b failed in round 2: .*{words}.*; it is left out", said)
        trained = [(row[0], row[2]) for row in state["history"] if row[1] == "train"]
        assert trained == [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "c")]


def test_a_site_that_raises_is_named(tmp_path):
    """Its reason stays at the site; a server with too few nodes waits no longer than it says."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    nodes = Hospitals(tmp_path, data, "ab", ("rounds=1",))
    (data / "b" / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(SiteFailed, match="site b failed in round 1: BadInput: see the log of that site$"):
        nodes.train()
    shutil.rmtree(tmp_path / "server")
    nodes = Hospitals(tmp_path, data, "a", ("rounds=1",), sites_wanted=2)
    start = time.monotonic()
    with pytest.raises(SiteFailed, match="1 of 2 sites are there after 1 s: a"):
        nodes.train()
    assert time.monotonic() - start < 10
    shutil.rmtree(tmp_path / "server")
    nodes.join("a", data / "a")
    with pytest.raises(SiteFailed, match="site of node 2 failed in round 1: two nodes answer as one site, give each its own name: a"):
        nodes.train()


def test_a_killed_server_and_a_replaced_node(tmp_path, capsys):
    """The server dies after the training of round 2; b comes back as another node: the same run."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    settings = ("rounds=3", "on_site_failure=skip", "min_sites=1", "resume=true")
    state, result = in_process(tmp_path / "one", data, *settings)
    nodes, trained = Hospitals(tmp_path, data, "ab", settings), []

    def die(message, reply):
        trained.extend(["weights"] * ("weights" in reply.content))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return reply
    nodes.spoil = die
    with pytest.raises(KeyboardInterrupt):
        nodes.train()
    assert load_checkpoint(tmp_path / "server" / "last.pt")["round"] == 1
    nodes.join("b", data / "b")
    # the former node is lost and not yet missed; the new server never heard from it
    nodes.spoil = lambda message, reply: reply if message.metadata.dst_node_id != 2 else None
    served, said = nodes.train()
    assert_same(dict(served["weights"]), dict(state["weights"]))
    assert without_facts(said) == without_facts(result)
    out = capsys.readouterr()
    assert "resuming after round 1" in out.out and "site b" not in out.err
    assert "site of node 2 failed in round 2: no answer within 1 s; it is left out" in out.err


def test_sites_that_come_and_go(tmp_path, capsys):
    """With skip: a site that is gone is missed by name, one that joins is in the next round, and a
    node that is lost and not yet missed does not count beside the one that replaced it."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    nodes, asked = Hospitals(tmp_path, data, "ab", ("rounds=4", "on_site_failure=skip")), []

    def come_and_go(message, reply):
        asked.extend([message] * (message.metadata.message_type != "query"))  # of its name, a new node
        if len(asked) == 4 and 2 in nodes.nodes:  # both have trained in rounds 1 and 2, and scored round 1
            del nodes.nodes[2]
            nodes.join("c", data / "c")
        if len(asked) == 6:  # and a and c in round 3
            nodes.join("c", data / "c")
        return reply if len(asked) <= 6 or message.metadata.dst_node_id != 3 else None
    nodes.spoil = come_and_go
    state, result = nodes.train()
    assert [(row[0], row[2]) for row in state["history"] if row[1] == "val"] == [
        (1, "a"), (1, "b"), (2, "a"), (2, "c"), (3, "a"), (3, "c"), (4, "a"), (4, "c")]
    assert set(result["last"]["test"]["sites"]) == {"a", "c"}
    said = capsys.readouterr()
    assert [line.split()[4:-3] for line in said.out.splitlines() if "L_dice" in line] == [
        ["a", "b"], ["a", "c"]]
    for t in (3, 4):
        assert f"site b failed in round {t}: its node is gone; it is left out" in said.err
    assert said.err.count("site b sent no scores: its node is gone") == 2  # of the last round, and of the end
    assert "site c" not in said.err


def test_node_config_and_hold_out_are_checked(tmp_path, capsys):
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    nodes = Hospitals(tmp_path, data, "ab", ("rounds=1", "hold_out=east"))
    with pytest.raises(SiteFailed, match="hold_out: site east is not there, only a, b$"):
        nodes.train()
    skip = ("rounds=1", "hold_out=east", "on_site_failure=skip")  # it may come later
    Hospitals(tmp_path / "skip", data, "ab", skip).train()
    assert "hold_out: site east is not there, only a, b; it is left out" in capsys.readouterr().err
    for key in ("site", "data", "out"):
        context = nodes.context(1)
        context.node_config = {k: v for k, v in context.node_config.items() if k != key}
        with pytest.raises(BadInput, match=f"node-config: lacks {key}; give site, data and out"):
            flower_app.own_site(context)


def sent_bytes(records):
    """All that a reply holds, as bytes: names, numbers and arrays."""
    found = []
    for name, record in records.items():
        for key, value in record.items():
            found += [name.encode(), key.encode()]
            found.append(value.data if hasattr(value, "data") else repr(value).encode())
    return b"|".join(found)


def test_what_leaves_a_site(tmp_path):
    """Weights, prototypes, counts and scalars: no image, no mask, no name of a file or patient."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    for kind in ("images", "masks"):
        for number, file in enumerate(sorted((data / "a" / kind).iterdir())):
            file.rename(file.with_name(f"TCGA-PATIENT-{number}.png"))
    nodes = Hospitals(tmp_path, data, "ab", ("rounds=2",))
    nodes.train()
    _, site, _, model = flower_app.own_site(nodes.context(1))
    size, kinds = sum(v.numel() * v.element_size() for v in model.state_dict().values()), []
    for message, reply in nodes.sent:
        if message.metadata.dst_node_id != 1:
            continue
        content, kind = reply.content, message.metadata.message_type
        kinds.append(kind)
        later = {"val"} if kind == "train" and message.content["round"]["t"] > 1 else set()
        assert set(content) == {"site"} | later | {
            "train": {"scalars", "weights", "prototypes", "losses"}, "evaluate": {"val"},
            "evaluate.finish": {"best.val", "best.test", "last.val", "last.test"}}[kind]
        assert dict(content["site"]) == {"name": "a"}
        if kind == "train":
            assert {k: tuple(v.shape) for k, v in content["weights"].items()} == {"bytes": (size,)}
            c = content["prototypes"].to_torch_state_dict()
            assert {k: tuple(v.shape) for k, v in c.items()} == {
                f"{path}/{j}": (48,) for path in ("encoder", "decoder") for j in (0, 1)}
            assert set(content["scalars"]) == {"n", "seconds"}
            assert set(content["losses"]) == {"dice", "contrast", "consistency"}
        for part in content:
            if part == "val" or "." in part:
                assert set(content[part]) <= {"dice", "hd95", "assd", "misses", "images"}
        found = sent_bytes(content)
        print(f"{kind}: {len(sent_bytes(message.content))} bytes to a site, {len(found)} from it")
        for secret in (b"TCGA", b"PATIENT", b".png", str(data).encode()):
            assert secret not in found
        for sample in site.train + site.val + site.test:
            assert sample.images.numpy().tobytes()[:64] not in found
            assert sample.truth.tobytes()[200:264] not in found or not sample.truth[0, 6].any()
    assert kinds == ["train", "train", "evaluate", "evaluate.finish"]  # the weights go down once a round
    with pytest.raises(BadInput, match="server: exists already"):  # and is not overwritten
        nodes.train()
    assert (tmp_path / "a" / "splits.json").exists()
    assert {path.name for path in (tmp_path / "server").iterdir()} == {
        "best.pt", "last.pt", "config.yaml", "metrics.csv", "result.json"}


def test_what_the_server_is_told_of_a_failure(tmp_path, capsys):
    data = write_nuclei(tmp_path / "data", ("a",))
    (data / "a" / "images" / "1.png").write_bytes(b"no image")
    nodes = Hospitals(tmp_path, data, "a")
    reply = nodes.client(Message(RecordDict(), 1, "train"), nodes.context(1))
    assert {key: dict(value) for key, value in reply.content.items()} == {
        "site": {"name": "a", "problem": "BadInput: see the log of that site"}}
    said = capsys.readouterr().err  # the site's own log
    assert said.startswith("error: ") and "1.png" in said and said.count("\n") == 1
    assert "round 3" in flower_messages.describe_error(Diverged("the loss is nan at site a, round 3, step 1"))


def test_an_update_starts_from_the_optimizer_state_of_the_last_that_was_taken(tmp_path):
    """A server that resumes asks for a round again, one that took no update goes on from the one
    before, and one that starts anew begins at none: the same answers each time."""
    nodes = Hospitals(tmp_path, write_nuclei(tmp_path / "data", ("a",)), "a")
    model = flower_app.own_site(nodes.context(1))[3]
    content = {"weights": flower_messages.pack_weights(model.state_dict()), "prototypes": ArrayRecord()}

    def ask(t, last):
        asked = content | {"round": {"t": t, "score": False}, "turn": {"train": True, "last": last}}
        return flower_messages.unpack_weights(flower_app.train_site(asked, nodes.context(1))["weights"], model.state_dict())
    first, second, third = ask(1, 0), ask(2, 1), ask(3, 2)
    assert_same(third, ask(3, 2))
    assert_same(first, ask(1, 0))
    assert_same(second, ask(2, 1))
    assert_same(second, ask(2, 1))
    ask(3, 1)
    held = torch.load(tmp_path / "a" / "kept.pt", weights_only=True)
    assert set(held) - {"answered"} == {1, 3}  # round 2 was not taken
    assert not torch.equal(first["head.weight"], second["head.weight"])  # adam's state has moved on
    assert not torch.equal(second["head.weight"], third["head.weight"])


def test_an_update_that_was_not_taken_leaves_no_trace(tmp_path, monkeypatch):
    """skip: a site whose update was refused goes on from the optimizer state before it, as if its round had not been."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    settings, honest = ("rounds=3", "on_site_failure=skip"), federated.local_update

    def local_update(model, site, w, G, state, t, *rest, **more):
        update = honest(model, site, w, G, state, t, *rest, **more)
        if (site.name, t) == ("b", 2):
            update.weights["head.weight"][0] = torch.nan
        return update
    monkeypatch.setattr(flower_app, "local_update", local_update)
    served, _ = Hospitals(tmp_path, data, "ab", settings).train()
    one = load_config({"task": "nuclei", "data": str(data), "out": "unused"}, [*SETTINGS, "rounds=3"])
    model, sites, w = first_state(one)
    G, kept = {}, {}
    for t in (1, 2, 3):
        w, G, _ = one_round(model, sites[:1] if t == 2 else sites, w, G, kept, t, one)
    assert_same(dict(served["weights"]), dict(w))
    assert {site: kept["round"] for site, kept in served["kept"].items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("spoilt, words", [
    ({"dice": float("nan")}, "its dice is not a number from 0 to 1"), (None, "its answer cannot be read: KeyError('val')")])
def test_scores_that_cannot_be_averaged_are_named(tmp_path, capsys, spoilt, words):
    """skip: they count nowhere, and a round without any is not the best."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    nodes, told = Hospitals(tmp_path, data, "ab", ("rounds=3", "on_site_failure=skip")), []

    def spoil(message, reply):
        told.extend(["val"] * ("val" in reply.content))
        if "val" in reply.content and (message.metadata.dst_node_id == 2 or len(told) in (3, 4)):
            val = reply.content.pop("val")
            if spoilt:
                reply.content["val"] = flwr_app.MetricRecord(dict(val) | spoilt)
        return reply
    nodes.spoil = spoil
    state, result = nodes.train()
    said = capsys.readouterr().err
    assert said.count(f"site b sent no scores: {words}; it is left out") == 3
    assert said.count("site a sent no scores") == 1
    assert [row[:3] for row in state["history"] if row[1] == "val"] == [(1, "val", "a"), (3, "val", "a")]
    assert result["best"]["round"] != 2


def test_the_bundle_holds_code_and_settings_alone(tmp_path):
    """What `flwr run` ships, with data, runs and keys lying in the project's folder."""
    project = tmp_path / "project"
    shutil.copytree(HERE, project, ignore=shutil.ignore_patterns(".git", "data", "runs", ".venv", "golden"))
    for name in ("data/a/images/x.png", "runs/one/splits.json", "keys/ca.crt", "server.key", "node",
                 "secret.json", "patients.csv", "notes.yaml", "runs/one/config.yaml", "keys/make.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("secret")
    subprocess.run([PROGRAMS / "flwr", "build", "--app", project], check=True, cwd=tmp_path, timeout=60,
                   env=os.environ | QUIET | {"FLWR_HOME": str(tmp_path / "home")}, capture_output=True)
    bundle, = [*tmp_path.glob("*.fab"), *project.glob("*.fab")]
    names = set(zipfile.ZipFile(bundle).namelist())
    print(sorted(names))
    rooms = {path.parent.name for path in HERE.glob("*/__init__.py")} - {"experiments", "tests"}
    code = {path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")} | {
        f"{room}/{path.name}" for room in rooms for path in (HERE / room).glob("*.py")}
    assert names - code <= {"config.yaml", "paper/nuclei.yaml", "paper/prostate.yaml", "LICENSE", "pyproject.toml",
                            ".info/CONTENT"} | {name for name in names if name.startswith(".info/")}
    assert code <= names


@pytest.mark.parametrize("task", ["nuclei", "prostate"])
def test_files_are_decoded_once_until_one_changes(tmp_path, monkeypatch, task):
    """A later message gets the same samples, to the bit, from what the site kept; a file or a setting that
    changes is seen, and another length of the run is none."""
    data, calls = (write_nuclei if task == "nuclei" else write_prostate)(tmp_path / "data", ("a",)), []
    honest = site_rules.load_own_site
    monkeypatch.setattr(site_rules, "load_own_site", lambda *given: (calls.append(1), honest(*given))[1])

    def load(*overrides):
        config = load_config({"task": task, "data": str(data / "a"), "out": str(tmp_path / "out")},
                             [*SETTINGS[1:], *overrides])
        return site_rules.load_decoded("a", config), honest("a", config)
    for words, times in (((), 1), ((), 1), (("rounds=7", "resume=true"), 1), (("seed=3",), 2), (("seed=3",), 2)):
        found, wanted = load(*words)
        assert len(calls) == times
        for part in ("train", "val", "test"):
            assert len(getattr(found, part)) == len(getattr(wanted, part))
            for one, other in zip(getattr(found, part), getattr(wanted, part)):
                assert torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
                assert one.images.stride() == other.images.stride() and one.truth.dtype == other.truth.dtype
                assert (one.truth == other.truth).all() and one[:3] == other[:3] and one[6:] == other[6:]
        assert [(sample.case, s) for sample, s in found.train_slices] == [
            (sample.case, s) for sample, s in wanted.train_slices]
    changed = max(path for path in data.rglob("*") if path.is_file())
    for number, change in enumerate((lambda: os.utime(changed, ns=(1, 1)), lambda: changed.write_bytes(changed.read_bytes()),
                                     lambda: (data / "a" / "extra.txt").write_text("x"), lambda: os.utime(changed, ns=(1, 1)))):
        change()
        load("seed=3")
        assert len(calls) == 3 + number


# apart from the other long test, so that two workers can run them at once
def test_a_lost_node_a_replacement_and_a_killed_server(federation, tmp_path):
    """skip: the run goes on without a killed node, and with its replacement; a server that was killed
    goes on from its last round, with the same nodes."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    settings = ("eval_every=50", "on_site_failure=skip", "resume=true")
    link = federation
    link.start_link()
    for site in "ab":
        link.start_node(site, data / site)
    link.start_run("rounds=50", *settings, timeout=20)

    def trained():
        file = tmp_path / "server" / "metrics.csv"
        rows = [line.split(",") for line in file.read_text().splitlines()] if file.exists() else []
        return [(row[0], row[2]) for row in rows if row[1] == "train"]
    wait_for(lambda: trained() == [("1", "a"), ("1", "b")], 90)
    link.kill(link.nodes.pop("b"))
    link.start_node("b", data / "b")
    wait_for(lambda: ("2", "a") in trained(), 60)
    assert ("2", "b") not in trained()
    wait_for(lambda: re.search("site b failed in round 2: .*; it is left out", link.log("run")), 20)
    wait_for(lambda: "b" in {site for t, site in trained() if t != "1"}, 120)
    received = link.log("a").count("Received successfully")
    wait_for(lambda: link.log("a").count("Received successfully") > received, 60)  # and works
    link.kill(link.link)
    kept = load_checkpoint(tmp_path / "server" / "last.pt")["round"]
    link.start_link()
    link.start_run("rounds=50", *settings, timeout=90)
    wait_for(lambda: {(str(kept + 1), "a"), (str(kept + 1), "b")} <= set(trained()), 120)
    assert f"resuming after round {kept}" in link.log("run")
