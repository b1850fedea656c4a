"""Settings: one table of every key, and one function that reads them for every program."""

import difflib
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import yaml

import settings.kinds as kind
from settings.kinds import REQUIRED, BadInput, PlainLoader

# Every method: where its function stands. The file may also have SETTINGS, keys of its own in the
# form of KEYS, and FIXED, the switches that the method sets.
METHODS = {name: f"methods/{name}.py:{name}" for name in (
    "fedavg", "fedprox", "fedbn", "harmofl", "fpl", "fedplvm", "feduv", "input_norm", "released",
    "local", "pooled")} | {"fedbcs": "federated.py:fedbcs"}


def method_name(value):
    """The kind: a method of this project, or FILE.py:FUNCTION."""
    if isinstance(value, str) and value in METHODS:
        return value
    if not isinstance(value, str) or not re.fullmatch(r".+\.py:[A-Za-z_]\w*", value):
        raise ValueError("expected " + " or ".join(METHODS) + " or FILE.py:FUNCTION")
    return kind.path(value)


VOLUMES = ("prostate", "volumes")  # the tasks whose files are volumes
PLAIN = {"fsr": "none", "prototype_weight": 0.0}  # what a method of one's own starts from

KEYS = {  # key: (kind, default, help)
    "task": (kind.choice("nuclei", "prostate", "images", "volumes"), REQUIRED,
             "nuclei: 2-D images of cells; prostate: MRI volumes; images, volumes: of any other organ"),
    "data": (kind.path, REQUIRED, "folder with one folder a site, a table FILE.csv, or demo: generated"),
    "out": (kind.or_none(kind.path), None, "run folder; none: runs/ + the name of the config file"),
    "classes": (kind.whole(2, most=255), 2, "2: labels above 0 are merged; K: labels are 0 to K - 1"),
    "class_names": (kind.or_none(kind.names), None, "names of the classes, background first or left out"),
    "method": (method_name, "fedbcs", "one of METHODS, or FILE.py:FUNCTION of your own"),
    "hold_out": (kind.or_none(kind.text), None, "site that does not train; all of its cases test"),
    "rounds": (kind.whole(1), 400, "communication rounds"),
    "local_epochs": (kind.whole(1), 1, "passes over its own images that a site makes in a round"),
    "batch_size": (kind.whole(1, most=100000), 6, "images in a training step"),
    "optimizer": (kind.choice("sgd", "adam"), "sgd", "sgd (momentum 0) or adam, state kept at the site"),
    "lr": (kind.number(above=0), 0.01, "learning rate, without a schedule"),
    "weight_decay": (kind.number(least=0), 1e-4, "weight decay of the optimizer"),
    "image_size": (kind.whole(32, multiple=16, most=16384), 256, "side in pixels of the square input"),
    "window": (kind.or_none(kind.interval), None, "of volumes: values [low, high] that become 0 and 1"),
    "tiles": (kind.flag, False, "true: images keep their own size, image_size is cut out of them"),
    "width": (kind.whole(1, most=4096), 32, "channels of the first level; they double at each deeper one"),
    "levels": (kind.level_list, [0, 1, 2], "shallow levels whose features are fused and aligned"),
    "fsr": (kind.choice("none", "global", "adaptive"), "global", "style recalibration weights"),
    "norm": (kind.choice("batch", "group"), "batch", "norm layer: batch, or group (8 groups of an image)"),
    "prototype_weight": (kind.number(least=0), 1.0, "mu, the weight of L_MP; 0: no prototypes at all"),
    "tau": (kind.number(above=0), 0.1, "temperature of the contrastive loss"),
    "contrast_clip": (kind.flag, False, "clip the contrastive loss as the released code does"),
    "weights": (kind.choice("samples", "equal"), "samples", "a site's share in the average of weights"),
    "sites_per_round": (kind.or_none(kind.whole(1)), None, "number of sites, drawn anew, for each round"),
    "seed": (kind.whole(0, most=2**63 - 1), 0, "seed of initial weights, splits, shuffling and augmentation"),
    "device": (kind.device_name, "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N"),
    "deterministic": (kind.flag, False, "true: the same bits in every run on one GPU, more slowly"),
    "graph": (kind.flag, False, "true: a training step is one CUDA graph; for a GPU"),
    "amp": (kind.or_none(kind.choice("bf16")), None, "bf16: mixed precision; losses stay float32"),
    "resume": (kind.flag, False, "true: go on from the run folder's last.pt, or begin if there is none"),
    "init": (kind.or_none(kind.path), None, "best.pt or last.pt of another run, to start from its weights"),
    "leave_out": (kind.or_none(kind.names), None, "list of sites in data that take no part at all"),
    "splits": (kind.or_none(kind.path), None, "splits.json to use; none: split by cases with the seed"),
    "folds": (kind.or_none(kind.whole(3)), None, "K of K-fold cross-validation; none: one 60/20/20 split"),
    "fold": (kind.whole(0), 0, "with folds: this fold (from 0) tests, the next one validates"),
    "case_pattern": (kind.or_none(kind.pattern), None, "regular expression on file names, group 1: patient"),
    "eval_every": (kind.whole(1), 1, "validate every so many rounds, and after the last"),
    "eval_slices": (kind.choice("all", "foreground"), "all", "score volumes, or slices with organ"),
    "test_stats": (kind.or_none(kind.choice("site", "case")), "case",
                   "whose batch-norm statistics a prediction uses; norm: group has none"),
    "keep_largest": (kind.flag, False, "true: of each class found, its largest connected part (organs)"),
}

