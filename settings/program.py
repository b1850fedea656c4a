"""How every program reads its command line, and how it ends."""

import argparse
import sys

from config import BadInput


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, so that they too are one line."""

    def error(self, message):
        raise BadInput(f"command line: {message}; see --help")


def run_program(main):
    """Run `main` as a program: what a user can mend becomes one line on stderr and exit code 2."""
    try:
        main()
    except BadInput as problem:
        print("error:", " ".join(str(problem).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has enough
        sys.stderr.close()
        sys.exit(1)
    except OSError as problem:
        print(f"error: {problem.filename}: {problem.strerror}; check the path and its permissions",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
