"""Tests of how programs start: what is said before torch is imported."""

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
    for own, expected in (({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        words = [str(HERE / word) if word.endswith(".py") else word for word in program]
        # the stand-in for torch goes in front of all, whatever Python puts there
        start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
        (tmp_path / "sitecustomize.py").write_text(start)
        ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=HERE,
                             env=clean | own | {"PYTHONPATH": str(tmp_path)})
        assert ran.stdout == f"{expected}\n", ran.stderr
