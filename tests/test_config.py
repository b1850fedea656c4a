"""Tests of the settings and of the messages about them."""

import json
import re
from pathlib import Path

import pytest
import torch

import federated
import train
from config import BadInput, as_yaml, load_config
from datasets import load_sites
from rounds import run_folder
from test_fedbcs import HERE, tiny_config

# ---- Settings and messages ----

@pytest.mark.parametrize("override, words", [
    ("tau=0", "tau: .*above 0"), ("tau=-1", "tau: .*above 0"), ("rounds=0", "rounds: .*at least 1"),
    ("image_size=40", "image_size: .*multiple of 16"), ("image_size=16", "image_size: .*at least 32"),
    ("learning_rate=1", "learning_rate: unknown key, the nearest is '"), ("taus=1", "taus: .*'tau'"),
    ("lr=fast", "lr: expected a number"), ("lr=nan", "lr: "), ("lr=true", "lr: "), ("seed=1.5", "seed: "),
    ("resume=1", "resume: expected true or false"), ("fsr=adaptative", "fsr: expected none or global"),
    ("levels=[]", "levels: "), ("levels=[0,3]", "levels: "), ("levels=[1,1]", "levels: "),
    ("levels=0", "levels: "), ("case_pattern=tnbc_.+", "case_pattern: .*group 1"),
    ("case_pattern=(", "case_pattern: .*regular expression"), ("amp=fp16", "amp: .*or none"),
    ("folds=2", "folds: "), ("device=gpu", "device: "), ("width", "width: not of the form key=value"),
    ("seed=2020-13-45", "seed: "), ("seed=9999999999999999999999", "seed: "), ("lr=1" + "0" * 400, "lr: "),
    ("eval_slices=foreground", "eval_slices: "), ("data=", "data: "),
])
def test_bad_settings(override, words):
    with pytest.raises(BadInput, match=f"^{words}"):
        config = tiny_config("unused", "unused", override)
        load_sites(config)


def test_settings_are_typed_and_written_back(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("task: nuclei\ndata: demo\nlr: 1e-3\nfolds: none\n")
    config = load_config(file, ["weight_decay=1e-4", "levels=[2, 0]", "case_pattern=^([a-z]+)_"])
    assert config.lr == 1e-3 and config.weight_decay == 1e-4 and config.levels == [0, 2]
    assert config.folds is None and config.case_pattern == "^([a-z]+)_"
    assert config.out == str(Path("runs") / "my")
    file.write_text(as_yaml(config))
    assert vars(load_config(file)) == vars(config)


@pytest.mark.parametrize("text, words", [
    ("data: demo", "task: missing"), ("- a", "c.yaml: holds no"), ("a: [", "c.yaml: is not YAML"),
    ("task: nuclei\ndata: demo\nfolds: 5\nfold: 5", "fold: "), ("task: nuclei\ndata: null", "data: "),
    ("task: nuclei\ndata: nowhere", "nowhere: "), ("task: nuclei\ndata: c.yaml", "c.yaml: "),
])
def test_messages_of_train_are_one_line(tmp_path, program, text, words):
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = program(train, tmp_path, "--config", "c.yaml")
    assert (code, out) == (2, "") and re.fullmatch(rf"error: {words}.*\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]  # nothing half-written


def test_a_folder_that_is_no_run_is_left_alone(workplace, program):
    for precious in ("precious", "data: demo\ntask: nuclei", "[" * 3000):
        (workplace / "mine").mkdir(exist_ok=True)
        (workplace / "mine" / "config.yaml").write_text(precious)
        code, _, err = program(train, workplace, "--config", "c.yaml", "out=mine", "resume=true")
        assert code == 2 and err.startswith("error: mine: is no run folder") and err.count("\n") == 1
        assert (workplace / "mine" / "config.yaml").read_text() == precious
        assert [path.name for path in (workplace / "mine").iterdir()] == ["config.yaml"]
    for out, words in ((".", "holds the data folder"), ("data/a", "lies in the data folder")):
        code, _, err = program(train, workplace, "--config", "c.yaml", f"out={out}", "resume=true")
        assert code == 2 and words in err and not (workplace / out / ".lock").exists()
    code, _, err = program(train, workplace, "--config", "c.yaml", "out=" + 300 * "x")
    assert code == 2 and err.count("\n") == 1 and "too long" in err
    splits = {site: {"test": ["0"]} for site in "ab"}
    (workplace / "splits.json").write_text(json.dumps(splits))
    code, _, err = program(train, workplace, "--config", "c.yaml", "splits=splits.json")
    assert code == 2 and "no site has a training case" in err


def test_every_term_of_the_loss_has_its_column():
    """Also a forker's fourth one, which some rows may lack; `null` stands for what a row does not have."""
    losses = {"dice": 1.0, "mine": 9.0, "contrast": 2.0, "consistency": 3.0}
    update = federated.Update("a", 1, {"w": torch.zeros(2)}, {}, losses, {}, 0.5)
    rows = run_folder.train_rows(1, [update])
    assert rows == [(1, "train", "a", None, losses, 0.5, 8, 0)]
    table = run_folder.as_csv([(1, "train", "b", None, {"dice": 2.0}, 0.5, 8, 0), *rows])
    lines = table.decode().splitlines()
    assert lines == [("round,split,site,dice,loss_dice,loss_mine,loss_contrast,loss_consistency,seconds,"
                      "weight_bytes,prototype_bytes"), "1,train,b,null,2.0,null,null,null,0.5,8,0",
                     "1,train,a,null,1.0,9.0,2.0,3.0,0.5,8,0"]


def test_unwritable_run_folder(workplace, program):
    (workplace / "file").write_text("")
    code, _, err = program(train, workplace, "--config", "c.yaml", "out=file/run")
    assert code == 2 and err.startswith("error: file/run: cannot be made")


@pytest.mark.parametrize("name", ["config", "nuclei", "prostate"])
def test_shipped_configs(name):
    config = load_config(HERE / ("config.yaml" if name == "config" else f"paper/{name}.yaml"))
    assert config.task == ("prostate" if name == "prostate" else "nuclei")
    assert (config.batch_size, config.local_epochs, config.weight_decay) == (6, 1, 1e-4)
    if name != "config":  # the paper's settings
        assert config.rounds == 400 and config.width == 32 and not config.contrast_clip
        assert (config.optimizer, config.lr, config.tau) == (
            ("sgd", 0.01, 0.005) if name == "nuclei" else ("adam", 1e-4, 0.4))


def test_what_a_method_of_ones_own_sets_is_said(tmp_path, capsys):
    """Unless the command line sets it, or the config file names the method itself."""
    (tmp_path / "mine.py").write_text('FIXED = {"tau": 0.2}\ndef f(config):\n    pass\n')
    mine = f"method={tmp_path / 'mine.py'}:f"
    file = {"task": "nuclei", "data": "d", "out": "o", "fsr": "adaptive"}
    assert load_config(file, [mine]).fsr == "none"
    assert capsys.readouterr().out.endswith("mine.py:f sets fsr: none, prototype_weight: 0.0, tau: 0.2, "
                                            "whatever the config file says\n")
    assert load_config(file, [mine, "fsr=global"]).fsr == "global"
    assert "sets prototype_weight: 0.0, tau: 0.2, whatever" in capsys.readouterr().out
    assert load_config(file | {"method": mine[7:], "tau": 0.2}).fsr == "adaptive"
    load_config(file, ["method=fedavg"])
    assert capsys.readouterr().out == ""
