"""Paired differences per patient: their means, intervals and tests, from the cases.csv of runs over folds.

A number of a patient is the mean over the patient's files (and foreground classes); of a site over its
patients; of a setting over sites, unweighted. Every patient is tested once a seed, in one of the folds.
"""

from itertools import product

import numpy as np

from config import BadInput
from experiments.curves import LOOKS, axes, save_figure
from experiments.figures import markdown, publish
from experiments.run_grid import find_cases

DRAWS = 10_000
PAIRED_WORDS = """
Test Dice per site: mean over a patient's files, the site's patients, and seeds {seeds}; every patient is
tested once a seed ({folds} folds). Difference to {base}: mean over sites of the paired differences, with a
95 % interval by a bootstrap of patients within sites and of seeds; better: patients whose mean over seeds is
higher; p: Wilcoxon's signed rank. marked: marked over true area. HD95 in the unit of the files. val: the
validation Dice of the same round. FedBN fixes the statistics `site` and is shown with them everywhere.
"""


def of_patients(tables, measure):
    """Return {(site, patient): mean of a measure} of one seed; tables: the test rows of each fold; measure: a
    function of a row, which may give None. Raises BadInput for a patient that two folds test."""
    found, fold_of = {}, {}
    for fold, rows in enumerate(tables):
        for row in rows:
            key = row["site"], row["case"]
            if fold_of.setdefault(key, fold) != fold:
                raise BadInput(f"cases.csv: patient {key[1]} is tested in two folds, "
                               "give all folds one split")
            if (value := measure(row)) is not None:
                found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def by_site(cases, measure):
    """Return {site: array (S, n)} of a measure: S seeds, n patients in order of their names. cases: [[rows of
    each fold] of each seed]. A patient that some seed has no value of is left out."""
    seeds = [of_patients(folds, measure) for folds in cases]
    keys = sorted(set.intersection(*(set(of_seed) for of_seed in seeds)))
    return {site: np.array([[of_seed[key] for key in keys if key[0] == site] for of_seed in seeds])
            for site in sorted({site for site, _ in keys})}


def mean_of_sites(values):
    """Return the unweighted mean over sites of {site: array (S, n)}."""
    return float(np.mean([of_site.mean() for of_site in values.values()]))


def bootstrap_interval(differences):
    """Return the 95 % interval of `mean_of_sites` of {site: array (S, n)}, by a bootstrap of 10,000 draws.

    A draw takes patients within each site, and seeds, which all sites share, with replacement. Of n it takes
    n - 1, because with n the variance would come out as (n - 1) / n of what it is, and a site may have 3
    patients. Source: percentile bootstrap (2.5 and 97.5 %), rescaled as by Rao and Wu."""
    random, total = np.random.default_rng(0), 0

    def shares(n):
        return random.multinomial(max(1, n - 1), np.full(n, 1 / n), DRAWS) / max(1, n - 1)  # (DRAWS, n)
    of_seeds = shares(len(next(iter(differences.values()))))
    for of_site in differences.values():
        total = total + ((of_seeds @ of_site) * shares(of_site.shape[1])).sum(1)
    low, high = np.quantile(total / len(differences), (0.025, 0.975))
    return float(low), float(high)


def wilcoxon(differences):
    """Return (W, p) of Wilcoxon's signed rank test of paired differences (n,), two-sided.

        W = min(sum of the ranks of positive, of negative differences),  ranks of |d|, ties by their mean

    Zeros are dropped. p is exact: the share of all 2^n signs whose sum is at most W, twice."""
    d = np.asarray(differences, float)
    d = d[d != 0]
    size = abs(d)
    ranks = np.array([(size < x).sum() + ((size == x).sum() + 1) / 2 for x in size])
    W = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    twice = np.rint(2 * ranks).astype(int)  # whole numbers, whatever the ties
    share = np.eye(1, twice.sum() + 1)[0]   # of the signs, by twice their sum of ranks
    for r in twice:
        share = (share + np.pad(share, (r, 0))[:len(share)]) / 2
    return float(W), min(1.0, float(2 * share[:round(2 * W) + 1].sum()))


# ---- What a table shows of a setting ----

def column(name):
    """Return the measure of a column of cases.csv."""
    return lambda row: float(row[name])


def marked_over_true(row):
    """Return |P| / |T| = recall / precision of a case, None where prediction and truth do not overlap."""
    precision, recall = float(row["precision"]), float(row["recall"])
    return recall / precision if precision > 0 and recall > 0 else None


DICE = column("dice")
PAIRED_BY = {"dice": DICE, "precision": column("precision"), "recall": column("recall"),
             "marked": marked_over_true, "hd95": column("hd95")}


