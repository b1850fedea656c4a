"""Checkpoints, and all files of a run: written whole or not at all. rounds/reading.py reads them."""

import io
import os

import torch

from config import BadInput
from settings.program import in_words

FORMAT = "fedbcs-3"
NEEDED = ("config", "round", "weights", "local", "statistics")  # to score it, and all that best.pt has


def as_bytes(checkpoint):
    """Return the file content of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def save(file, content):
    """Write bytes to a file so that at any moment it is the old one or the whole new one."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise BadInput(in_words(OSError(problem.errno, problem.strerror, str(file)))
                       + "; then start again, a training with resume=true") from None
