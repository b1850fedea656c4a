"""Score a run again: python eval.py --run FOLDER [data=OTHER] [test_stats=case] [key=value ...]

A run of a method of one's own runs that method's file, and needs trust=true.
"""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported

# isort: split
import time
from pathlib import Path

from datasets import load_sites
from rounds.checkpoint import save
from rounds.finished import open_run
from rounds.run_folder import as_json
from scoring.evaluate import pick_device, score_run
from scoring.history import foreign_sites
from scoring.results import KINDS, as_table
from scoring.trained import model_of
from settings.program import Parser, run_program
from sites.given_splits import read_splits

FREE_ON_EVAL = {"data", "device", "test_stats", "eval_slices", "case_pattern", "keep_largest"}


def main():
    """Print the tables of a run, and write result_eval.json and cases_eval.csv; what the training wrote stays
    as it is."""
    start = time.perf_counter()
    allowed, parser = ", ".join(sorted(FREE_ON_EVAL)), Parser(description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="run folder of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {allowed}, trust=true")
    given = parser.parse_intermixed_args()
    folder, other = given.run.expanduser(), any(text.startswith("data=") for text in given.overrides)
    config, checkpoints = open_run(folder, KINDS, given.overrides, FREE_ON_EVAL)
    found, device, of_run = dict(zip(KINDS, checkpoints)), pick_device(config), folder / "splits.json"
    alone = other and not of_run.exists()  # a server of a federation has no splits
    sites = load_sites(config, {} if alone else read_splits(of_run), strict=not other)
    models = [model_of(found[kind], folder / f"{kind}.pt", device) for kind in KINDS]
    result, cases = score_run(found, models[0], sites, config, device, time.perf_counter() - start,
                              foreign_sites(folder, sites))
    save(folder / "result_eval.json", as_json(result))
    save(folder / "cases_eval.csv", as_table(cases))
    print(f"written to {folder}: result_eval.json, cases_eval.csv")


if __name__ == "__main__":
    run_program(main)
