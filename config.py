"""Settings: one table of every key, and one function that reads them for every program."""

import argparse
import difflib
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml


class BadInput(Exception):
    """What a user gave cannot be used; the text reads `FILE or KEY: what is wrong, what to do`."""


REQUIRED = object()


# A kind takes a value from YAML and returns it typed, or raises ValueError saying what it wants.
def choice(*words):
    """Return the kind: one of the words."""
    def read(value):
        if value not in words:
            raise ValueError("expected " + " or ".join(words))
        return value
    return read


def text(value):
    """The kind: text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected text (put quotes around a number)")
    return value


def flag(value):
    """The kind: true or false."""
    if type(value) is not bool:
        raise ValueError("expected true or false")
    return value


def number(least=-math.inf, above=-math.inf):
    """Return the kind: a finite number of at least `least`, above `above`."""
    def read(value):
        try:  # YAML 1.1 reads 1e-4 as text, so text that is a number counts as one
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if not math.isfinite(result) or result < least or result <= above:
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}"
            raise ValueError("expected a number" + bound)
        return result
    return read


def whole(least, multiple=1):
    """Return the kind: a whole number of at least `least`, a multiple of `multiple`."""
    def read(value):
        if type(value) is not int or not least <= value < 2**63 or value % multiple:
            rule = f" and a multiple of {multiple}" if multiple > 1 else ""
            raise ValueError(f"expected a whole number of at least {least}{rule}")
        return value
    return read


def or_none(kind):
    """Return the kind: `none`, which is None, or another kind."""
    def read(value):
        return None if value == "none" else kind(value)
    return read


def level_list(value):
    """The kind: a list of the levels that are aligned."""
    if not isinstance(value, list) or not value or any(type(k) is not int for k in value) \
            or not set(value) <= {0, 1, 2} or len(set(value)) < len(value):
        raise ValueError("expected a list of at least one of the levels 0, 1, 2, such as [0, 1, 2]")
    return sorted(value)


def pattern(value):
    """The kind: a regular expression with a group 1."""
    try:
        groups = re.compile(text(value)).groups
    except re.error as problem:
        raise ValueError(f"is no regular expression ({problem})") from None
    if not groups:
        raise ValueError("expected a regular expression whose group 1, in (), is the case")
    return value


def method_name(value):
    """The kind: a method of this project, or FILE.py:FUNCTION."""
    if value not in PRESETS and not re.fullmatch(r".+\.py:[A-Za-z_]\w*", str(value)):
        raise ValueError("expected " + " or ".join(PRESETS) + " or FILE.py:FUNCTION")
    return value


def device_name(value):
    """The kind: a torch device, or auto."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("expected auto, cpu, cuda or cuda:0")
    return value


PLAIN = {"fsr": "none", "prototype_weight": 0.0}
PRESETS = {  # method: what it sets; a key of its own name, such as fedprox_mu, can be set otherwise
    "fedbcs": {},
    "fedavg": PLAIN,
    "fedprox": PLAIN | {"fedprox_mu": 0.01},
    "harmofl": PLAIN | {"weights": "equal"},
    "fpl": PLAIN,
    "fedplvm": PLAIN | {"weights": "equal"},
    "feduv": PLAIN,
    "input_norm": PLAIN,
}

KEYS = {  # key: (kind, default, help)
    "task": (choice("nuclei", "prostate"), REQUIRED, "nuclei: 2-D images; prostate: MRI volumes"),
    "data": (text, REQUIRED, "folder with one folder a site, or demo: sites that are generated"),
    "out": (or_none(text), None, "run folder; none: runs/ + the name of the config file"),
    "method": (method_name, "fedbcs", "a method of baselines.py, or FILE.py:FUNCTION of your own"),
    "hold_out": (or_none(text), None, "site that does not train; all of its cases test"),
    "rounds": (whole(1), 400, "communication rounds"),
    "local_epochs": (whole(1), 1, "passes over its own images that a site makes in a round"),
    "batch_size": (whole(1), 6, "images in a training step"),
    "optimizer": (choice("sgd", "adam"), "sgd", "sgd (momentum 0) or adam, state kept at the site"),
    "lr": (number(above=0), 0.01, "learning rate, without a schedule"),
    "weight_decay": (number(least=0), 1e-4, "weight decay of the optimizer"),
    "image_size": (whole(32, multiple=16), 256, "side in pixels of the square network input"),
    "width": (whole(1), 32, "channels of the first level; they double at each deeper one"),
    "levels": (level_list, [0, 1, 2], "shallow levels whose features are fused and aligned"),
    "fsr": (choice("none", "global", "adaptive"), "global", "style recalibration weights"),
    "prototype_weight": (number(least=0), 1.0, "mu, the weight of L_MP; 0: no prototypes at all"),
    "tau": (number(above=0), 0.1, "temperature of the contrastive loss"),
    "contrast_clip": (flag, False, "clip the contrastive loss as the released code does"),
    "fedprox_mu": (number(least=0), 0.0, "weight of FedProx's mu/2 |w - w_global|^2; 0: off"),
    "harmofl_step": (number(above=0), 0.05, "length of HarmoFL's perturbation of the weights"),
    "fpl_tau": (number(above=0), 0.02, "temperature of FPL"),
    "fedplvm_tau": (number(above=0), 0.07, "temperature of FedPLVM"),
    "fedplvm_power": (number(above=0), 0.25, "power of the cosine in FedPLVM"),
    "fedplvm_weight": (number(least=0), 100.0, "weight of FedPLVM's two losses"),
    "feduv_variance": (number(least=0), 2.5, "weight of FedUV's V"),
    "feduv_uniformity": (number(least=0), 0.5, "weight of FedUV's U"),
    "feduv_pixels": (whole(4), 256, "pixels of a batch that enter V and U, of all classes alike"),
    "weights": (choice("samples", "equal"), "samples", "a site's share in the average of weights"),
    "on_site_failure": (choice("stop", "skip"), "stop", "skip: a site that fails sits out a round"),
    "min_sites": (whole(1), 1, "with skip: the fewest sites that a round may be averaged over"),
    "seed": (whole(0), 0, "seed of initial weights, splits, shuffling and augmentation"),
    "device": (device_name, "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N"),
    "amp": (or_none(choice("bf16")), None, "bf16: mixed precision; losses stay float32"),
    "resume": (flag, False, "true: go on from the run folder's last checkpoint"),
    "splits": (or_none(text), None, "splits.json to use; none: split by cases with the seed"),
    "folds": (or_none(whole(3)), None, "K of K-fold cross-validation; none: one 60/20/20 split"),
    "fold": (whole(0), 0, "with folds: this fold (from 0) tests, the next one validates"),
    "case_pattern": (or_none(pattern), None, "regular expression on file names, group 1: case"),
    "eval_every": (whole(1), 1, "validate every so many rounds, and after the last"),
    "eval_slices": (choice("all", "foreground"), "all", "score volumes, or slices with organ"),
    "test_stats": (choice("site", "case"), "site", "whose batch-norm statistics a prediction uses"),
}

