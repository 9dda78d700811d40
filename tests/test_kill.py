"""A driver that is killed with -9 at any stage: the same command again, the same bytes, nothing embedded twice.

These runs are processes of their own, from the command line, because a signal 9 spares nothing within one.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curate.storage import Store
from jobs.drawn_pool import draw_pool
from tests.helpers import write_tiny

SHARDS = 6
RECIPE = """
root = "{root}"
[pool]
path = "{pool}"
[reference]
model = "reference.json"
[learner]
model = "learner.json"
[selection]
sub_batch_size = 16
n_chunks = 4
[output]
file_rows = 16
[resources]
workers = 1
"""
ENDED_S = 240
WORKERS = "ray::(MapWorker|split_all|join_all)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=1200, shards=SHARDS, seed=0, image_size=32, broken_share=0.02, duplicate_share=0.05)
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a round that nobody killed."""
    root = tmp_path_factory.mktemp("undisturbed")
    run(command(world, str(root), "undisturbed.toml"))
    return root


def command(world: Path, root: str, name: str) -> list[str]:
    recipe = world / name
    recipe.write_text(RECIPE.format(root=root, pool=world / "pool"))
    return [sys.executable, "-m", "jobs.cli", "round", str(recipe), "--round", "0"]


def kill_when(arguments: list[str], reached: Callable[[], bool], finished: Callable[[], bool]) -> None:
    """Run a driver and kill it with -9 as soon as `reached`; it must not have finished by then."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + ENDED_S
    try:
        while not reached():
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not finished()
    finally:
        process.kill()
        process.communicate()
    _wait_for_ray_to_die(process.pid)


def _wait_for_ray_to_die(session: int) -> None:
    """Workers notice within seconds that their driver is gone; Ray's own agents may stay for a minute."""
    until = time.monotonic() + 60
    while (
        subprocess.run(["pgrep", "-s", str(session), "-f", WORKERS], stdout=subprocess.DEVNULL, check=False).returncode
        == 0
    ):
        assert time.monotonic() < until, "Ray outlived its driver"
        time.sleep(0.2)


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=ENDED_S, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(800)
def test_killed_at_three_stages_and_finished(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    disturbed = tmp_path / "disturbed"
    expected = (undisturbed / "rounds/r000000/manifest.json").read_bytes()

    arguments = command(world, str(disturbed), "disturbed.toml")
    steps = disturbed / "rounds/r000000"

    def files(pattern: str) -> list[Path]:
        return [path for path in disturbed.glob(pattern) if ".tmp-" not in str(path)]

    def committed() -> bool:
        return (disturbed / "rounds/r000000/manifest.json").exists()

    embedded: dict[Path, tuple[int, int]] = {}
    for stage, reached, complete in (
        (
            "embed",
            lambda: len(files("embeddings/*/*.parquet")) >= 3,
            lambda: len(files("embeddings/*/*.parquet")) == 2 * SHARDS,
        ),
        ("select", lambda: any(steps.glob("steps-*/selected-*")), lambda: any(steps.glob("steps-*/written-*"))),
        ("write", lambda: any(steps.glob("steps-*/written-*")), committed),
    ):
        kill_when(arguments, reached, complete)
        now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files("embeddings/*/*.parquet")}
        assert now, stage
        assert {path: now[path] for path in embedded} == embedded, f"embedded twice after {stage}"
        embedded = now
    run(arguments)

    assert (disturbed / "rounds/r000000/manifest.json").read_bytes() == expected
    final = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files("embeddings/*/*.parquet")}
    assert {path: final[path] for path in embedded} == embedded
    assert len(final) == 2 * SHARDS
    names = {path.name for path in (disturbed / "rounds/r000000").glob("curated-*")}
    assert names == {path.name for path in (undisturbed / "rounds/r000000").glob("curated-*")}


@pytest.mark.timeout(400)
def test_a_round_on_s3_commits_what_a_local_one_does(world: Path, undisturbed: Path, s3_root: str) -> None:
    """The same pool and recipe with the root on an S3 server, driver and workers talking to it over HTTP."""
    run(command(world, s3_root, "s3.toml"))
    on_s3 = Store(s3_root)
    name = "rounds/r000000/manifest.json"
    assert on_s3.read_bytes(name) == (undisturbed / name).read_bytes()
    curated = next(path for path in on_s3.list("rounds/r000000") if "curated-" in path)
    assert on_s3.read_bytes(curated) == (undisturbed / curated).read_bytes()
