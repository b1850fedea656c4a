"""Tests of the federation on Flower: a real SuperLink and SuperNodes on loopback, and what travels.

They need requirements-flower.txt. Run them with `pytest -m flower`.
"""

import json
import os
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

import train
from config import BadInput, load_config
from eval import load_checkpoint
from federated import Diverged
from test_fedbcs import HERE, assert_same, write_nuclei

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower
PROGRAMS = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
         "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1"}
SETTINGS = ("task=nuclei", "image_size=32", "width=2", "batch_size=2", "device=cpu", "optimizer=adam",
            "lr=1e-3")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Federation:
    """One SuperLink and its SuperNodes on loopback, each in a process group of its own."""

    def __init__(self, folder, keys=None):
        self.folder, self.keys, self.port, self.nodes = folder, keys, free_port(), {}
        self.env = os.environ | QUIET | {"FLWR_HOME": str(folder / "home"),
                                         "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        (folder / "home").mkdir()
        secure = f'root-certificates = "{keys / "ca.crt"}"' if keys else "insecure = true"
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "127.0.0.1:{self.port}"\n'
            f"{secure}\n")
        self.start_link()

    def start(self, name, *command):
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen([PROGRAMS / command[0], *map(str, command[1:])], env=self.env,
                                    stdout=log, stderr=log, start_new_session=True, cwd=HERE)

    def start_link(self):
        secure = ("--ssl-ca-certfile", self.keys / "ca.crt", "--ssl-certfile", self.keys / "server.pem",
                  "--ssl-keyfile", self.keys / "server.key", "--enable-supernode-auth") \
            if self.keys else ("--insecure",)
        self.link = self.start("link", "flower-superlink", *secure, "--host", "127.0.0.1", "--port",
                               self.port)
        wait_for(lambda: is_open(self.port), 60)

    def start_node(self, site, data, key=None, name=None):
        secure = ("--root-certificates", self.keys / "ca.crt", "--auth-supernode-private-key",
                  self.keys / (key or site), "--ssl-ca-certfile", self.keys / "ca.crt",
                  "--ssl-certfile", self.keys / "server.pem", "--ssl-keyfile",
                  self.keys / "server.key") if self.keys else ("--insecure",)
        config = f'site="{site}" data="{data}" out="{self.folder / site}"'
        self.nodes[name or site] = self.start(
            name or site, "flower-supernode", *secure, "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_port(), "--node-config", config)

    def register(self, site):
        subprocess.run([PROGRAMS / "flwr", "supernode", "register", self.keys / f"{site}.pub", "loop",
                        "--name", site], env=self.env, cwd=HERE, check=True, capture_output=True,
                       timeout=60)

    def start_run(self, *overrides, **run_config):
        values = {"overrides": " ".join((*SETTINGS, *overrides, f"out={self.folder / 'server'}"))}
        text = " ".join(f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}"
                        for k, v in (values | run_config).items())
        return self.start("run", "flwr", "run", HERE, "loop", "--stream", "--run-config", text)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def end(self, process, how=signal.SIGTERM):
        """End a process of ours and what it started."""
        if process.poll() is None:
            os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)

    def close(self):
        for process in [*self.nodes.values(), self.link]:
            self.end(process)


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
def federation(tmp_path, request):
    """Return open(keys=None), which starts a Federation that is ended with the test."""
    opened = []

    def start(keys=None):
        opened.append(Federation(tmp_path, keys))
        return opened[-1]
    yield start
    for one in opened:
        one.close()


def in_process(folder, data, *overrides):
    """The same run in one process; returns its state and result."""
    config = load_config({"task": "nuclei", "data": str(data), "out": str(folder)},
                         [*SETTINGS, *overrides])
    train.train(config)
    return load_checkpoint(folder / "last.pt"), json.loads((folder / "result.json").read_text())


def without_facts(result):
    return {key: result[key] for key in ("best", "last", "units")}


def test_over_tls_equals_one_process(federation, tmp_path):
    """Bit for bit; nodes without a registered key never join; each keeps its own to itself."""
    data = write_nuclei(tmp_path / "data", ("a", "b"))
    write_nuclei(tmp_path / "more", ("c", "d"))
    keys = tmp_path / "keys"
    subprocess.run([sys.executable, HERE / "make_certificates.py", keys, "a", "b", "c"], check=True)
    subprocess.run([sys.executable, HERE / "make_certificates.py", tmp_path / "other", "d"], check=True)
    (tmp_path / "other" / "d").rename(keys / "d")  # a key that nobody registered either
    link = federation(keys)
    for site in ("b", "a"):
        link.register(site)
        link.start_node(site, data / site)
    link.start_node("c", tmp_path / "more" / "c")              # its key is not registered
    link.start_node("a", data / "a", key="d", name="foreign")  # claims to be a
    run = link.start_run("rounds=2", "local_epochs=2", timeout=100)
    assert run.wait(150) == 0
    wait_for(lambda: (tmp_path / "server" / "result.json").exists() or "error" in link.log("run"), 5)
    state, result = in_process(tmp_path / "one", data, "rounds=2", "local_epochs=2")
    served = load_checkpoint(tmp_path / "server" / "last.pt")
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    assert without_facts(json.loads((tmp_path / "server" / "result.json").read_text())) \
        == without_facts(result)
    assert {path.name for path in (tmp_path / "server").iterdir()} == {
        "best.pt", "last.pt", "config.yaml", "metrics.csv", "result.json"}
    for site in "ab":
        assert {path.name for path in (tmp_path / site).iterdir()} == {
            "best.pt", "last.pt", "config.yaml", "optimizer.pt", "predictions.png", "splits.json"}
        kept = torch.load(tmp_path / site / "optimizer.pt", weights_only=True)
        assert_same(kept["after"], state["optimizers"][site])
    assert not (tmp_path / "c").exists()
    for name in ("c", "foreign"):
        assert "Failed to activate SuperNode" in link.log(name), link.log(name)
        assert link.nodes[name].poll() not in (None, 0)


