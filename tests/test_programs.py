"""Tests of how programs start: what is said before torch is imported."""

import ctypes
import os
import subprocess
import sys

import pytest

from test_fedbcs import HERE

PROGRAMS = (["train.py"], ["eval.py"], ["predict.py"], ["check_data.py"], ["-m", "experiments.bench"],
            ["-m", "experiments.reproduce"], ["-m", "experiments.diagnose"], ["-c", "import flower.app"])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda words: words[-1])
def test_idle_threads_do_not_spin(tmp_path, program):
    """GOMP_SPINCOUNT is set when torch is imported, unless the user has said how threads wait."""
    if "flower" in program[-1]:
        pytest.importorskip("flwr")
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nos._exit(0)\n")
    keys = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {key: value for key, value in os.environ.items() if key not in keys}
    for own, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                          ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        words = [str(HERE / word) if word.endswith(".py") else word for word in program]
        # the stand-in for torch goes in front of all, whatever Python puts there
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
        (tmp_path / "sitecustomize.py").write_text(start)
        ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=HERE,
                             env=clean | own | {"PYTHONPATH": str(tmp_path)})
        assert ran.stdout == f"{expected}\n", ran.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system has no glibc")
def test_memory_of_large_blocks_is_kept_unless_the_user_wants_it_back():
    """A block of 48 MB is brought in page by page once, or every time."""
    code = """if True:
        import resource, settings
        for i in range(9):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt if i == 1 else i and before
            b"x" * (48 * 2**20)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 8)"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    for own, kept in (({}, True), ({"MALLOC_TRIM_THRESHOLD_": str(2**17)}, False)):
        faults = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=clean | own, check=True,
                                capture_output=True, text=True).stdout
        assert (int(faults) < 100) == kept
