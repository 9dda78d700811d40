"""The Triton kernels by Triton's interpreter, on a CPU. On a card: tests/test_gpu_arrays.py."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.timeout(240)
def test_the_kernels_compute_what_plain_torch_does() -> None:
    command = [sys.executable, "-m", "tests.run_interpreted"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
