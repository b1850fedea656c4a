"""Use a trained network on new images: python predict.py --run RUN INPUT [out=FOLDER] [site=NAME] [key=value]

INPUT is a file, a folder of images or of volumes, or a folder of sites; no masks are needed. Written are a
mask on each file's own grid, prediction.csv and sheets of pictures. The best round of the run predicts.

site=NAME           of a run with test_stats: site, normalise by this site's statistics; use its local weights
test_stats=case     normalise each image by itself, as a run with test_stats: case does anyway; a run with
                    test_stats: site, without both: by statistics of the input images
threshold=0.3       of two classes: foreground is where its probability is above this; else 0.5
keep_largest=true   of each class keep the largest connected part alone, for organs
probabilities=true  write the probability of foreground, or of each class, too
export=FILE.pt2     write the network as one file that runs without this project; no INPUT
"""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported

# isort: split
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import settings.kinds as kind
from config import VOLUMES, BadInput
from inference import outputs
from inference.export import export_network
from inference.inputs import choose, first_of, is_of_masks, list_inputs, of_hospital, read_ahead
from rounds.finished import open_run
from scoring.evaluate import logits_of, pick_device
from scoring.history import validation_of
from scoring.norms import own_network
from scoring.results import as_table
from scoring.trained import model_of
from settings.program import Parser, run_program

OF_RUN = {"device", "test_stats", "keep_largest"}  # keys of the run that may be changed
FLAG = kind.choice("true", "false")
WORDS = {  # keys of this program: their kinds
    "out": kind.path, "site": kind.text, "export": kind.path, "threshold": kind.number(above=0, most=0.9999),
    "probabilities": lambda word: FLAG(word) == "true", "trust": FLAG}
NAMED = 20  # files that are not read are named up to this number


def main():
    """Predict the inputs, or export the network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("words", nargs="*", metavar="INPUT key=value", help="see above")
    given = parser.parse_intermixed_args()
    run, (path, keys) = given.run.expanduser(), read_words(given.words)
    config, (checkpoint,) = open_run(run, ["best"], keys.of_run, OF_RUN)
    if keys.threshold and config.classes > 2:
        raise BadInput(f"threshold: is for two classes and the run has {config.classes}, leave it out")
    device = pick_device(config)
    model, local = model_of(checkpoint, run / "best.pt", device), checkpoint["local"]
    statistics, whose = choose(keys.site, model, checkpoint, config)
    network = own_network(model, statistics or {}, local.get(keys.site, {}))
    print(f"{run}, round {checkpoint['round']}: {validation_of(run, checkpoint['round'])}", flush=True)
    if keys.export:
        if statistics is None:
            raise BadInput("site: an exported network needs the statistics of a site, or test_stats=case")
        export_network(network, Path(keys.export), config, whose)
        print(f"written to {keys.export}, statistics {whose}")
        return
    out = Path(keys.out or run / "predictions")
    found = list_inputs(path, config.task)
    names = outputs.output_names(found.files, path, ".nii.gz" if config.task in VOLUMES else ".png")
    folder = outputs.OutputFolder(out, found.files, outputs.names_of(names.values()))
    say_what_is_left(path, found)
    if statistics is None:
        statistics, whose = of_hospital(out, checkpoint["weights"], model, found.files,
                                        path.resolve().name, config, device)
        network = own_network(model, statistics)
    failed = predict_all(network, names, folder, config, device, whose, keys)
    black = f" of the labels 0 to {config.classes - 1}, which look black" if config.classes > 2 else ""
    print(f"{len(names) - failed} of {len(names) + len(found.unread)} files predicted, statistics {whose}; "
          f"written to {out}: masks{black}, {outputs.TABLE}, sheets of pictures")
    sys.exit(1 if failed or found.unread else 0)


def read_words(words):
    """Return INPUT, a path or None, and the keys of `WORDS`, typed, None if not given, as attributes, with
    `of_run`, the words for the run's own keys; raises BadInput for what cannot be used."""
    inputs = [word for word in words if "=" not in word or Path(word).exists()]
    keys, of_run, known = {}, [], WORDS.keys() | OF_RUN
    for word in (word for word in words if word not in inputs):
        key, _, value = word.partition("=")
        if key not in known:
            raise BadInput(f"{key}: cannot be changed here, only {', '.join(sorted(known))} can")
        if not value:
            raise BadInput(f"{key}: expected a value, write {key}=...")
        if key in keys:
            raise BadInput(f"{key}: is given twice, keep one")
        try:
            keys[key] = WORDS.get(key, str)(value)
        except ValueError as problem:
            raise BadInput(f"{key}: {kind.shown(value)} cannot be used, {problem}") from None
        of_run += [word] if key in OF_RUN or key == "trust" else []
    if "export" in keys:
        check_export(keys, inputs)
    elif len(inputs) != 1:
        raise BadInput("command line: expected one INPUT, a file or a folder")
    path = Path(inputs[0]).expanduser() if inputs else None
    return path, SimpleNamespace(**dict.fromkeys(WORDS) | keys, of_run=of_run)