def fake_context(data, out, *overrides):
    run = {"config": "config.yaml", "overrides": " ".join((*SETTINGS, *overrides)), "sites": 2}
    return SimpleNamespace(run_config=run, node_config={"site": "a", "data": str(data), "out": str(out)})


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
    flower_app = pytest.importorskip("flower_app")
    data = write_nuclei(tmp_path / "data", ("a",)) / "a"
    for kind in ("images", "masks"):
        for number, file in enumerate(sorted((data / kind).iterdir())):
            file.rename(file.with_name(f"TCGA-PATIENT-{number}.png"))
    context = fake_context(data, tmp_path / "out")
    _, site, method, model = flower_app.own_site(context)
    state = {"weights": model.state_dict(), "prototypes": {}}
    for t in (1, 2):
        answer = flower_app.train_site(flower_app.message_of(state, t, "round"), context)
        assert set(answer) == {"site", "weights", "prototypes", "losses", "scalars"}
        weights = answer["weights"].to_torch_state_dict()
        assert {k: v.shape for k, v in weights.items()} == {
            k: v.shape for k, v in model.state_dict().items()}
        c = flower_app.unpack(answer["prototypes"])
        assert {p: {j: tuple(v.shape) for j, v in c[p].items()} for p in c} == {
            p: {0: (48,), 1: (48,)} for p in ("encoder", "decoder")}
        assert set(answer["scalars"]) == {"n", "seconds"}
        assert set(answer["losses"]) == {"dice", "contrast", "consistency"}
        state = {"weights": weights, "prototypes": method.aggregate([c])}
        scores = flower_app.score_site(flower_app.message_of(state, t, "last"), context)
        assert set(scores) == {"site", "scalars"}
        assert {key.split(".")[1] for key in scores["scalars"]} <= set(flower_app.MEASURES)
        for records in (answer, scores, flower_app.name_site({}, context)):
            content = sent_bytes(records)
            print(f"round {t}: {len(content)} bytes in {sorted(records)}")
            assert b"TCGA" not in content and b"PATIENT" not in content and b".png" not in content
            assert str(data).encode() not in content
            for sample in site.train:
                assert sample.images.numpy().tobytes()[:64] not in content
                assert sample.truth.tobytes()[200:264] not in content or not sample.truth[0, 6].any()
    assert (tmp_path / "out" / "splits.json").exists()


def test_what_the_server_is_told_of_a_failure(tmp_path):
    flower_app = pytest.importorskip("flower_app")
    data = write_nuclei(tmp_path / "data", ("a",)) / "a"
    (data / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadInput) as problem:
        flower_app.train_site({}, fake_context(data, tmp_path / "out"))
    assert "1.png" in str(problem.value)
    assert flower_app.told(problem.value) == "BadInput: see the log of that site"
    assert "round 3" in flower_app.told(Diverged("the loss is nan at site a, round 3, step 1"))


def test_a_repeated_round_starts_from_the_same_optimizer_state(tmp_path):
    """A server that resumes asks for a round again; the site answers the same."""
    flower_app = pytest.importorskip("flower_app")
    context = fake_context(write_nuclei(tmp_path / "data", ("a",)) / "a", tmp_path / "out")
    model = flower_app.own_site(context)[3]
    state = {"weights": model.state_dict(), "prototypes": {}}
    answers = [flower_app.train_site(flower_app.message_of(state, t, "round"), context)
               for t in (1, 2, 2)]
    first, second, again = (answer["weights"].to_torch_state_dict() for answer in answers)
    assert_same(dict(second), dict(again))
    assert not torch.equal(first["head.weight"], second["head.weight"])  # adam's state has moved on


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
    code = {path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")}
    assert names - code <= {"config.yaml", "nuclei.yaml", "prostate.yaml", "LICENSE", "pyproject.toml",
                            ".info/CONTENT"} | {name for name in names if name.startswith(".info/")}
    assert code <= names