def summary(cases, base=None):
    """Return what a setting's cases say: `sites` {site: Dice}, the means of PAIRED_BY, and against a base
    `difference`, `low`, `high`, `better`, `patients`, `p`.

    cases, base: [[rows of each fold] of each seed]; the base's patients are the same ones."""
    found = {name: by_site(cases, measure) for name, measure in PAIRED_BY.items()}
    if not (dice := found["dice"]):
        raise BadInput("cases.csv: no patient was tested in every seed, give all runs one split or folds")
    result = {name: mean_of_sites(values) for name, values in found.items()}
    result["sites"] = {site: float(values.mean()) for site, values in dice.items()}
    if base is not None:
        other = by_site(base, DICE)
        tested, of_base = ([of_patients(folds, DICE).keys() for folds in of] for of in (cases, base))
        if tested != of_base:
            alone = sorted(set().union(*tested) ^ set().union(*of_base))
            example = f" ({' '.join(alone[0])} by one of them alone)" if alone else ""
            raise BadInput(f"cases.csv: the settings were not tested on the same patients and seeds{example}"
                           ", give all of them the same data, splits, folds and seeds")
        differences = {site: dice[site] - other[site] for site in other}
        each = np.concatenate([of_site.mean(0) for of_site in differences.values()])
        low, high = bootstrap_interval(differences)
        result |= {"difference": mean_of_sites(differences), "low": low, "high": high,
                   "better": int((each > 0).sum()), "patients": len(each), "p": wilcoxon(each)[1]}
    return result


# ---- The table and its figure ----

def write_paired(file, settings, kinds, find=find_cases):
    """Print and write to FILE.md a table for each kind of statistics and round, to FILE.csv a row a patient,
    unless file is None. Returns {setting: [[test rows of each fold] of each seed]} of the first table.

    settings: see `by_setting`, the base first; find(run, statistics): the rows of a run's cases."""
    texts, rows, tested = [], [], []
    for stats, kind in product(kinds, ("last", "best")):
        cases = {name: [[find(run, stats) for run in folds] for folds in seeds]
                 for name, seeds in settings.items()}
        test, val = (of_kind(cases, kind, split) for split in ("test", "val"))
        tested.append(test)
        texts.append(f"**{kind} round, statistics: {stats}**\n\n{paired_table(test, val)}")
        rows += [{"setting": name, "seed": folds[0].seed, "statistics": stats, "kind": kind, "site": site,
                  "patient": patient, "dice": f"{dice:.6f}"}
                 for name, seeds in settings.items() for folds, of_seed in zip(seeds, test[name])
                 for (site, patient), dice in sorted(of_patients(of_seed, DICE).items())]
    base = next(iter(settings))
    words = PAIRED_WORDS.format(base=base, folds=len(settings[base][0]),
                                seeds=", ".join(str(folds[0].seed) for folds in settings[base]))
    publish(file, "\n".join(texts) + words, rows)
    return tested[0]


def of_kind(cases, kind, split):
    """Return {setting: [[rows of each fold] of each seed]} of a round, `best` or `last`, and a split."""
    return {name: [[[row for row in rows if (row["kind"], row["split"]) == (kind, split)] for rows in folds]
                   for folds in seeds] for name, seeds in cases.items()}


def paired_table(test, val):
    """Return the markdown table of {setting: test cases} and {setting: validation cases}."""
    base, lines = next(iter(test)), []
    for name, cases in test.items():
        row = summary(cases, None if name == base else test[base])
        against = ["", "", ""] if name == base else [
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['better']} of {row['patients']}", "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"]
        val_dice = mean_of_sites(by_site(val[name], DICE))
        lines.append([name, *(f"{dice:.3f}" for dice in row["sites"].values()), f"**{row['dice']:.3f}**",
                      *against, *(f"{row[what]:.2f}" for what in ("precision", "recall", "marked")),
                      f"{row['hd95']:.1f}", f"{val_dice:.3f}"])
    return markdown([["", *row["sites"], "mean", f"difference to {base}", "better", "p", "precision",
                      "recall", "marked", "HD95", "val"], *lines])


def draw_dots(file, cases):
    """Draw a dot a patient, the mean over seeds of the first setting's Dice against each other setting's.
    cases: {setting: [[rows of each fold] of each seed]}."""
    found = {name: by_site(of_name, DICE) for name, of_name in cases.items()}
    base, *others = found
    if not others:
        return
    figure, (panels,) = axes(len(others), sharey=True)
    for ax, name in zip(panels, others):
        for look, site in zip(LOOKS * len(found[base]), found[base]):
            ax.plot(found[base][site].mean(0), found[name][site].mean(0), **look | {"linestyle": ""},
                    markersize=4, label=site)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.7)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"test Dice, {base}",
               ylabel=f"test Dice, {name}")
    panels[0].legend(fontsize=7)
    save_figure(figure, file.with_suffix(".png"), 200)
