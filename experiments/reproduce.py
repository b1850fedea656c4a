"""The paper's comparisons: python -m experiments.reproduce table --config config.yaml [key=value ...]

  table        methods x sites, mean and spread over seeds, what is sent, and one site left out
  ablation     neither, FSR alone, prototypes alone, both
  tau          Dice over temperatures, with FedAvg as the base            (needs matplotlib)
  convergence  validation Dice per round of all methods                   (needs matplotlib)
  style        does style bias accumulate over layers, who removes it     (needs matplotlib):
               networks trained on your data, shown generated scenes in generated styles
  pictures     image, truth and every method's prediction, errors coloured, of the first seed

What a comparison needs is trained first, settings x seeds, each in a folder of --out: finished runs
are skipped, broken ones resumed. Then it is drawn, as --out/COMPARISON.md, .csv or .png.
"""

import argparse
import csv
import re
import signal
import statistics
import sys
from pathlib import Path

import yaml

from config import METHODS, BadInput, as_yaml, load_config
from experiments import figures
from experiments.run_grid import Run, result_of, train_all
from rounds.run_folder import check_same_config
from scoring.metrics import MEASURES
from settings.program import Parser, run_program
from sites import demo_data
from sites.layouts import list_files

TAUS = (0.005, 0.02, 0.1, 0.4)
SET_HERE = {"method": "--methods", "seed": "--seeds", "out": "--out", "resume": "--out",
            "hold_out": "the comparison table"}


# ---- Which runs a comparison needs ----

def settings_of(comparison, config, methods, sites, own=()):
    """Return {setting: overrides} of a comparison. FedBCS is the config as it stands.

    own: key=value of the methods' own keys, such as fpl_tau, each for its method alone. Raises
    BadInput if the config has switched off what is compared.
    """
    off = {"fsr": config.fsr == "none", "prototype_weight": config.prototype_weight == 0}
    for key in {"ablation": ("fsr", "prototype_weight"), "tau": ("prototype_weight",),
                "style": ("fsr",)}.get(comparison, ()):
        if off[key]:
            raise BadInput(f"{key}: is off and {comparison} is about it, leave it out or set it on")
    by_method = {method: [f"method={method}", *(text for text in own if text.startswith(f"{method}_"))]
                 for method in methods}
    base, ours = {"fedavg": ["method=fedavg"]}, {"fedbcs": ["method=fedbcs"]}
    fsr, prototypes = {"fsr": ["prototype_weight=0"]}, {"prototypes": ["fsr=none"]}
    if comparison == "table":
        both = ("fedavg", "fedbcs") if {"fedavg", "fedbcs"} <= by_method.keys() else ()
        return by_method | {f"{method} without {site}": [f"method={method}", f"hold_out={site}"]
                            for method in both for site in (sites if len(sites) > 1 else ())}
    if comparison == "ablation":
        return base | fsr | prototypes | ours
    if comparison == "tau":
        values = {tau: f"tau={tau}" for tau in sorted({*TAUS, config.tau})}
        return base | {name: [name] for tau, name in values.items() if tau != config.tau} | ours
    if comparison == "style":
        return base | {"input_norm": ["method=input_norm"]} | fsr
    return by_method


def runs_of(settings, seeds, out):
    """Return the Runs of all settings and seeds, seed by seed."""
    return [Run(name, seed, out / re.sub(r"[^\w.=-]+", "_", f"{name}_seed{seed}"),
                [*overrides, f"seed={seed}"])
            for seed in seeds for name, overrides in settings.items()]


def check_run(run, base):
    """Raise BadInput if the settings of a run are wrong, or its folder holds a run of other ones."""
    config = load_config(base, [*run.overrides, f"out={run.folder}"])
    file = run.folder / "config.yaml"
    if file.exists():
        saved = load_config(file)
        check_same_config(file, vars(saved), vars(config))
        if saved.rounds > config.rounds:
            raise BadInput(f"{file}: is a run of {saved.rounds} rounds, more than {config.rounds}; "
                           "choose another --out")


# ---- Tables ----

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


# ---- The program ----

def draw(comparison, runs, config, out):
    """Write a comparison's table or figure from its finished runs."""
    if comparison in ("table", "ablation", "tau"):
        write_table(out / comparison, runs, config)
    if comparison in figures.DRAW:
        file = out / f"{comparison}.png"
        figures.DRAW[comparison](runs, config, file)
        print(f"written: {file}")


def check_matplotlib(comparison):
    """Raise BadInput if a comparison's plot needs matplotlib and there is none."""
    if comparison in ("tau", "convergence", "style"):
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise BadInput("matplotlib: is not installed and this plot needs it; "
                           "pip install -r requirements-extra.txt") from None


def base_config(file, overrides, out):
    """Return the settings that all runs share; raises BadInput for one that this program sets."""
    if (out / "splits.json").exists():
        raise BadInput(f"{out}: is the folder of one run, choose another --out")
    for argument in overrides:
        key = argument.partition("=")[0]
        if key in SET_HERE:
            raise BadInput(f"{key}: is set by this program, leave it out; see {SET_HERE[key]}")
    config = load_config(file, [*overrides, f"out={out}"])
    if config.method != "fedbcs" or config.hold_out:
        raise BadInput(f"{file}: has a method or hold_out of its own, which this program sets; "
                       "remove it")
    return config


def main():
    """Train what the comparison needs and draw it."""
    comparisons = ("table", "ablation", "tau", "convergence", "style", "pictures")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=comparisons)
    parser.add_argument("--config", required=True, help="YAML file; its settings are FedBCS's")
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS), help="of table, convergence and "
                        "pictures, default all; FILE.py:FUNCTION too")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, default 1; they share "
                        "the cores, and the number of threads can change last digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="for all runs; a method's own key, such as fpl_tau, for its runs")
    given = parser.parse_intermixed_args()
    if given.jobs < 1 or not re.fullmatch(r"\d+(,\d+)*", given.seeds):
        raise BadInput("command line: write for example --seeds 0,1,2 --jobs 2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings end with it
    out, methods = Path(given.out).expanduser(), given.methods.split(",")
    own = [text for text in given.overrides if text.startswith(tuple(f"{m}_" for m in METHODS))]
    config = base_config(given.config, [text for text in given.overrides if text not in own], out)
    folder = demo_data.ensure(config.task) if config.data == "demo" else config.data
    sites, problems = list_files(folder, config.task, config.case_pattern)
    if problems:
        raise BadInput(problems[0])
    settings = settings_of(given.comparison, config, methods, list(sites), own)
    seeds = sorted({int(seed) for seed in given.seeds.split(",")})
    runs = runs_of(settings, seeds[:1] if given.comparison == "pictures" else seeds, out)
    for run in runs:
        check_run(run, yaml.safe_load(as_yaml(config)))
    check_matplotlib(given.comparison)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(as_yaml(config))
    train_all(runs, out / "config.yaml", config.rounds, given.jobs)
    draw(given.comparison, runs, config, out)


if __name__ == "__main__":
    run_program(main)
