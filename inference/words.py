"""The words on predict.py's command line: an INPUT and key=value, checked before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace

import settings.kinds as kind
from config import BadInput

OF_RUN = {"device", "test_stats", "keep_largest"}  # keys of the run that may be changed
OWN = {  # keys of this program: (kind, default)
    "out": (kind.path, None), "site": (kind.text, None), "export": (kind.path, None),
    "threshold": (kind.number(above=0, most=0.9999), None),
    "probabilities": (None, False), "trust": (None, False)}  # None: true or false


def read_words(words):
    """Return INPUT, a path or None, and the keys of `OWN`, typed, as attributes, with `of_run`, the words for
    the run's own keys; raises BadInput for what cannot be used."""
    inputs = [word for word in words if "=" not in word or Path(word).exists()]
    given = [word.partition("=")[::2] for word in words if word not in inputs]
    for key, value in given:
        check_word(key, value, [name for name, _ in given])
    keys = SimpleNamespace(**{key: default for key, (_, default) in OWN.items()},
                           of_run=[f"{key}={value}" for key, value in given if key in (*OF_RUN, "trust")])
    vars(keys).update({key: read_word(key, value) for key, value in given if key in OWN})
    if keys.export:
        check_export(Path(keys.export), inputs, [key for key, _ in given])
    elif len(inputs) != 1:
        raise BadInput("command line: expected one INPUT, a file or a folder")
    return path_of("INPUT", inputs[0]) if inputs else None, keys


def check_word(key, value, names):
    """Raise BadInput for a key that is unknown, given twice, or without a value."""
    if key not in OWN.keys() | OF_RUN:
        raise BadInput(f"{key}: cannot be changed here, only {', '.join(sorted(OWN.keys() | OF_RUN))} can")
    if not value:
        raise BadInput(f"{key}: expected a value, write {key}=...")
    if names.count(key) > 1:
        raise BadInput(f"{key}: is given twice, keep one")


def read_word(key, value):
    """Return the typed value of one of `OWN`; raises BadInput for a wrong one."""
    read = OWN[key][0]
    try:
        if read is None:
            kind.expect(value in ("true", "false"), "true or false")
            return value == "true"
        return read(value)
    except ValueError as problem:
        raise BadInput(f"{key}: {kind.shown(value)} cannot be used, {problem}") from None


def path_of(key, word):
    """Return a path given on the command line, ~ being the home folder; raises BadInput."""
    try:
        return Path(kind.path(word))
    except ValueError as problem:
        raise BadInput(f"{key}: {kind.shown(word)} cannot be used, {problem}") from None


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
