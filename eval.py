"""Score a run again: python eval.py --run FOLDER [data=OTHER] [test_stats=case] [key=value ...]

A run of a method of one's own runs that method's file, and needs trust=true.
"""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported

# isort: split
import json
import time
from pathlib import Path

from datasets import load_sites, read_splits
from rounds.checkpoint import save
from rounds.finished import open_run
from scoring.evaluate import pick_device, score_run
from scoring.results import KINDS
from scoring.trained import model_of
from settings.program import Parser, run_program

FREE_ON_EVAL = {"data", "device", "test_stats", "eval_slices", "case_pattern"}


def main():
    """Print the tables of a run and its result as JSON, with the overrides that scoring allows."""
    start = time.perf_counter()
    allowed, parser = ", ".join(sorted(FREE_ON_EVAL)), Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {allowed}, trust=true")
    given = parser.parse_intermixed_args()
    folder = Path(given.run).expanduser()
    config, checkpoints = open_run(folder, KINDS, given.overrides, FREE_ON_EVAL)
    found = dict(zip(KINDS, checkpoints))
    changed = {argument.partition("=")[0] for argument in given.overrides}
    splits, device = read_splits(folder / "splits.json"), pick_device(config)
    sites = load_sites(config, splits, strict="data" not in changed)
    models = [model_of(found[kind], folder / f"{kind}.pt", device) for kind in KINDS]
    result, cases = score_run(folder, found, models[0], sites, config, device, time.perf_counter() - start)
    save(folder / ("cases_eval.csv" if changed - {"device", "trust"} else "cases.csv"), cases)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    run_program(main)
