"""The paired table of runs that are there: python -m experiments.compare RUN RUN ... [--out FILE]

The first RUN's setting is the base. Runs whose folders differ in _seedN and _foldN alone are one setting, as
`reproduce` names them; a folder without these is a setting of one run. All settings must have tested the same
patients: give them the same data, seeds, folds or splits. Every run is taken with the statistics that its
cases.csv has. With --out the table is also FILE.md and FILE.csv, a row a patient.
"""

import re
import tempfile
from pathlib import Path

from config import BadInput, load_config
from experiments.run_grid import read_rows
from experiments.tables import publish_paired
from rounds.reading import check_same_config
from settings.program import Parser, run_program

OF_ONE_RUN = ("seed", "fold")  # in which the runs of a setting may differ


def settings_of(folders):
    """Return {setting: {seed: [folder of each fold]}} of run folders; raises BadInput for runs of one name
    and other settings."""
    found, first = {}, {}
    for folder in folders:
        config = vars(load_config(folder / "config.yaml"))
        seed, shared = config["seed"], {key: config[key] for key in config if key not in OF_ONE_RUN}
        name = re.sub(r"(_seed\d+|_fold\d+)+$", "", folder.resolve().name)
        check_same_config(folder / "config.yaml", shared, first.setdefault(name, shared))
        found.setdefault(name, {}).setdefault(seed, []).append(folder)
    return found


def cases_of(folders, kind):
    """Return [[rows of each fold] of each seed] of {seed: [folders]}, of the round `best` or `last`."""
    return [[[row for row in read_rows(folder / "cases.csv") if row["kind"] == kind] for folder in of_seed]
            for _, of_seed in sorted(folders.items())]


def main():
    """Print the paired table of runs."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folder; the first is the base")
    parser.add_argument("--out", metavar="FILE", help="write FILE.md and FILE.csv too")
    given = parser.parse_args()
    settings = settings_of([Path(run).expanduser() for run in given.runs])
    if len(settings) < 2:
        raise BadInput(f"command line: {given.runs[0]} and the others are one setting, name runs of two")
    found = {(kind, "each run's own"): {name: cases_of(folders, kind) for name, folders in settings.items()}
             for kind in ("last", "best")}
    with tempfile.TemporaryDirectory() as nowhere:
        file = Path(given.out).expanduser() if given.out else Path(nowhere) / "table"
        publish_paired(file, found, {name: sorted(seeds) for name, seeds in settings.items()})


if __name__ == "__main__":
    run_program(main)
