"""The paired table of runs that are there: python -m experiments.compare RUN RUN ... [--out FILE]

The first RUN's setting is the base. Runs whose folders differ in _seedN and _foldN alone are one setting, as
`reproduce` names them; a folder without these is a setting of one run. All settings must have tested the same
patients: give them the same data, seeds, folds or splits. Every run is taken with the statistics that its
cases.csv has. With --out the table is also FILE.md and FILE.csv, a row a patient.
"""

import re
from pathlib import Path

from config import BadInput, load_config
from experiments.paired import write_paired
from experiments.run_grid import Training, by_setting, rows_in
from rounds.reading import FREE_ON_RESUME, check_same_config
from settings.program import Parser, run_program


def runs_in(folders):
    """Return the trainings in run folders; raises BadInput for runs of one name and other settings."""
    runs, first = [], {}
    for folder in folders:
        config = load_config(folder / "config.yaml")
        name = re.sub(r"(_seed\d+|_fold\d+)+$", "", folder.resolve().name)
        check_same_config(folder / "config.yaml", vars(config), vars(first.setdefault(name, config)),
                          FREE_ON_RESUME | {"seed", "fold"})
        runs.append(Training(name, config.seed, folder, [], config))
    return runs


def main():
    """Print the paired table of runs."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished run folder; the first is the base")
    parser.add_argument("--out", metavar="FILE", help="write FILE.md and FILE.csv too")
    given = parser.parse_args()
    runs = runs_in([Path(run).expanduser() for run in given.runs])
    settings = by_setting(runs, runs[0].setting)
    if len(settings) < 2:
        raise BadInput(f"command line: {given.runs[0]} and the others are one setting, name runs of two")
    write_paired(given.out and Path(given.out).expanduser(), settings, ["each run's own"],
                 lambda run, _: rows_in(run.folder / "cases.csv"))


if __name__ == "__main__":
    run_program(main)
