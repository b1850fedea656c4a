"""Tests of the bounds beside a federation: every site by itself, and all images in one place."""

import json
import shutil

import pytest
import torch

import eval as eval_program
import predict
import train
from config import BadInput
from datasets import load_sites
from methods.pooled import training_sites
from rounds.reading import load_checkpoint
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import assert_same, rows_of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with data/ of two sites and the run of `method: local` in run/."""
    folder = tmp_path_factory.mktemp("alone")
    train.train(tiny_config(write_nuclei(folder / "data"), folder / "run", "method=local", "lr=0.5"))
    return folder


def result_of(run):
    return json.loads((run / "result.json").read_text())["last"]["test"]["sites"]


def test_a_site_by_itself_is_a_run_of_that_site_alone(alone, tmp_path):
    """To the bit: weights, scores; nothing is sent, and the global weights stay as they were."""
    state, results = load_checkpoint(alone / "run" / "last.pt"), result_of(alone / "run")
    for site in "ab":
        shutil.copytree(alone / "data" / site, tmp_path / site / site)
        train.train(tiny_config(tmp_path / site, tmp_path / f"{site}_run", "method=fedavg", "lr=0.5"))
        own = load_checkpoint(tmp_path / f"{site}_run" / "last.pt")
        assert_same(dict(state["local"][site]), dict(own["weights"]))
        assert results[site] == result_of(tmp_path / f"{site}_run")[site]
    assert {row["weight_bytes"] for row in rows_of(alone / "run") if row["split"] == "train"} == {"0"}
    assert not torch.equal(state["weights"]["head.weight"], state["local"]["a"]["head.weight"])


def test_a_site_without_a_network_of_its_own_is_refused(alone, program, tmp_path):
    run, image = alone / "run", next((alone / "data" / "a" / "images").iterdir())
    result = result_of(run)
    code, *_ = program(eval_program, tmp_path, "--run", run)
    again = json.loads((run / "result_eval.json").read_text()) if code == 0 else None
    assert again and again["last"]["test"]["sites"] == result
    assert program(predict, tmp_path, "--run", run, image, "site=a", f"out={tmp_path / 'o'}")[0] == 0
    (alone / "data" / "a").rename(alone / "data" / "c")
    foreign = program(eval_program, tmp_path, "--run", run, f"data={alone / 'data'}")
    (alone / "data" / "c").rename(alone / "data" / "a")
    for code, _, err in (foreign, program(predict, tmp_path, "--run", run, image),
                         program(predict, tmp_path, "--run", run, f"export={tmp_path / 'n.pt2'}")):
        assert code == 2 and err.startswith("error: site: with method: local only a, b have networks")
    splits = json.loads((run / "splits.json").read_text())
    splits["b"] = {"train": [], "val": [], "test": [case for part in splits["b"].values() for case in part]}
    (tmp_path / "s.json").write_text(json.dumps(splits))
    with pytest.raises(BadInput, match="site: with method: local only a have networks, and b has none"):
        train.train(tiny_config(alone / "data", tmp_path / "r", "method=local",
                                f"splits={tmp_path / 's.json'}"))
    with pytest.raises(BadInput, match="hold_out: b contradicts method: local"):
        tiny_config(alone / "data", tmp_path / "r", "method=local", "hold_out=b")


def test_one_place_is_a_run_of_one_site_that_has_all_images(tmp_path):
    """To the bit: the same weights as of a folder in which the two sites are one; tests stay by site."""
    data = write_nuclei(tmp_path / "data")
    train.train(tiny_config(data, tmp_path / "run", "method=pooled"))
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    joined = {"train": [], "val": [], "test": []}
    for site in "ab":
        for kind in ("images", "masks"):
            (tmp_path / "one" / "pooled" / kind).mkdir(parents=True, exist_ok=True)
            for file in (data / site / kind).iterdir():
                shutil.copy(file, tmp_path / "one" / "pooled" / kind / f"{site}{file.name}")
        for part, cases in splits[site].items():
            joined[part] += [f"{site}{case}" for case in cases]
    (tmp_path / "s.json").write_text(json.dumps({"pooled": joined}))
    train.train(tiny_config(tmp_path / "one", tmp_path / "other", "method=fedavg",
                            f"splits={tmp_path / 's.json'}"))
    a, b = (load_checkpoint(tmp_path / run / "last.pt") for run in ("run", "other"))
    assert_same(dict(a["weights"]), dict(b["weights"]))
    assert result_of(tmp_path / "run").keys() == {"a", "b"} and a["kept"].keys() == {"pooled"}


def test_batches_of_one_place_are_mixed_over_sites(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "data"), "unused", "batch_size=4")
    sites = load_sites(config)
    place = training_sites(sites, sites)[0]
    own = [{sample.images.sum().item() for sample in site.train} for site in sites]
    assert len(place.train_slices) == sum(len(site.train_slices) for site in sites)
    batches = [{x_i.sum().item() for x_i in x} for x, _ in place.batches(config, 1, 1, torch.device("cpu"))]
    assert any(all(min(abs(x - y) for x in batch for y in of_site) < 1e-2 for of_site in own)
               for batch in batches)


@pytest.mark.parametrize("method", ["local", "pooled"])
def test_bounds_do_not_run_between_hospitals(method):
    from flower.guards import load_settings
    from test_fedbcs import HERE
    with pytest.raises(BadInput, match=f"method: {method} is no federation"):
        load_settings(HERE / "config.yaml", [f"method={method}"])
