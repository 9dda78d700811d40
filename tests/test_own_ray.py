"""What needs a Ray of its own: GPUs that are pretended or come later, several nodes, a worker that dies."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import own_ray


@pytest.mark.parametrize(
    "run",
    [*own_ray.RUNS, *(pytest.param(run, marks=pytest.mark.exhaustive) for run in own_ray.LONG_RUNS)],
    ids=lambda run: run.__name__,
)
def test_in_a_ray_of_its_own(run: Callable[[], None]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import own_ray; own_ray.{run.__name__}()"],
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if run is own_ray.a_worker_that_dies:
        assert (done.stdout, done.stderr) == ("", "")  # off a terminal, where no bar is drawn