DEFAULTS = {key: default for key, (_, default, _) in KEYS.items()}


def method_module(method):
    """Return the module of a method and its function's name; raises BadInput for what cannot be imported."""
    file, _, name = METHODS.get(method, method).rpartition(":")
    if method in METHODS:
        return importlib.import_module(file.removesuffix(".py").replace("/", ".")), name
    from settings.from_file import import_file  # a run of this project's methods does not load it
    return import_file(file, name), name


def all_keys():
    """Return {title: keys in the form of KEYS}: those of every run, and of each method that has its own."""
    own = {f"method {name}": getattr(method_module(name)[0], "SETTINGS", {}) for name in METHODS}
    return {"key": KEYS} | {title: keys for title, keys in own.items() if keys}


def read_value(key, value, keys, method):
    """Return the typed value of one of `keys`; raises BadInput for an unknown key or a wrong value."""
    if key not in keys:
        owner = str(key)[:80].partition("_")[0]
        if owner in METHODS and key in getattr(method_module(owner)[0], "SETTINGS", {}):
            raise BadInput(f"{key}: is read by method: {owner} only, not by {method}; "
                           "leave it out or choose that method")
        near = difflib.get_close_matches(str(key)[:80], keys, n=1, cutoff=0)
        raise BadInput(f"{str(key)[:80]}: unknown key, the nearest is '{near[0]}'")
    read, default, _ = keys[key]
    try:
        return read(value)
    except ValueError as problem:
        hint = " or none" if default is None else ""
        raise BadInput(f"{key}: {problem}{hint}, not {kind.shown(value)}; mend it in the config file "
                       "or on the command line") from None


