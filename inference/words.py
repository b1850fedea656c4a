"""The words on predict.py's command line: an INPUT and key=value, checked before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace

import settings.kinds as kind
from config import BadInput

OF_RUN = {"device", "test_stats", "keep_largest"}  # keys of the run that may be changed
FLAG = kind.choice("true", "false")
OWN = {  # keys of this program: their kinds
    "out": kind.path, "site": kind.text, "export": kind.path, "threshold": kind.number(above=0, most=0.9999),
    "probabilities": lambda word: FLAG(word) == "true", "trust": FLAG}


def read_words(words):
    """Return INPUT, a path or None, and the keys of `OWN`, typed, None if not given, as attributes, with
    `of_run`, the words for the run's own keys; raises BadInput for what cannot be used."""
    inputs = [word for word in words if "=" not in word or Path(word).exists()]
    keys, of_run = dict.fromkeys(OWN), []
    given = [word.partition("=")[::2] for word in words if word not in inputs]
    names = [key for key, _ in given]
    for key, value in given:
        if key not in OWN.keys() | OF_RUN:
            raise BadInput(f"{key}: cannot be changed here, only "
                           f"{', '.join(sorted(OWN.keys() | OF_RUN))} can")
        if not value:
            raise BadInput(f"{key}: expected a value, write {key}=...")
        if names.count(key) > 1:
            raise BadInput(f"{key}: is given twice, keep one")
        if key in OWN:
            keys[key] = typed(key, value, OWN[key])
        if key not in OWN or key == "trust":
            of_run.append(f"{key}={value}")
    if keys["export"]:
        check_export(Path(keys["export"]), inputs, names)
    elif len(inputs) != 1:
        raise BadInput("command line: expected one INPUT, a file or a folder")
    return path_of("INPUT", inputs[0]) if inputs else None, SimpleNamespace(**keys, of_run=of_run)


def typed(key, word, read):
    """Return the value of a word by its kind; raises BadInput for a wrong one."""
    try:
        return read(word)
    except ValueError as problem:
        raise BadInput(f"{key}: {kind.shown(word)} cannot be used, {problem}") from None


def path_of(key, word):
    """Return a path given on the command line, ~ being the home folder; raises BadInput."""
    return Path(typed(key, word, kind.path))


def check_export(target, inputs, names):
    """Raise BadInput for an export that would replace a file or is of another kind, and for words beside it
    that would be without effect."""
    if inputs:
        raise BadInput("export: takes no INPUT, leave it out")
    for key in ("out", "threshold", "probabilities", "keep_largest"):
        if key in names:
            raise BadInput(f"{key}: has no part in an exported network, which gives logits; leave it out")
    if target.suffix.lower() != ".pt2":
        raise BadInput(f"export: {target} is no .pt2 file; .pt2 is what torch.export.load opens without this "
                       f"project, and all that is written: give export={target.stem}.pt2")
    if target.exists() or target.is_symlink():
        raise BadInput(f"export: {target} exists already, give another name")
