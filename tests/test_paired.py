"""Tests of paired differences: patients over folds, the bootstrap's interval, Wilcoxon's test, the tables."""

import csv
import itertools
import re
import tarfile

import numpy as np
import pytest

from config import BadInput, as_yaml
from experiments import compare, paired, reproduce, run_grid
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import run_here, start_here


def rows_of(site, values, **more):
    """Rows of a cases.csv of one site: {patient: Dice of each file}."""
    return [{"site": site, "case": case, "dice": str(dice), "precision": "1.0", "recall": str(dice), "hd95": "1.0"} | more
            for case, files in values.items() for dice in files]


# ---- Patients and sites ----

def test_means_go_from_files_to_patients_to_sites():
    """A patient of many files counts once, a site of many patients counts once; seeds are averaged last."""
    folds = [rows_of("a", {"p": [0.1, 0.2, 0.9], "q": [0.6]}), rows_of("a", {"r": [0.8]}) + rows_of("b", {"s": [1.0]})]
    again = [rows_of("a", {"r": [0.5], "p": [0.4]}), rows_of("a", {"q": [0.0]}) + rows_of("b", {"s": [0.5]})]
    found = paired.summary([folds, again])
    a = (np.mean([0.4, 0.6, 0.8]) + np.mean([0.4, 0.0, 0.5])) / 2
    assert found["sites"] == pytest.approx({"a": a, "b": 0.75}) and found["dice"] == pytest.approx((a + 0.75) / 2)
    with pytest.raises(BadInput, match="patient p is tested in two folds"):
        paired.of_patients([rows_of("a", {"p": [1]}), rows_of("a", {"p": [1]})], paired.column("dice"))
    with pytest.raises(BadInput, match=r"not tested on the same patients and seeds \(a . by one of them alone\), give"):
        paired.summary([folds], [[rows_of("a", {"p": [1]})]])


def test_marked_over_true_area():
    """|P| / |T| of masks, from precision and recall; a case without overlap says nothing."""
    P, T, both = 30, 40, 12
    assert paired.marked_over_true({"precision": both / P, "recall": both / T}) == pytest.approx(P / T)
    assert paired.marked_over_true({"precision": "0.0", "recall": "0.0"}) is None
    rows = rows_of("a", {"p": [0.5, 0.0], "q": [0.25]})
    rows[1]["precision"] = "0.0"
    assert paired.summary([[rows]])["marked"] == pytest.approx((0.5 + 0.25) / 2)


def test_paired_differences_count_patients():
    base = [[rows_of("a", {"p": [0.5], "q": [0.5], "r": [0.5]}) + rows_of("b", {"s": [0.2]})]]
    better = [[rows_of("a", {"p": [0.6], "q": [0.7], "r": [0.4]}) + rows_of("b", {"s": [0.2]})]]
    found = paired.summary(better, base)
    assert found["difference"] == pytest.approx(np.mean([np.mean([0.1, 0.2, -0.1]), 0]))
    assert (found["better"], found["patients"]) == (2, 4)
    assert found["p"] == pytest.approx(paired.wilcoxon([0.1, 0.2, -0.1, 0])[1])


# ---- The interval ----

@pytest.mark.parametrize("sites, low, high", [
    ([[[0.3, 0.3, 0.3]], [[-0.1, -0.1]]], 0.1, 0.1),       # no spread at all
    ([[[0.0, 3.0, 6.0]]], 0.0, 6.0),                        # two of three are drawn: 0 and 6 in 1 of 9 draws each
    ([[[0.0, 1.0]], [[0.0, 1.0]]], 0.0, 1.0),              # one of two in each site: 0 and 1 in 1 of 4
    ([[[0.25]], [[0.75]]], 0.5, 0.5),                       # single patients
    ([[[0.0, 0.0], [1.0, 1.0]]], 0.0, 1.0),                # the seeds alone differ
    ([[[0.0], [1.0]], [[0.0], [1.0]]], 0.0, 1.0),          # and are the same seeds for all sites
])
def test_intervals_known_by_hand(sites, low, high):
    found = paired.bootstrap_interval({str(i): np.array(of_site) for i, of_site in enumerate(sites)})
    assert found == pytest.approx((low, high), abs=1e-12)
    assert found == paired.bootstrap_interval({str(i): np.array(of_site) for i, of_site in enumerate(sites)})  # seeded