def check_export(keys, inputs):
    """Raise BadInput for an export of another kind or over a file, and for words without effect on it."""
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


def say_what_is_left(path, found):
    """Print which files of the INPUT `path` are not predicted, and why."""
    if path.is_dir() and is_of_masks([path.resolve().name]):
        print(f"warning: {path}: has the name of a folder of masks, and is predicted", file=sys.stderr)
    if found.left:
        print(f"left out as masks, predictions or runs: {first_of(found.left)}", flush=True)
    unread = [f"not read: {file}: {why}" for file, why in sorted(found.unread.items())]
    more = [f"not read: {len(unread) - NAMED} other files"] if len(unread) > NAMED else []
    print(*unread[:NAMED], *more, sep="\n", end="\n" * bool(unread), file=sys.stderr, flush=True)


def predict_all(network, names, folder, config, device, whose, keys):
    """Write masks, table and sheets of all files; return how many could not be read, which are named. names:
    {file: its mask's path below the folder}; whose: what the statistics are, for the table."""
    rows, sheet, failed = [], [], 0
    for number, (file, sample) in enumerate(read_ahead(list(names), config), 1):
        if isinstance(sample, BadInput):
            print(f"skipped: {sample}", file=sys.stderr, flush=True)
            failed += 1
        else:
            for text in sample.warnings:
                print(f"warning: {text}", file=sys.stderr, flush=True)
            labels = write_one(network, names[file], folder, file, sample, config, device, keys)
            rows += outputs.table_rows(file, labels, sample.spacing, config, keys.threshold, whose)
            sheet.append(outputs.sheet_row(file, sample, labels, config))
        if sheet and (number % outputs.ROWS == 0 or number == len(names)):
            folder.save(outputs.sheet_name(number), outputs.as_sheet(sheet, config))
            sheet = []
        if sys.stdout.isatty():
            print(f"\r{number} of {len(names)} files", end="", flush=True)
    folder.save(outputs.TABLE, as_table(rows, outputs.PREDICTION_COLUMNS))
    if others := folder.finish():
        names = ", ".join(others[:NAMED]) + " ..." * (len(others) > NAMED)
        print(f"warning: {folder.path}: holds predictions of pictures that are not in this INPUT, remove "
              f"them if those are gone: {names}", file=sys.stderr)
    return failed


def write_one(network, name, folder, file, sample, config, device, keys):
    """Predict a sample, write its mask and, if wanted, its probabilities; return its classes (S, H, W)."""
    parts = logits_of(network, sample, config, device)
    if not sample.images.any():  # read as blank, as the warning says
        print(f"note: {file}: nothing is looked for in a blank image, its mask is empty", flush=True)
        parts = (torch.cat([part[:, :1] * 0 + 20, part[:, 1:] * 0 - 20], 1) for part in parts)
    labels, p = outputs.labels_and_probabilities(parts, config, keys.threshold, keys.probabilities)
    for place, content in outputs.as_files(labels, p, name, file, config).items():
        folder.save(place, content)
    return labels


if __name__ == "__main__":
    run_program(main)