def read_override(argument):
    """Return (key, value) of one `key=value` argument, its value read as YAML unless it is text."""
    key, equals, value = argument.partition("=")
    if not equals:
        raise BadInput(f"{argument[:80]}: not of the form key=value, write for example rounds=10")
    if key in ("data", "out", "splits", "init", "case_pattern", "hold_out"):  # there [a-z] is not a list
        return key, value
    try:
        return key, yaml.load(value, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise BadInput(f"{key[:80]}: cannot read {kind.shown(value)}, write for example "
                       "levels=[0,2]") from None


def read_yaml(file):
    """Return the mapping in a YAML file; raises BadInput if there is none."""
    if Path(file).exists() and not Path(file).is_file():
        raise BadInput(f"{file}: is no regular file, name a file of settings")
    try:
        settings = yaml.load(Path(file).read_text(encoding="utf-8"), PlainLoader)
    except OSError as problem:
        raise BadInput(f"{file}: cannot be read ({problem.strerror}), name another") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise BadInput(f"{file}: is not YAML, mend it: {reason}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{file}: holds no 'key: value' lines, start from a copy of config.yaml")
    return settings


def load_config(file, overrides=()):
    """Return all settings, typed and resolved, as attributes (`config.lr`).

    file: YAML file, or a mapping that has `out`; overrides: `key=value` texts, which win. A method named by
    an override sets its switches (such as fsr) against the file, but not against another override. Raises
    BadInput for an unreadable file, an unknown, missing, ill-typed or contradictory key."""
    given = file if isinstance(file, dict) else read_yaml(Path(kind.path(str(file))))
    changed = dict(map(read_override, overrides))
    method = read_value("method", (DEFAULTS | given | changed)["method"], KEYS, None)
    module, _ = method_module(method)
    keys, fixed = KEYS | getattr(module, "SETTINGS", {}), getattr(module, "FIXED", {})
    given, changed = ({key: read_value(key, value, keys, method) for key, value in part.items()}
                      for part in (given, changed))
    switches = fixed if method in METHODS else PLAIN | fixed
    values = {key: default for key, (_, default, _) in keys.items()} | switches | given
    values |= (switches if "method" in changed else {}) | changed
    if method not in METHODS and "method" in changed and (own := switches.keys() - changed.keys()):
        shown = ", ".join(f"{key}: {switches[key]}" for key in sorted(own))
        print(f"method: {method} sets {shown}, whatever the config file says")
    if missing := [key for key, value in values.items() if value is REQUIRED]:
        raise BadInput(f"{missing[0]}: missing, add it to {file}: {keys[missing[0]][2]}")
    if values["norm"] == "group" and "test_stats" not in (changed if "norm" in changed else given | changed):
        values["test_stats"] = None
    values["out"] = values["out"] or str(Path("runs") / Path(file).stem)
    values["class_names"] = all_names(values["class_names"], values["classes"])
    check_contradictions(values, fixed)
    return SimpleNamespace(**values)


def all_names(given, classes):
    """Return the names of all classes, background among them, or None; raises BadInput for too few."""
    if given is None or len(given) == classes:
        return given
    if len(given) != classes - 1:
        raise BadInput(f"class_names: names {len(given)} classes of the {classes} of the key classes; name "
                       f"{classes - 1}, or {classes} with background as the first")
    return ["background", *given]


def class_name(config, j):
    """Return what class j is called in tables: its name if it has one, else its number."""
    return config.class_names[j] if config.class_names else str(j)


def check_contradictions(values, fixed):
    """Raise BadInput for keys that contradict each other; fixed: the switches of the method."""
    method = values["method"]
    for key in fixed:
        if values[key] != fixed[key]:
            raise BadInput(f"{key}: {values[key]} contradicts method: {method}, which is {key}: "
                           f"{fixed[key]}; leave {key} out or choose another method")
    if values["fold"] >= (values["folds"] or 1):
        raise BadInput(f"fold: {values['fold']} is not below folds: {values['folds'] or 'none'}; folds count "
                       "from 0, set both")
    if values["folds"] and values["splits"]:
        raise BadInput("folds: contradicts splits, which already says who tests; set one to none")
    if (values["norm"] == "group") != (values["test_stats"] is None):
        raise BadInput("test_stats: means nothing with norm: group, which has no statistics; leave it out"
                       if values["norm"] == "group" else
                       "test_stats: none is for norm: group, set it to site or case")
    if values["tiles"] and values["task"] in VOLUMES:
        raise BadInput(f"tiles: true is for images, set it to false for task: {values['task']}")
    for key, off in (("eval_slices", "all"), ("window", None)):
        if values[key] != off and values["task"] not in VOLUMES:
            raise BadInput(f"{key}: {values[key]} is for volumes, set it to {off or 'none'} for task: "
                           f"{values['task']}")


def as_yaml(config):
    """Return the settings as text that `load_config` reads back, with the word none for off."""
    written = {key: "none" if value is None else value for key, value in vars(config).items()}
    return yaml.safe_dump(written, sort_keys=False, default_flow_style=None)
