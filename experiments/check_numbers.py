"""Do the numbers of the pages come out? python -m experiments.check_numbers [FILE.csv]

docs/commands.csv has a line for each number that takes about a minute: the page's file, the text in which the
number stands there, the program and its arguments (OUT is a new folder), a pattern whose group 1 finds the number
in the last place of the output where it fits, the number, and how far from it another machine may be.
"""

import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from config import BadInput
from settings.program import Parser, run_program

HERE = Path(__file__).parents[1]


def rows_of(file):
    """Return the lines of such a file as dictionaries; raises BadInput where a page lacks the text, or the text
    the number."""
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        if row["number"] not in row["text"] or row["text"] not in (HERE / row["file"]).read_text(encoding="utf-8"):
            raise BadInput(f"{file}: {row['file']} has no '{row['text']}' with {row['number']} in it; bring this "
                           "line and the page together")
    return rows


def number_of(row):
    """Return the number that a line's command prints now; raises BadInput if it fails or prints none."""
    with tempfile.TemporaryDirectory() as folder:
        words = row["command"].replace("OUT", f"{folder}/out").split()
        ran = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True, check=False)
    found = re.findall(row["found"], ran.stdout)
    if ran.returncode or not found:
        raise BadInput(f"{row['command']}: ended with {ran.returncode} and printed no number, run it by hand")
    return float(found[-1])


def main():
    """Run every command and print its number beside that of the page; exit with 1 if one differs."""
    parser = Parser(description=__doc__)
    parser.add_argument("file", nargs="?", default=HERE / "docs" / "commands.csv")
    differ = 0
    for row in rows_of(parser.parse_args().file):
        found = number_of(row)
        same = abs(found - float(row["number"])) <= float(row["within"])
        differ += not same
        print(f"{'same' if same else 'DIFFERENT'}: {row['file']} has {row['number']}, {row['command']} prints "
              f"{found:g}", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    run_program(main)
