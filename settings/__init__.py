"""Settings: what kinds of values there are, and how a program starts."""

import ctypes
import os
import signal
import sys
import threading

# Idle OpenMP threads busy-wait and so take a core away from the threads that work. With 10000 turns they soon
# stop. This must be set before torch is imported, and it is left alone if the user has set OMP_WAIT_POLICY.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# glibc gives the memory of a large tensor back to the system at once and gets the next one's page by page,
# which is a fifth of a training step. With these two bounds it keeps up to 2 GB, unless the user has set the
# second one.
if hasattr(libc := ctypes.CDLL(None), "mallopt") and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    for bound in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(bound, 2**31 - 1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `deterministic: true` needs on a GPU


def on_interrupt(number, frame):
    """Ctrl-C: raise KeyboardInterrupt, but end at once while modules are imported: torch would abort."""
    above = frame
    while above and not hasattr(sys, "ps1"):  # which Python has at a prompt
        if above.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(130)
        above = above.f_back
    signal.default_int_handler(number, frame)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler \
        and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, on_interrupt)
