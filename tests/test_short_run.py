"""A short run on the generated sites: the numbers of FedAvg and FedBCS stand in a file with bounds.

A change of the method changes them. If it is meant, `python -m tests.test_short_run` prints the new file; say in
docs/results.md what has changed.
"""

import csv
import json
import statistics
import tempfile
from pathlib import Path

import pytest

import train
from config import load_config
from experiments import check_numbers
from test_fedbcs import HERE
from tests.helpers import rows_of

BOUNDS = HERE / "tests" / "golden" / "short_run.csv"  # a number, and how far from it another machine may be
# (of Dice, of a loss): other instructions of a CPU change FedAvg by 0.001; FedBCS's clusters jump: initial weights
# that are 1 millionth larger change its Dice of west by 0.035 and L_contra by 0.015
BOUND = {"fedavg": (0.005, 0.005), "fedbcs": (0.04, 0.02)}
KEYS = ("image_size=64", "width=4", "rounds=10", "optimizer=adam", "lr=0.01", "eval_every=10", "device=cpu")


def numbers_of(method, out):
    """Return {what: number} of a short run: test Dice of each site, mean loss terms of the last round."""
    train.train(load_config(HERE / "config.yaml", [*KEYS, f"method={method}", f"out={out}"]))
    sites = json.loads((out / "result.json").read_text())["last"]["test"]["sites"]
    rows = [row for row in rows_of(out) if (row["round"], row["split"]) == ("10", "train")]
    losses = {name: [float(row[name]) for row in rows] for name in rows[0] if name.startswith("loss_")}
    return {site: row["dice"] for site, row in sites.items()} | {
        name: statistics.mean(values) for name, values in losses.items()}


@pytest.mark.parametrize("method", ["fedavg", "fedbcs"])
def test_the_numbers_of_a_short_run(tmp_path, method):
    with open(BOUNDS, newline="") as stream:
        expected = {row["number"]: row for row in csv.DictReader(stream) if row["method"] == method}
    found = numbers_of(method, tmp_path / "run")
    assert found.keys() == expected.keys()
    changed = [f"{name}: {found[name]:.4f}, was {row['value']}" for name, row in expected.items()
               if abs(found[name] - float(row["value"])) > float(row["bound"])]
    assert not changed, f"numbers of {method} have changed: {'; '.join(changed)}"


def test_numbers_of_pages_are_compared(tmp_path, program, monkeypatch):
    """Those of the list stand in their pages; one that does not come out is named, and one that no page has."""
    monkeypatch.setattr(check_numbers, "ROOT", tmp_path)
    head = "file,text,command,found,number,within\n"
    (tmp_path / "page.md").write_text("# 10 and\n20\n")
    for number, within, code, words in (("10 20", 0.5, 0, "same: page.md"), ("10 20", 0.1, 1, "DIFFERENT: page.md"),
                                        ("11", 0.5, 2, "page.md has no '# 10 and 20' with 11 in it"),
                                        ("10", 0.5, 2, "printed 2 numbers, the page has 10")):
        (tmp_path / "l.csv").write_text(
            f'{head}page.md,# 10 and 20,"echo 1 1; mkdir OUT; echo 10 20.2",(\\S+) (.*),{number},{within}\n')
        ended, out, err = program(check_numbers, tmp_path, "l.csv")
        assert ended == code and words in out + err
    (tmp_path / "l.csv").write_text(f"{head}page.md,# 10,false,(.*),10,0\n")
    assert "false: ended with 1, run it by hand" in program(check_numbers, tmp_path, "l.csv")[2]


def test_pages_have_the_numbers_of_the_tables():
    """What needs no training: the pages against the tables that the runs left."""
    rows = [row for row in check_numbers.commands_in(HERE / "docs" / "commands.csv")
            if row["command"].startswith("cat ")]
    wrong = [row["text"] for row in rows if not check_numbers.agree(row, check_numbers.numbers_of(row))]
    assert len(rows) > 30 and not wrong


def test_the_page_of_results_is_one_page():
    assert len((HERE / "docs" / "results.md").read_text(encoding="utf-8").split()) <= 1200


def main():
    """Print the file of numbers."""
    with tempfile.TemporaryDirectory() as folder:
        found = {method: numbers_of(method, Path(folder) / method) for method in ("fedavg", "fedbcs")}
    print("method,number,value,bound")
    for method, numbers in found.items():
        for name, value in numbers.items():
            print(f"{method},{name},{value:.4f},{BOUND[method][name.startswith('loss_')]}")


if __name__ == "__main__":
    main()
