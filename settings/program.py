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
          errno.ENOENT: "it or its folder was there before; restore it"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are BadInput, so that they too are one line, and whose help keeps the
    lines and paragraphs of its program's docstring. keys: what gives the tables of `key_table`, if any."""

    def __init__(self, keys=None, formatter_class=argparse.RawDescriptionHelpFormatter, **more):
        super().__init__(formatter_class=formatter_class, **more)
        self.keys = keys

    def format_help(self):
        """Return the help, with all keys if the program takes them."""
        if self.keys:
            from settings.key_table import key_table  # loaded by --help alone
            self.epilog = key_table(self.keys())
        return super().format_help()

    def error(self, message):
        raise BadInput(f"command line: {message}; see --help")


class Screen:
    """A text stream on which a file's name does nothing but appear: whatever cannot be printed is written as
    its code, \\x1b. Only the first character of a text may go back to the start of the line, for progress."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a screen may not know a name's letters

    def write(self, text):
        """Write a text; return its length."""
        back = text.startswith("\r")
        self.stream.write("\r" * back + "".join(
            c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text[back:]))
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_program(main):
    """Run `main` as a program: what a user can mend becomes one line on stderr and exit code 2."""
    with contextlib.redirect_stdout(Screen(sys.stdout)), contextlib.redirect_stderr(Screen(sys.stderr)):
        run(main)


def run(main):
    """Run `main`, and end the process as docs/checks.md says if it does not come to its end."""
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
        return ("memory: there is not enough; close other programs, or train with a lower batch_size, "
                "image_size or width")
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}; {REMEDIES.get(problem.errno, 'check the path')}"
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"the output (stdout): cannot be written ({problem.strerror}); make room or send it elsewhere"
    return None
