"""Kill a run at 60 moments and resume it each time to the same bits: python -m tests.kills

20 in the first second, 20 while a file is half written, 20 at any moment; about five minutes.
"""

import random
import tempfile
from pathlib import Path

from tests.test_guards import kill_and_resume, prepare_kills


def main():
    """Kill and resume; raises AssertionError at the first end that differs."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = prepare_kills(Path(folder))
        for number in range(60):
            writing = 20 <= number < 40
            until = 1.0 if number < 20 else seconds
            kill_and_resume(Path(folder), moments.uniform(0, until), whole, writing)
            print(f"\r{number + 1} kills, all resumed to the same bits", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
