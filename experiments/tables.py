"""The tables of a comparison: settings x sites, one site left out, and paired differences over folds."""

import csv
import statistics

from experiments import paired
from experiments.run_grid import cases_of, result_of
from scoring.metrics import MEASURES

# ---- Means over seeds ----

def write_table(file, runs, config):
    """Write the tidy FILE.csv, a row a setting, seed and site, and FILE.md; print the latter."""
    results = {(run.setting, run.seed): result_of(run) for run in runs}
    seeds = sorted({run.seed for run in runs})
    extra = ("val", "round", "weight_bytes", "prototype_bytes", "prototypes")
    with open(file.with_suffix(".csv"), "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["setting", "seed", "site", *MEASURES, *extra])
        for (setting, seed), result in results.items():
            writer.writerows([setting, seed, site, *(scores[name] for name in MEASURES),
                              *(result[name] for name in extra)]
                             for of_site, row in result["sites"].items()
                             for site, scores in by_class(of_site, row))
    names = list(dict.fromkeys(run.setting for run in runs if " without " not in run.setting))
    text = table_of_methods(names, results, seeds)
    if config.classes > 2:
        text += "\n" + table_of_classes(names, results, seeds)
    if len(names) < len({run.setting for run in runs}):
        text += "\n" + table_of_held_out(results, seeds)
    text += (f"\nTest Dice of the round with the best validation, `test_stats: {config.test_stats}`, "
             f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; difference: "
             "the mean, and that of each seed. Sent by a site in a round: weights + prototypes, "
             "and the number of those vectors.\n")
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten: {file.with_suffix('.md')}, {file.with_suffix('.csv')}")


def table_of_methods(names, results, seeds):
    """Return the markdown table of settings x sites, the difference being to the first of them."""
    base = "fedavg" if "fedavg" in names else names[0]
    sites = list(results[base, seeds[0]]["sites"])
    lines = [["", *sites, "mean", f"difference to {base}", "val", "bytes sent", "prototypes"]]
    for name in names:
        found = [results[name, seed] for seed in seeds]
        cells = [spread([r["sites"][site]["dice"] for r in found]) for site in sites]
        means = [r["dice"] for r in found]
        sent = {kind: statistics.mean(r[kind] for r in found)
                for kind in ("weight_bytes", "prototype_bytes", "prototypes")}
        size = f"{sent['weight_bytes'] / 1e6:.2f} MB + {sent['prototype_bytes'] / 1e3:.2f} kB"
        lines.append([name, *cells, f"**{spread(means)}**",
                      "" if name == base else differences(means, [results[base, s]["dice"]
                                                                  for s in seeds]),
                      spread([r["val"] for r in found]), size, f"{sent['prototypes']:.1f}"])
    return markdown(lines)


def by_class(site, row):
    """Return a site's row under its name, and of several foreground classes each one's as SITE/CLASS."""
    return [(site, row), *((f"{site}/{j}", of_class) for j, of_class in row.get("classes", {}).items())]


def table_of_classes(names, results, seeds):
    """Return the markdown table of settings x foreground classes, the unweighted mean over sites."""
    sites = [row for row in results[names[0], seeds[0]]["sites"].values() if row["cases"]]
    lines = [["class", *sites[0]["classes"]]]
    for name in names:
        dice = [[statistics.mean(row["classes"][j]["dice"] for row in results[name, seed]["sites"].values()
                                 if row["cases"]) for seed in seeds] for j in lines[0][1:]]
        lines.append([name, *(spread(of_class) for of_class in dice)])
    return markdown(lines)


def table_of_held_out(results, seeds):
    """Return the markdown table of what each site scores when it is held out."""
    sites = [name.removeprefix("fedavg without ") for name, seed in results
             if seed == seeds[0] and name.startswith("fedavg without ")]
    dice, lines = {}, [["held out", *sites, "mean", "difference to fedavg"]]
    for name in ("fedavg", "fedbcs"):
        for seed in seeds:
            dice[name, seed] = [results[f"{name} without {site}", seed]["sites"][site]["dice"]
                                for site in sites]
        cells = [spread(column) for column in zip(*(dice[name, seed] for seed in seeds))]
        means, base = ([statistics.mean(dice[who, seed]) for seed in seeds]
                       for who in (name, "fedavg"))
        lines.append([name, *cells, f"**{spread(means)}**",
                      "" if name == "fedavg" else differences(means, base)])
    return markdown(lines)


def spread(values):
    """Return 'mean ± standard deviation' of the values that are there, '-' if none is."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def differences(values, base):
    """Return 'mean (each)' of the paired differences."""
    each = [a - b for a, b in zip(values, base)]
    return f"{statistics.mean(each):+.3f} ({' '.join(f'{d:+.3f}' for d in each)})"


def markdown(lines):
    """Return rows of cells as a markdown table, the first of them its head."""
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


# ---- Paired differences over folds ----

def write_paired(file, runs, config):
    """Write FILE.md, a table for each kind of round and statistics, and FILE.csv, a row a patient; print
    the former. Returns the tidy rows."""
    names = list(dict.fromkeys(run.setting for run in runs))
    base = "fedavg" if "fedavg" in names else names[0]
    kinds = ["none"] if config.norm == "group" else \
        [config.test_stats, *({"site", "case"} - {config.test_stats})]
    texts, rows = [], []
    for stats in kinds:
        for kind in ("last", "best"):
            found = {name: grouped(runs, name, kind, "test", stats) for name in names}
            val = {name: paired.mean_of_sites(paired.by_site([
                paired.of_patients(folds, paired.number("dice"))
                for folds in grouped(runs, name, kind, "val", stats)])) for name in names}
            rows += [(name, seed, stats, kind, *key, f"{dice:.6f}") for name in names
                     for seed, folds in zip(seeds_of(runs), found[name])
                     for key, dice in sorted(paired.of_patients(folds, paired.number("dice")).items())]
            table = paired_table(found, val, base)
            texts.append(f"**{kind} round, statistics: {stats}**\n\n{table}")
    text = "\n".join(texts) + PAIRED_WORDS.format(base=base, folds=len({run.fold for run in runs}),
                                                  seeds=", ".join(map(str, seeds_of(runs))))
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    with open(file.with_suffix(".csv"), "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([("setting", "seed", "statistics", "kind", "site", "patient", "dice"), *rows])
    print(f"\n{text}\nwritten: {file.with_suffix('.md')}, {file.with_suffix('.csv')}")
    return rows


PAIRED_WORDS = """
Test Dice per site: mean over a patient's files, the site's patients, and seeds {seeds}; every patient is
tested once a seed ({folds} folds). Difference to {base}: mean over sites of the paired differences, with a
95 % interval by a bootstrap of patients within sites and of seeds; better: patients whose mean over seeds is
higher; p: Wilcoxon's signed rank. marked: marked over true area. HD95 in the unit of the files. val: the
validation Dice of the same round.
"""


def seeds_of(runs):
    """Return the seeds of runs, sorted."""
    return sorted({run.seed for run in runs})


def grouped(runs, name, kind, split, stats):
    """Return the cases of a setting, [[rows of each fold] of each seed]."""
    return [[cases_of(run, kind, split, stats) for run in runs if (run.setting, run.seed) == (name, seed)]
            for seed in seeds_of(runs)]


def paired_table(found, val, base):
    """Return the markdown table of {setting: cases}; val: {setting: validation Dice}."""
    ends = ("mean", f"difference to {base}", "better", "p", "precision", "recall", "marked", "HD95", "val")
    lines = []
    for name, cases in found.items():
        row = paired.summary(cases, None if name == base else found[base])
        if not lines:
            lines.append(["", *row["sites"], *ends])
        against = ["", "", ""] if name == base else [
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['better']} of {row['patients']}", f"{row['p']:.3f}"]
        lines.append([
            name, *(f"{dice:.3f}" for dice in row["sites"].values()), f"**{row['dice']:.3f}**", *against,
            *(f"{row[what]:.2f}" for what in ("precision", "recall", "marked")), f"{row['hd95']:.1f}",
            f"{val[name]:.3f}"])
    return markdown(lines)
