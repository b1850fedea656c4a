"""Settings: what kinds of values there are, and how a program starts."""

import os

# Idle OpenMP threads busy-wait and so take a core away from the threads that work. With 10000 turns they soon
# stop. This must be set before torch is imported, and it is left alone if the user has set OMP_WAIT_POLICY.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `deterministic: true` needs on a GPU
