"""The words on predict.py's command line: an INPUT and key=value, checked before anything is loaded."""

import os
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
    keys, of_run, known = {}, [], OWN.keys() | OF_RUN
    for word in (word for word in words if word not in inputs):
        key, _, value = word.partition("=")
        if key not in known:
            raise BadInput(f"{key}: cannot be changed here, only {', '.join(sorted(known))} can")
        if not value:
            raise BadInput(f"{key}: expected a value, write {key}=...")
        if key in keys:
            raise BadInput(f"{key}: is given twice, keep one")
        try:
            keys[key] = OWN.get(key, str)(value)
        except ValueError as problem:
            raise BadInput(f"{key}: {kind.shown(value)} cannot be used, {problem}") from None
        of_run += [word] if key in OF_RUN or key == "trust" else []
    if "export" in keys:
        check_export(keys, inputs)
    elif len(inputs) != 1:
        raise BadInput("command line: expected one INPUT, a file or a folder")
    return Path(inputs[0]) if inputs else None, SimpleNamespace(**dict.fromkeys(OWN) | keys, of_run=of_run)


def check_export(keys, inputs):
    """Raise BadInput for an export that would replace a file or is of another kind, and for words beside it
    that would be without effect."""
    if inputs:
        raise BadInput("export: takes no INPUT, leave it out")
    for key in ("out", "threshold", "probabilities", "keep_largest"):
        if key in keys:
            raise BadInput(f"{key}: has no part in an exported network, which gives logits; leave it out")
    target = Path(keys["export"])
    if target.suffix.lower() != ".pt2":
        raise BadInput(f"export: {target} is no .pt2 file; .pt2 is what torch.export.load opens without this "
                       f"project, and all that is written: give export={target.stem}.pt2")
    if os.path.lexists(target):
        raise BadInput(f"export: {target} exists already, give another name")
