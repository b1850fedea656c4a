"""Tests of many sites on one machine: nodes with numbers alone, and Flower's simulation where ray is there."""

import importlib.util
import json
import subprocess

import pytest

from config import load_config
from flower.fit import SiteFailed
from rounds.reading import load_checkpoint
from test_fedbcs import HERE, write_nuclei
from tests.helpers import assert_same

pytest.importorskip("flwr.app")
from flower import app as flower_app
from flower import site_rules
from tests.test_flower import (
    SETTINGS,
    Hospitals,
    environment,
    free_port,
    in_process,
    is_open,
    without_facts,
)

pytestmark = pytest.mark.flower


def numbered(folder, data, n):
    """A Grid whose n nodes know a number alone."""
    nodes = Hospitals(folder, data, "", ("rounds=2", f"data={data}"), sites_wanted=n)
    nodes.nodes = {i + 1: {"partition-id": i, "num-partitions": n} for i in reversed(range(n))}
    return nodes


def test_a_partition_is_a_folder_of_the_data(tmp_path, capsys):
    """Bit for bit as in one process; each site's own files lie beside the run folder."""
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    (data / ".hidden").mkdir()
    (data / "notes.txt").write_text("x")
    state, result = in_process(tmp_path / "one", data, "rounds=2")
    nodes = numbered(tmp_path, data, 3)
    served, said = nodes.train()
    assert {node["partition-id"]: node["site"] for node in nodes.nodes.values()} == dict(enumerate("abc"))
    assert_same(dict(served["weights"]), dict(state["weights"]))
    assert without_facts(said) == without_facts(result)
    assert {path.name for path in (tmp_path / "server_sites").iterdir()} == set("abc")
    assert capsys.readouterr().err == ""


def test_nodes_and_folders_have_to_be_as_many(tmp_path, capsys):
    data = write_nuclei(tmp_path / "data", ("a", "b", "c"))
    with pytest.raises(SiteFailed, match="site 0 failed in round 1: BadInput"):
        numbered(tmp_path, data, 2).train()
    words = f"{data}: has 3 folders of sites and the simulation 2 nodes, make them equal"
    assert words in capsys.readouterr().err
    node = {"partition-id": 0, "num-partitions": 3}
    with pytest.raises(flower_app.BadInput, match="give both as full paths"):
        site_rules.name_partition(node, load_config({"task": "nuclei", "data": "demo", "out": "x"}))
    with pytest.raises(flower_app.BadInput, match="has 0 folders of sites"):
        site_rules.name_partition(node, load_config({"task": "nuclei", "data": "/no/such", "out": "/x"}))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                    reason="flower/requirements-simulation.txt is not installed")
def test_the_simulation_runtime_equals_one_process(tmp_path):
    data = write_nuclei(tmp_path / "the data", ("a", "b", "c"))
    command = ["bash", HERE / "flower" / "simulate.sh", data, tmp_path / "the run", *SETTINGS, "rounds=2"]
    port = free_port()

    def simulate():
        return subprocess.run(command, check=False, timeout=300, capture_output=True, text=True,
                              env=environment(tmp_path / "home") | {"PORT": str(port)})
    done = simulate()
    assert done.returncode == 0, done.stdout + done.stderr
    again = simulate()
    assert again.returncode == 1 and "exists already" in again.stdout and "did not end well" in again.stderr
    state, result = in_process(tmp_path / "one", data, "rounds=2")
    served = load_checkpoint(tmp_path / "the run" / "last.pt")
    for key in ("weights", "prototypes"):
        assert_same(dict(served[key]), dict(state[key]))
    written = json.loads((tmp_path / "the run" / "result.json").read_text())
    assert without_facts(written) == without_facts(result)
    assert not is_open(port)  # the server is stopped
