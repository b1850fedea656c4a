"""Use a trained network on new images: python predict.py --run RUN INPUT [out=FOLDER] [site=NAME] [key=value]

INPUT is a file, a folder of images or of volumes, or a folder of sites; no masks are needed. Written are a
mask on each file's own grid, prediction.csv and sheets of pictures. The best round of the run predicts.

site=NAME           normalise by the statistics of this site of the run (and use its local weights)
test_stats=case     normalise each case by itself; without both: by statistics of the input images
probabilities=true  write the probability of foreground, or of each class, too
export=FILE.pt2     write the network as one file that runs without this project; no INPUT
"""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported

# isort: split
import itertools
import sys
from pathlib import Path

import torch

from config import VOLUMES, BadInput
from inference import outputs
from inference.export import export_network
from inference.inputs import list_inputs, output_names, read_ahead
from inference.statistics import choose, of_hospital
from rounds.checkpoint import save
from rounds.finished import open_run
from scoring.evaluate import logits_of, pick_device
from scoring.norm_statistics import own_network
from scoring.pictures import RED, outlined_tiles
from scoring.results import as_table
from scoring.trained import model_of
from settings.program import Parser, run_program

OWN_KEYS = {"out", "site", "probabilities", "export", "trust"}  # keys of this program
OF_RUN = {"device", "test_stats"}                          # keys of the run that may be changed


def main():
    """Predict the inputs, or export the network."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder of train.py")
    parser.add_argument("words", nargs="*", metavar="INPUT key=value", help="see above")
    given = parser.parse_intermixed_args()
    keys = dict(word.split("=", 1) for word in given.words if "=" in word and not Path(word).exists())
    inputs = [word for word in given.words if word.partition("=")[0] not in keys]
    run = Path(given.run).expanduser()
    check_words(keys, inputs)
    changes = [f"{key}={keys[key]}" for key in (*OF_RUN, "trust") if key in keys]
    config, (checkpoint,) = open_run(run, ["best"], changes, OF_RUN)
    device = pick_device(config)
    model, local = model_of(checkpoint, run / "best.pt", device), checkpoint["local"]
    statistics, whose = choose(keys.get("site"), model, checkpoint, config)
    network = own_network(model, statistics or {}, local.get(keys.get("site"), {}))
    if "export" in keys:
        if statistics is None:
            raise BadInput("site: an exported network needs the statistics of a site, or test_stats=case")
        export_network(network, Path(keys["export"]).expanduser(), config, whose)
        print(f"written to {keys['export']}, statistics {whose}")
        return
    path, out = Path(inputs[0]).expanduser(), Path(keys.get("out", run / "predictions")).expanduser()
    files = list_inputs(path, config.task)
    make_folder(out)
    if statistics is None:
        statistics, whose = of_hospital(out / "statistics.pt", checkpoint["weights"], model, files,
                                        path.resolve().name, config, device)
        network = own_network(model, statistics)
    names = output_names(files, path, ".nii.gz" if config.task in VOLUMES else ".png")
    failed = predict_all(network, names, out, config, device, whose, keys.get("probabilities") == "true")
    sys.exit(1 if failed else 0)


def check_words(keys, inputs):
    """Raise BadInput for words on the command line that cannot be used."""
    for key, value in keys.items():
        if key not in OWN_KEYS | OF_RUN:
            raise BadInput(f"{key}: cannot be changed here, only {', '.join(sorted(OWN_KEYS | OF_RUN))} can")
        if not value or (key in ("probabilities", "trust") and value not in ("true", "false")):
            raise BadInput(f"{key}: expected {'true or false' if value else 'a value'}, write {key}=...")
    if "export" in keys and inputs:
        raise BadInput("export: takes no INPUT, leave it out")
    if "export" not in keys and len(inputs) != 1:
        raise BadInput("command line: expected one INPUT, a file or a folder")


def make_folder(out):
    """Make the output folder; raises BadInput if it holds something other than predictions."""
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held and not held & {"prediction.csv", "statistics.pt"}:
        raise BadInput(f"{out}: holds other files, choose another out=FOLDER")
    out.mkdir(parents=True, exist_ok=True)


def predict_all(network, names, out, config, device, whose, probabilities):
    """Write masks, table and sheets of all files; return how many could not be read, which are named. names:
    {file: its mask's path below the folder `out`}; whose: what the statistics are, for the table."""
    rows, sheet, sheets, failed = [], [], itertools.count(1), 0
    for number, (file, sample) in enumerate(read_ahead(list(names), config), 1):
        if isinstance(sample, BadInput):
            print(f"skipped: {sample}", file=sys.stderr, flush=True)
            failed += 1
            continue
        for text in sample.warnings:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        parts = logits_of(network, sample, config, device)
        if not sample.images.any():  # read as blank, as the warning says
            print(f"note: {file}: nothing is looked for in a blank image, its mask is empty", flush=True)
            parts = (torch.cat([part[:, :1] * 0 + 20, part[:, 1:] * 0 - 20], 1) for part in parts)
        labels, p = outputs.labels_and_probabilities(parts, config, probabilities)
        outputs.write_mask(out / names[file], labels, file, config)
        if probabilities:
            outputs.write_probabilities(out / f"{names[file]}.npz", p)
        rows += outputs.table_rows(file, labels, sample.spacing, config, whose)
        sheet.append((file.name, outlined_tiles(sample, labels, config.classes, RED)))
        if len(sheet) == outputs.ROWS:
            outputs.write_sheet(out / f"sheet_{next(sheets):03}.png", sheet, config)
            sheet = []
        if sys.stdout.isatty():
            print(f"\r{number} of {len(names)} files", end="", flush=True)
    if sheet:
        outputs.write_sheet(out / f"sheet_{next(sheets):03}.png", sheet, config)
    save(out / "prediction.csv", as_table(rows, outputs.PREDICTION_COLUMNS))
    print(f"{len(names) - failed} of {len(names)} files predicted, statistics {whose}; "
          f"written to {out}: masks, prediction.csv, sheets of pictures")
    return failed


if __name__ == "__main__":
    run_program(main)
