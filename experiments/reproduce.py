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

With --folds K, table and ablation test every patient once a seed and compare patient by patient:
--out/COMPARISON_paired.md, .csv, and .png, a dot a patient (needs matplotlib).

It can be ended at any moment. The same command goes on with what --out has, also elsewhere if that folder
was moved there and data is a path that is right in both places. --collect FILE.tar.gz packs what the tables
need, without weights: unpacked as --out, the same command draws them again, without the data.
"""

import json
import re
import shlex
import signal
import sys
from itertools import product
from pathlib import Path

import yaml

from config import KEYS, METHODS, BadInput, as_yaml, load_config
from experiments import figures, paired
from experiments.run_grid import Training, by_setting, collect, score_all, train_all
from rounds.reading import FREE_ON_RESUME, check_same_config
from settings.program import Parser, run_program
from sites import demo_data
from sites.layouts import list_files

# What writes a comparison's files: functions of (file without its ending, finished runs, config)
DRAW = {"table": figures.write_means, "ablation": figures.write_means, "tau": figures.write_tau,
        "convergence": figures.draw_convergence, "style": figures.draw_style,
        "pictures": figures.draw_pictures}
TAUS = (0.005, 0.02, 0.1, 0.4)
# Settings and their overrides; FedBCS is the config as it stands
COMPARED = {"ablation": {"fedavg": ["method=fedavg"], "fsr": ["prototype_weight=0"],
                         "prototypes": ["fsr=none"], "fedbcs": ["method=fedbcs"]},
            "style": {"fedavg": ["method=fedavg"], "input_norm": ["method=input_norm"],
                      "fsr": ["prototype_weight=0"]}}
SET_HERE = {"method": "--methods", "seed": "--seeds", "out": "--out", "resume": "--out",
            "hold_out": "the comparison table", "folds": "--folds", "fold": "--folds"}


def settings_of(comparison, config, methods, sites, own=()):
    """Return {setting: overrides} of a comparison. own: the methods' own key=value, such as fpl_tau, each for
    its method alone."""
    if comparison == "tau":
        taus = {f"tau={tau}": [f"tau={tau}"] for tau in TAUS if tau != config.tau}
        return {"fedavg": ["method=fedavg"]} | taus | {"fedbcs": ["method=fedbcs"]}
    if comparison in COMPARED:
        return COMPARED[comparison]
    found = {method: [f"method={method}", *(text for text in own if text.startswith(f"{method}_"))]
             for method in methods}
    if comparison == "table" and {"fedavg", "fedbcs"} <= found.keys() and len(sites) > 1:
        found |= {f"{method} without {site}": [f"method={method}", f"hold_out={site}"]
                  for method, site in product(("fedavg", "fedbcs"), sites)}
    return found


def setting(text):
    """Return the name and the overrides of the setting 'NAME: key=value key=value'; raises BadInput."""
    name, _, keys = (part.strip() for part in text.partition(":"))
    if not name or not keys:
        raise BadInput(f"also: expected 'NAME: key=value ...', not {text!r}")
    return name, shlex.split(keys)


def runs_of(settings, seeds, out, base, folds=None):
    """Return the trainings of all settings, seeds and folds, seed by seed and fold by fold; base: the config
    that all share. Raises BadInput for wrong settings, or where a folder holds a run of others."""
    found, shared = [], yaml.safe_load(as_yaml(base))
    for seed, fold, name in product(seeds, range(folds or 1), settings):
        folder = out / re.sub(r"[^\w.=-]+", "_", f"{name}_seed{seed}" + (f"_fold{fold}" if folds else ""))
        words = [*settings[name], f"seed={seed}", *([f"folds={folds}", f"fold={fold}"] if folds else []),
                 f"out={folder}"]
        config, file = load_config(shared, words), folder / "config.yaml"
        if file.exists():
            saved = load_config(file)
            fixed = {"data", "splits"} | ({"rounds"} if saved.rounds > config.rounds else set())
            check_same_config(file, vars(saved), vars(config), FREE_ON_RESUME - fixed)
        found.append(Training(name, seed, folder, words, config))
    return found


def base_config(file, overrides, out):
    """Return the settings that all runs share; raises BadInput for one that this program sets."""
    if (out / "splits.json").exists():
        raise BadInput(f"{out}: is the folder of one run, choose another --out")
    config = load_config(file, [*overrides, f"out={out}"])
    given = [text.partition("=")[0] for text in overrides]
    given += ["method"] if config.method != "fedbcs" else ["hold_out"] if config.hold_out else []
    for key in given:
        if key in SET_HERE:
            raise BadInput(f"{key}: is set by this program, leave it out; see {SET_HERE[key]}")
    return config


def site_names(config, out):
    """Return the sites' names: of the data, or of runs in `out` that came without them; raises BadInput."""
    folder = demo_data.ensure(config.task) if config.data == "demo" else Path(config.data)
    if not folder.exists() and (result := next(out.glob("*/result.json"), None)):
        return sorted(json.loads(result.read_text())["last"]["test"]["sites"])
    sites, problems = list_files(folder, config.task, config.case_pattern)
    if problems:
        raise BadInput(problems[0])
    return list(sites)