def test_the_interval_of_many_patients_is_the_normal_one():
    d = np.random.default_rng(0).standard_normal((1, 400))
    low, high = paired.bootstrap_interval({"a": d, "b": d + 1})
    reach = 1.96 * d.std(ddof=1) / np.sqrt(400) / np.sqrt(2)
    assert low == pytest.approx(d.mean() + 0.5 - reach, abs=0.004)
    assert high == pytest.approx(d.mean() + 0.5 + reach, abs=0.004)


@pytest.mark.parametrize("sizes, S, of_seed", [((11, 6, 6, 3), 3, 0.2), ((20, 20, 20, 20), 1, 0.0)])
def test_the_interval_covers_the_truth(monkeypatch, sizes, S, of_seed):
    """In 93 to 97 % of 500 made comparisons whose true difference is 0.3: patients, seeds and noise vary."""
    monkeypatch.setattr(paired, "DRAWS", 2000)
    random, covered = np.random.default_rng(1), 0
    for _ in range(500):
        seeds = of_seed * random.standard_normal((S, 1))
        low, high = paired.bootstrap_interval({str(i): 0.3 + random.standard_normal(n) + seeds + 0.5 * (S > 1)
                                     * random.standard_normal((S, n)) for i, n in enumerate(sizes)})
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / 500 <= 0.97


# ---- Wilcoxon ----

CRITICAL = {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 11: 10, 12: 13, 13: 17, 14: 21, 15: 25, 16: 29, 17: 34, 18: 40, 19: 46,
            20: 52, 21: 58, 22: 65, 23: 73, 24: 81, 25: 89, 30: 137, 40: 264, 50: 434}  # two-sided, 5 %


def with_sum(n, W):
    """Differences of sizes 1 to n whose negative ranks add up to W."""
    d = np.arange(1.0, n + 1)
    for r in range(n, 0, -1):
        if r <= W:
            d[r - 1], W = -r, W - r
    return d


@pytest.mark.parametrize("n", CRITICAL)
def test_wilcoxon_has_the_published_critical_values(n):
    """At the tabled W two-sided p is at most 5 %, at the next one above."""
    W, p = paired.wilcoxon(with_sum(n, CRITICAL[n]))
    assert W == CRITICAL[n] and p <= 0.05 < paired.wilcoxon(with_sum(n, CRITICAL[n] + 1))[1]


def test_wilcoxon_counts_all_signs():
    """Ties and zeros too, against the 2^n sums themselves."""
    for d in ([1.5, -0.5, 2.0, 3.0, -1.0], [1.0, 1.0, -1.0, 2.0, 2.0, 0.0], [0.1] * 7, [-1.0, 1.0]):
        kept = [x for x in d if x]
        ranks = [sum(abs(y) < abs(x) for y in kept) + (sum(abs(y) == abs(x) for y in kept) + 1) / 2 for x in kept]
        W = min(sum(r for r, x in zip(ranks, kept) if x > 0), sum(r for r, x in zip(ranks, kept) if x < 0))
        sums = [sum(r for r, s in zip(ranks, signs) if s) for signs in itertools.product((0, 1), repeat=len(kept))]
        assert paired.wilcoxon(d) == pytest.approx((W, min(1, 2 * np.mean([s <= W for s in sums]))))
    assert paired.wilcoxon([0.0, 0.0]) == (0.0, 1.0)
    few, many = (paired.wilcoxon(with_sum(n, W))[1] for n, W in ((24, 100), (25, 110)))
    assert few == pytest.approx(many, abs=0.03)  # exact and approximate meet


