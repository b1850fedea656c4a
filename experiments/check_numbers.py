"""Do the numbers of the pages come out? python -m experiments.check_numbers [FILE.csv]

docs/commands.csv has a line for numbers that take about a minute: the page's file, the text in which they
stand there, the command (OUT is a new folder), a pattern whose groups find the numbers in the last place of
its output where it fits, the numbers, and how far from them another machine may be. Where the runs take
hours, the command prints the table that they left (cat), and the page is compared with that.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from config import BadInput
from settings.program import Parser, run_program

ROOT = Path(__file__).parents[1]


def commands_in(file):
    """Return the lines of such a file; raises BadInput where a page lacks the text, or that a number."""
    with open(file, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        page = " ".join((ROOT / row["file"]).read_text(encoding="utf-8").split())  # wherever its lines end
        if row["text"] not in page or any(number not in row["text"] for number in row["number"].split()):
            raise BadInput(f"{file}: {row['file']} has no '{row['text']}' with {row['number']} in it; bring "
                           "this line and the page together")
    return rows


@cache
def output_of(command):
    """Return what a line's command prints; raises BadInput if it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # so that python is this one
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(["bash", "-c", command.replace("OUT", f"{folder}/out")], cwd=ROOT, check=False,
                             env=os.environ | {"PATH": path}, capture_output=True, text=True)
    if ran.returncode:
        raise BadInput(f"{command}: ended with {ran.returncode}, run it by hand")
    return ran.stdout


def numbers_of(row):
    """Return the numbers that a line's command prints now; raises BadInput if it fails or prints others."""
    *_, numbers = [(), *(match.groups() for match in re.finditer(row["found"], output_of(row["command"])))]
    if len(numbers) != len(row["number"].split()):
        raise BadInput(f"{row['command']}: printed {len(numbers)} numbers, the page has {row['number']}; run "
                       "it by hand")
    return numbers


def agree(row, numbers):
    """Return whether numbers are those of a line, each within its bound."""
    pairs = zip(row["number"].split(), numbers)
    return all(abs(float(a) - float(b)) <= float(row["within"]) for a, b in pairs)


def main():
    """Run every command and print its numbers beside those of the page; exit with 1 if one differs."""
    parser = Parser(description=__doc__)
    parser.add_argument("file", nargs="?", default=ROOT / "docs" / "commands.csv")
    differ = 0
    for row in commands_in(parser.parse_args().file):
        numbers = numbers_of(row)
        differ += not agree(row, numbers)
        print(f"{'same' if agree(row, numbers) else 'DIFFERENT'}: {row['file']} has {row['number']}, "
              f"{row['command']} prints {' '.join(numbers)}", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    run_program(main)