def command_line():
    """Return what the command line says; raises BadInput."""
    parser = Parser(description=__doc__)
    parser.add_argument("comparison", choices=DRAW)
    parser.add_argument("--config", required=True, help="YAML file; its settings are FedBCS's")
    parser.add_argument("--out", default="runs/reproduce", metavar="FOLDER")
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS),
                        help="of table, convergence and pictures, default all; FILE.py:FUNCTION too")
    parser.add_argument("--folds", type=int, metavar="K", help="of table, ablation: test every patient once")
    parser.add_argument("--also", action="append", default=[], type=setting, metavar="'NAME: key=value ...'",
                        help="of table and ablation: another setting; may be given several times")
    parser.add_argument("--name", help="of the files written to --out, default COMPARISON")
    parser.add_argument("--collect", metavar="FILE.tar.gz", help="train and draw nothing: pack the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, default 1; they share "
                        "the cores, and the number of threads can change last digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="for all runs; a method's own key, such as fpl_tau, for its runs")
    given = parser.parse_intermixed_args()
    if given.jobs < 1 or not re.fullmatch(r"\d+(,\d+)*", given.seeds):
        raise BadInput("command line: write for example --seeds 0,1,2 --jobs 2")
    if (given.folds or given.also) and given.comparison not in ("table", "ablation"):
        raise BadInput("command line: --folds and --also are for table and ablation")
    return given


def main():
    """Train what the comparison needs and draw it."""
    given = command_line()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the trainings end with it
    out = Path(given.out).expanduser()
    own = [text for text in given.overrides if text.partition("=")[0] not in KEYS
           and text.startswith(tuple(f"{m}_" for m in METHODS))]
    config = base_config(given.config, [text for text in given.overrides if text not in own], out)
    settings = settings_of(given.comparison, config, given.methods.split(","),
                           [] if given.folds else site_names(config, out), own) | dict(given.also)
    seeds = sorted({int(seed) for seed in given.seeds.split(",")})
    runs = runs_of(settings, seeds[:1] if given.comparison == "pictures" else seeds, out, config, given.folds)
    if given.folds or given.comparison in ("tau", "convergence", "style"):
        figures.axes()  # it says if there is no matplotlib, before hours of training
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(as_yaml(config))
    if given.collect:
        collect(runs, out / "config.yaml", Path(given.collect).expanduser())
        return
    train_all(runs, out / "config.yaml", given.jobs)
    name = given.name or given.comparison
    if given.folds:
        stats, file = config.test_stats, out / f"{name}_paired"
        kinds = [stats, *({"site", "case"} - {stats})] if stats else ["none"]  # group norm has no statistics
        score_all(runs, kinds, given.jobs)
        paired.draw_dots(file, paired.write_paired(file, by_setting(runs), kinds))
    else:
        DRAW[given.comparison](out / name, runs, config)
    print(f"written to {out}")


if __name__ == "__main__":
    run_program(main)
