"""Kill a run at 60 moments and resume it each time to the same bits: python -m tests.kills

20 in the first second, 20 while a file is half written, 20 at any moment; about five minutes.
"""

import random
import shutil
import tempfile
from pathlib import Path

from tests.test_guards import after, half_written, killed, prepare_kills, resumes_to


def main():
    """Kill and resume; raises AssertionError at the first end that differs."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = prepare_kills(Path(folder))
        for number in range(60):
            writing, run = half_written(Path(folder)), Path(folder) / "run"
            over = after(moments.uniform(0, 1.0 if number < 20 else seconds))
            shutil.rmtree(run, ignore_errors=True)
            moment = (lambda: over() and writing()) if 20 <= number < 40 else over  # noqa: B023 - called here
            killed(Path(folder), moment)
            resumes_to(whole, Path(folder))
            print(f"\r{number + 1} kills, all resumed to the same bits", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
