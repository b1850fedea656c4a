"""The tables of a comparison: settings x sites, one site left out, and paired differences over folds."""

import statistics
from itertools import product

import numpy as np

from experiments import paired
from experiments.run_grid import by_setting, find_cases, result_of
from rounds.checkpoint import save
from scoring.metrics import MEASURES
from scoring.results import as_table

TABLE_WORDS = """
Test Dice of the round with the best validation, `test_stats: {stats}`, mean ± standard deviation over seeds
{seeds}; difference: the mean, and that of each seed. Sent by a site in a round: weights + prototypes, and
the number of those vectors.
"""
PAIRED_WORDS = """
Test Dice per site: mean over a patient's files, the site's patients, and seeds {seeds}; every patient is
tested once a seed ({folds} folds). Difference to {base}: mean over sites of the paired differences, with a
95 % interval by a bootstrap of patients within sites and of seeds; better: patients whose mean over seeds is
higher; p: Wilcoxon's signed rank. marked: marked over true area. HD95 in the unit of the files. val: the
validation Dice of the same round. FedBN fixes the statistics `site` and is shown with them everywhere.
"""


def markdown(lines):
    """Return rows of cells as a markdown table, the first of them its head."""
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


def publish(file, text, rows):
    """Write FILE.csv of rows {column: value}, and FILE.md; print the latter."""
    save(file.with_suffix(".md"), text.encode())
    save(file.with_suffix(".csv"), as_table(rows, rows[0]))
    print(f"\n{text}")


# ---- Means over seeds ----

def write_table(file, runs, config):
    """Write FILE.md and the tidy FILE.csv, a row a setting, seed and site, or a site's class."""
    results, rows = {}, []
    for name, seeds in by_setting(runs).items():
        results[name] = [result_of(run) for (run,) in seeds]
        for (run,), result in zip(seeds, results[name]):
            for site, scores in result["sites"].items():
                classes = {f"{site}/{j}": of_class for j, of_class in scores.get("classes", {}).items()}
                for place, row in ({site: scores} | classes).items():
                    rows.append({"setting": name, "seed": run.seed, "site": place}
                                | {what: row[what] for what in MEASURES} | result["more"])
    everywhere = {name: found for name, found in results.items() if " without " not in name}
    texts = [table_of_methods(everywhere)]
    if config.classes > 2:
        texts.append(table_of_classes(everywhere))
    if len(everywhere) < len(results):
        texts.append(table_of_held_out(results))
    words = TABLE_WORDS.format(stats=config.test_stats, seeds=", ".join(str(run.seed) for (run,) in seeds))
    publish(file, "\n".join(texts) + words, rows)


def table_of_methods(results):
    """Return the markdown table of {setting: [result of each seed]}: Dice of the sites, and what is sent."""
    dice, more = {}, {}
    for name, found in results.items():
        dice[name] = [[row["dice"] for row in result["sites"].values()] for result in found]
        weights, prototypes, vectors = (statistics.mean(result["more"][what] for result in found)
                                        for what in ("weight_bytes", "prototype_bytes", "prototypes"))
        more[name] = {"val": mean_and_sd(result["more"]["val"] for result in found),
                      "bytes sent": f"{weights / 1e6:.2f} MB + {prototypes / 1e3:.2f} kB",
                      "prototypes": f"{vectors:.1f}"}
    return table_of_dice(["", *found[0]["sites"]], dice, more)


def table_of_held_out(results):
    """Return the markdown table of what each site scores when it is held out."""
    start = "fedavg without "
    sites = [name.removeprefix(start) for name in results if name.startswith(start)]
    dice = {name: list(zip(*([result["sites"][site]["dice"] for result in results[f"{name} without {site}"]]
                             for site in sites))) for name in ("fedavg", "fedbcs")}
    return table_of_dice(["held out", *sites], dice, {name: {} for name in dice})


def table_of_dice(head, dice, more):
    """Return the markdown table of {setting: [[Dice of each site] of each seed]}: the sites, their mean, and
    its difference to that of the first setting. more: {setting: {heading: cell}}."""
    base = next(iter(dice))
    means = {name: np.nanmean(np.array(seeds, float), 1) for name, seeds in dice.items()}
    lines = [[*head, "mean", f"difference to {base}", *more[base]]]
    for name, seeds in dice.items():
        each = means[name] - means[base]
        against = f"{each.mean():+.3f} ({' '.join(f'{d:+.3f}' for d in each)})"
        lines.append([name, *map(mean_and_sd, zip(*seeds)), f"**{mean_and_sd(means[name])}**",
                      "" if name == base else against, *more[name].values()])
    return markdown(lines)


def table_of_classes(results):
    """Return the markdown table of settings x foreground classes, the unweighted mean over sites."""
    lines = [["class", *next(iter(results.values()))[0]["classes"]]]
    for name, found in results.items():
        lines.append([name, *(mean_and_sd(one["classes"][j]["dice"] for one in found) for j in lines[0][1:])])
    return markdown(lines)


def mean_and_sd(values):
    """Return 'mean ± standard deviation' of the values that are there, '-' if none is."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


# ---- Paired differences over folds ----

def kinds_of(config):
    """Return the kinds of statistics that a paired table shows, the config's own first."""
    if config.norm == "group":
        return ["none"]
    return [config.test_stats, *({"site", "case"} - {config.test_stats})]


def write_paired(file, settings, kinds, find=find_cases):
    """Write FILE.md, a table for each kind of statistics and round, and FILE.csv, a row a patient. Returns
    {setting: [[test rows of each fold] of each seed]} that the first table was made of.

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
                 for (site, patient), dice in sorted(paired.of_patients(of_seed, paired.DICE).items())]
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
        row = paired.summary(cases, None if name == base else test[base])
        against = ["", "", ""] if name == base else [
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['better']} of {row['patients']}", "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"]
        val_dice = paired.mean_of_sites(paired.by_site(val[name], paired.DICE))
        lines.append([name, *(f"{dice:.3f}" for dice in row["sites"].values()), f"**{row['dice']:.3f}**",
                      *against, *(f"{row[what]:.2f}" for what in ("precision", "recall", "marked")),
                      f"{row['hd95']:.1f}", f"{val_dice:.3f}"])
    return markdown([["", *row["sites"], "mean", f"difference to {base}", "better", "p", "precision",
                      "recall", "marked", "HD95", "val"], *lines])
