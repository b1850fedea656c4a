"""Settings: what kinds of values there are, and how a program starts."""

import os

# A thread of torch that waits spins, and takes a core from whoever works; 10000 turns are soon over. It has
# to be said before torch is imported, and is not if the user has said how threads wait.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
