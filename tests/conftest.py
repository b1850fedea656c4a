"""Fixtures of the tests."""

from functools import partial

import pytest

from config import as_yaml
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import run_here


@pytest.fixture
def program(monkeypatch, capsys):
    """Return run(module, folder, *arguments), see run_here."""
    return partial(run_here, monkeypatch, capsys)


@pytest.fixture
def workplace(tmp_path):
    """A folder with data/ and a config of a short run in it."""
    write_nuclei(tmp_path / "data")
    config = tiny_config("data", "run", "optimizer=adam", "lr=1e-3", "rounds=5", "local_epochs=2")
    (tmp_path / "c.yaml").write_text(as_yaml(config))
    return tmp_path