DEFAULTS = {key: default for key, (_, default, _) in KEYS.items()}


def read_value(key, value):
    """Return the typed value of one key; raises BadInput for an unknown key or a wrong value."""
    if key not in KEYS:
        near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0)
        raise BadInput(f"{key}: unknown key, the nearest is '{near[0]}'")
    kind, default, _ = KEYS[key]
    try:
        return kind(value)
    except ValueError as problem:
        hint = " or none" if default is None else ""
        raise BadInput(f"{key}: {problem}{hint}, not {value!r}; mend it in the config file "
                       "or on the command line") from None


def read_override(argument):
    """Return (key, value) of one `key=value` argument, its value read as YAML unless it is text."""
    key, equals, value = argument.partition("=")
    if not equals:
        raise BadInput(f"{argument}: not of the form key=value, write for example rounds=10")
    if key in ("data", "out", "splits", "case_pattern", "hold_out"):  # there [a-z] is not a list
        return key, value
    try:
        return key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise BadInput(f"{key}: cannot read {value!r}, write for example levels=[0,2]") from None


def read_yaml(file):
    """Return the mapping in a YAML file; raises BadInput if there is none."""
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as problem:
        raise BadInput(f"{file}: cannot be read ({problem.strerror}), name another") from None
    except (yaml.YAMLError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise BadInput(f"{file}: is not YAML, mend it: {reason}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{file}: holds no 'key: value' lines, start from a copy of config.yaml")
    return settings


def load_config(file, overrides=()):
    """Return all settings, typed and resolved, as attributes (`config.lr`).

    file: YAML file, or a mapping that has `out`; overrides: `key=value` texts, which win. A method
    given there wins over the file's switches too, such as fsr, but not over those given beside it.
    Raises BadInput for an unreadable file, an unknown, missing, ill-typed or contradictory key.
    """
    given = file if isinstance(file, dict) else read_yaml(file)
    given = {key: read_value(key, value) for key, value in given.items()}
    changed = dict(read_override(argument) for argument in overrides)
    changed = {key: read_value(key, value) for key, value in changed.items()}
    preset = PRESETS.get((DEFAULTS | given | changed)["method"], {})
    values = DEFAULTS | preset | given | (preset if "method" in changed else {}) | changed
    for key, value in values.items():
        if value is REQUIRED:
            raise BadInput(f"{key}: missing, add it to {file}: {KEYS[key][2]}")
    if values["out"] is None:
        values["out"] = str(Path("runs") / Path(file).stem)
    check_method(values, preset)
    if values["folds"] and values["fold"] >= values["folds"]:
        raise BadInput(f"fold: {values['fold']} is not below folds: {values['folds']}; "
                       "folds count from 0")
    if values["folds"] and values["splits"]:
        raise BadInput("folds: contradicts splits, which already says who tests; set one to none")
    if values["eval_slices"] == "foreground" and values["task"] == "nuclei":
        raise BadInput("eval_slices: foreground is for volumes, set it to all for task: nuclei")
    return SimpleNamespace(**values)


def check_method(values, preset):
    """Raise BadInput for a key that contradicts the method, or that only another method reads."""
    method = values["method"]
    for key, value in values.items():
        owner = key.partition("_")[0]
        if owner == method or value == preset.get(key, DEFAULTS[key]):
            continue
        if key in preset:
            raise BadInput(f"{key}: {value} contradicts method: {method}, which is {key}: "
                           f"{preset[key]}; leave {key} out or choose another method")
        if owner in PRESETS and method in PRESETS and (owner, method) != ("fedprox", "fedbcs"):
            raise BadInput(f"{key}: is read by method: {owner} only, not by {method}; "
                           "leave it out or choose that method")


def as_yaml(config):
    """Return the settings as text that `load_config` reads back, with the word none for off."""
    written = {key: "none" if value is None else value for key, value in vars(config).items()}
    return yaml.safe_dump(written, sort_keys=False, default_flow_style=None)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, so that they too are one line."""

    def error(self, message):
        raise BadInput(f"command line: {message}; see --help")


def run_program(main):
    """Run `main` as a program: what a user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as problem:
        print("error:", " ".join(str(problem).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as problem:
        print(f"error: {problem.filename}: {problem.strerror}; check the path and its permissions",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
