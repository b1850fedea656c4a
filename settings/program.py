"""How every program reads its command line, and how it ends."""

import argparse
import contextlib
import errno
import os
import re
import sys

from settings.kinds import BadInput

LONGEST = 2000  # characters of an error's line
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EACCES: "check its permissions",
          errno.EPERM: "check its permissions", errno.EROFS: "choose another folder",
          errno.ENOENT: "it was there before; restore it"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, so that they too are one line."""

    def error(self, message):
        raise BadInput(f"command line: {message}; see --help")


def run_program(main):
    """Run `main` as a program: what a user can mend becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a screen may not know a name's letters
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        sys.stderr.close()
        sys.exit(1)
    except (BadInput, OSError, MemoryError, RuntimeError) as problem:
        reason = in_words(problem)
        if reason is None:
            raise
        print("error:", " ".join(reason.split())[:LONGEST], file=sys.stderr)
        if isinstance(problem, OSError):
            with contextlib.suppress(OSError):  # else Python would try again to write what is left of stdout
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def in_words(problem):
    """Return what went wrong and what to do, None if it is a fault of the program."""
    words = str(problem)
    if isinstance(problem, BadInput):
        return words
    if isinstance(problem, MemoryError) or re.search("(not enough|out of|can't allocate) memory", words):
        return "memory: there is not enough; lower batch_size, image_size or width, or close other programs"
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}; {REMEDIES.get(problem.errno, 'check the path')}"
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"the output (stdout): cannot be written ({problem.strerror}); make room or send it elsewhere"
    return None