# ---- The program ----

def test_every_patient_is_tested_once_and_compared(tmp_path, monkeypatch, capsys):
    """reproduce --folds: all runs, both kinds of statistics, both rounds; the table follows from cases.csv."""
    pytest.importorskip("matplotlib")
    start_here(monkeypatch)
    data = write_nuclei(tmp_path / "data", ("a", "b"), cases=4)
    (tmp_path / "c.yaml").write_text(as_yaml(tiny_config(data, tmp_path / "unused", "rounds=2")))
    words = ("table", "--config", "c.yaml", "--out", "o", "--seeds", "0", "--folds", "3", "--methods", "fedavg",
             "--also", "quick: method=fedavg lr=0.1", "--jobs", "2")
    code, out, err = run_here(monkeypatch, capsys, reproduce, tmp_path, *words)
    assert code == 0, err
    folders = {f"{name}_seed0_fold{k}" for name in ("fedavg", "quick") for k in range(3)}
    assert {path.name for path in (tmp_path / "o").iterdir() if path.is_dir()} == folders
    with open(tmp_path / "o" / "table_paired.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for name, stats, kind in itertools.product(("fedavg", "quick"), ("site", "case"), ("best", "last")):
        mine = [row for row in rows if (row["setting"], row["statistics"], row["kind"]) == (name, stats, kind)]
        assert sorted((row["site"], row["patient"]) for row in mine) == [(s, p) for s in "ab" for p in "0123"]
        if stats == "site":
            for row in mine:
                cases = [case for k in range(3)
                         for case in run_grid.rows_in(tmp_path / "o" / f"{name}_seed0_fold{k}" / "cases.csv")
                         if (case["kind"], case["split"], case["site"], case["case"])
                         == (kind, "test", row["site"], row["patient"])]
                assert len(cases) == 1 and float(cases[0]["dice"]) == pytest.approx(float(row["dice"]), abs=1e-6)
    text = (tmp_path / "o" / "table_paired.md").read_text()
    assert "tested once a seed (3 folds)." in text
    assert text in out and [line for line in text.splitlines() if line.startswith("**")] == [
        f"**{kind} round, statistics: {stats}**" for stats in ("site", "case") for kind in ("last", "best")]
    dice = {name: [float(row["dice"]) for row in rows if row["setting"] == name][:8] for name in ("fedavg", "quick")}
    d = np.subtract(dice["quick"], dice["fedavg"])
    line = next(line for line in text.splitlines() if line.startswith("| quick"))
    assert f"| {d.mean():+.3f} [" in line and f"| {(d > 0).sum()} of 8 |" in line
    assert (tmp_path / "o" / "table_paired.png").stat().st_size > 5000
    monkeypatch.setattr(reproduce, "train_all", lambda *_: None)  # nothing is trained or scored a second time
    code, again, _ = run_here(monkeypatch, capsys, reproduce, tmp_path, *words)
    assert code == 0 and "scoring it" not in again and text in again
    for wrong, start in ((("tau", *words[1:]), "command line: --folds and --also are for"),
                         ((*words, "folds=4"), "folds: is set by this program"),
                         ((*words, "--also", "x"), "also: expected 'NAME: key=value ...'")):
        code, _, err = run_here(monkeypatch, capsys, reproduce, tmp_path, *wrong)
        assert code == 2 and err.startswith(f"error: {start}")


def test_a_table_is_drawn_elsewhere_from_what_was_collected(tmp_path, monkeypatch, capsys):
    """Without weights and data; FedBN, whose statistics are fixed, and methods of which nothing is sent, among
    the rows; no weights are in the archive."""
    pytest.importorskip("matplotlib")
    start_here(monkeypatch)
    data = write_nuclei(tmp_path / "data", ("a", "b"), cases=4)
    (tmp_path / "c.yaml").write_text(as_yaml(tiny_config(data, tmp_path / "unused", "rounds=1")))
    words = ("--config", "c.yaml", "--seeds", "0", "--methods", "fedavg,fedbn,local,pooled", "local_epochs=1")
    paired_words = ("table", "--out", "o", "--folds", "3", "--name", "bounds", *words)
    code, out, err = run_here(monkeypatch, capsys, reproduce, tmp_path, *paired_words)
    assert code == 0, err
    assert "12 runs, 0 of them finished" in out and re.search(r"about \d+ min of training steps", out)
    assert "0 of 9 scorings with statistics of the case to go" in out  # FedBN has those of the site alone
    text = (tmp_path / "o" / "bounds_paired.md").read_text()
    line = {name: [row for row in text.splitlines() if row.startswith(f"| {name} ")] for name in ("fedbn", "local")}
    assert len({line["fedbn"][i].split("|")[2] for i in (0, 2)}) == 1 and len(line["local"]) == 4
    plain = ("table", "--out", "o", *words)
    assert run_here(monkeypatch, capsys, reproduce, tmp_path, *plain)[0] == 0
    code, out, _ = run_here(monkeypatch, capsys, reproduce, tmp_path, *paired_words, "--collect", "o.tar.gz")
    assert code == 0 and "12 finished of 12 runs" in out
    with tarfile.open(tmp_path / "o.tar.gz") as archive:
        assert not [name for name in archive.getnames() if name.endswith((".pt", ".png"))]
        archive.extractall(tmp_path / "o2", filter="data")
    data.rename(tmp_path / "away")
    code, _, err = run_here(monkeypatch, capsys, reproduce, tmp_path, *("o2" if w == "o" else w for w in paired_words))
    assert code == 0, err
    assert (tmp_path / "o2" / "bounds_paired.md").read_text() == text


def test_runs_that_are_there_are_compared(tmp_path, monkeypatch, capsys):
    """Their seeds and folds are joined, the first is the base; runs that do not belong together are refused."""
    random = np.random.default_rng(0)
    for name, seed, fold in itertools.product(("plain", "other"), (0, 3), (0, 1, 2)):
        run = tmp_path / f"{name}_seed{seed}_fold{fold}"
        run.mkdir()
        method = "fedavg" if name == "plain" else "fedbcs"
        run.joinpath("config.yaml").write_text(as_yaml(tiny_config(
            "d", "o", f"method={method}", f"seed={seed}", "folds=3", f"fold={fold}")))
        rows = [f"{kind},{split},s,p{fold}{i},{random.random() / 2 + (name == 'other') / 2},0.5,0.5,1.0,case"
                for kind, split, i in itertools.product(("best", "last"), ("val", "test"), range(4))]
        (run / "cases.csv").write_text("\n".join(["kind,split,site,case,dice,precision,recall,hd95,statistics", *rows]))
    runs = sorted(map(str, tmp_path.glob("plain*"))) + sorted(map(str, tmp_path.glob("other*")))
    code, out, err = run_here(monkeypatch, capsys, compare, tmp_path, *runs, "--out", "t")
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("| other"))
    assert "| 12 of 12 | < 0.001 |" in line and (tmp_path / "t.md").read_text() in out
    assert "| seeds 0, 3;" not in out and "seeds 0, 3" in out and "difference to plain" in out
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 1 + 2 * 2 * 2 * 12
    for some, start in ((runs[:1], "command line: "), ((runs[0], runs[7]), "cases.csv: the settings were not"),
                        ((runs[0], runs[4], runs[6]), "cases.csv: no patient was tested in every seed"),
                        ((runs[0], "nowhere"), "nowhere/config.yaml: cannot be read")):
        code, _, err = run_here(monkeypatch, capsys, compare, tmp_path, *some)
        assert code == 2 and err.startswith(f"error: {start}") and err.count("\n") == 1
    file = tmp_path / "plain_seed3_fold0" / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.01", "lr: 0.5"))
    code, _, err = run_here(monkeypatch, capsys, compare, tmp_path, *runs)
    assert code == 2 and "differing in lr (0.5, now 0.01)" in err
