"""Drivers, schedulers and nodes that are killed: the same command again, the same bytes, nothing embedded twice.

These runs are processes of their own, from the command line, because a signal 9 spares nothing within one.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from ray.cluster_utils import Cluster

from curate.jobs.drawn_pool import draw_pool
from tests.helpers import write_tiny

SHARDS = 8
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
filter_ratio = 0.8
criterion = "learnability"
[output]
file_rows = 16
[resources]
workers = {workers}
address = "{address}"
[schedule]
policy = "ahead"
rounds = 2
backoff_s = 1
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
def undisturbed(world: Path, moto_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nobody killed: two rounds, the second ahead of any training, in a root on S3, as they lie there.

    On S3, so that whoever makes the same bytes in a local root shows that the store does not matter, either.
    """
    with a_bucket(moto_url, "undisturbed") as (client, env):
        run(command(world, "s3://undisturbed/root", "undisturbed.toml"), **env)
        folder = tmp_path_factory.mktemp("undisturbed")
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="undisturbed", Prefix="root/rounds/"):
            for found in page["Contents"]:
                path = folder / found["Key"].removeprefix("root/")
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file("undisturbed", found["Key"], str(path))
    return folder


@contextlib.contextmanager
def a_bucket(moto_url: str, name: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """A client of a new bucket, and the environment of a process that shall find it."""
    env = {"AWS_ENDPOINT_URL": moto_url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    env |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    client = boto3.client(
        "s3", endpoint_url=moto_url, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    yield client, env
    client.close()


def command(
    world: Path, root: str, name: str, *, workers: int = 1, address: str = "local", verb: str = "rounds", more: str = ""
) -> list[str]:
    recipe = world / name
    recipe.write_text(RECIPE.format(root=root, pool=world / "pool", workers=workers, address=address) + more)
    return [sys.executable, "-m", "curate.jobs.cli", verb, str(recipe)]


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


def run(arguments: list[str], **env: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=ENDED_S, check=False, env=os.environ | env)
    assert done.returncode == 0, done.stderr


class Disturbed:
    """A root whose rounds are disturbed, and what is there of it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, pattern: str) -> list[Path]:
        return [path for path in self.root.glob(pattern) if ".tmp-" not in str(path)]

    def embedded(self) -> dict[Path, tuple[int, int]]:
        """Every embedding file, and what changes if it is written again."""
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.files("embeddings/*/*.parquet")}

    def reached(self, number: int, what: str) -> Callable[[], bool]:
        return lambda: bool(self.files(f"rounds/r{number:06d}/{what}"))

    def assert_equal(self, undisturbed: Path) -> None:
        """Two rounds, none missing, none double, each as it would have been."""
        folders = [path.name for path in self.files("rounds/*")]
        assert sorted(folders) == ["end.json", "r000000", "r000001"]
        for name in ("r000000", "r000001"):
            for pattern in ("manifest.json", "curated-*"):
                mine, theirs = (
                    {path.name: path.read_bytes() for path in root.glob(f"rounds/{name}/{pattern}")}
                    for root in (self.root, undisturbed)
                )
                assert mine == theirs
        assert len(self.embedded()) == 2 * SHARDS


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and a node, neither of which is ours to join from here."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.timeout(600)
@pytest.mark.exhaustive
def test_schedulers_and_a_node_killed(world: Path, undisturbed: Path, tmp_path: Path, cluster: Cluster) -> None:
    """In each step of a round, and with it the driver of the round, for that is the scheduler's own process."""
    disturbed = Disturbed(tmp_path / "disturbed")
    node = cluster.add_node(num_cpus=2)
    arguments = command(world, str(disturbed.root), "cluster.toml", workers=2, address=cluster.address)

    kill_when(arguments, lambda: len(disturbed.embedded()) >= 2, lambda: len(disturbed.embedded()) == 2 * SHARDS)
    before = disturbed.embedded()

    def writing() -> bool:
        if len(disturbed.embedded()) > len(before) and node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)  # one of the two actors was there
        return disturbed.reached(0, "steps-*/written-*")()

    kill_when(arguments, writing, disturbed.reached(0, "manifest.json"))
    assert node not in cluster.worker_nodes
    embedded = disturbed.embedded()
    assert len(embedded) == 2 * SHARDS
    assert {path: embedded[path] for path in before} == before, "embedded twice"
    kill_when(arguments, disturbed.reached(1, "steps-*/selected-*"), disturbed.reached(1, "manifest.json"))
    run(arguments)
    assert disturbed.embedded() == embedded
    disturbed.assert_equal(undisturbed)


@pytest.mark.exhaustive
def test_a_deduplication_killed(world: Path, moto_url: str, tmp_path: Path) -> None:
    """In each of its steps; at last the same bytes as in a root on S3 where nothing was killed."""

    def arguments(root: str, name: str) -> list[str]:
        return command(world, root, name, verb="dedup", more="[dedup]\nthreshold = 0.9998\n")

    with a_bucket(moto_url, "dedup") as (client, env):
        run(arguments("s3://dedup/root", "dedup-s3.toml"), **env)
        expected = {
            found["Key"].removeprefix("root/"): client.get_object(Bucket="dedup", Key=found["Key"])["Body"].read()
            for found in client.list_objects_v2(Bucket="dedup", Prefix="root/dedup/")["Contents"]
        }
    assert len(expected) == 7

    root = tmp_path / "root"
    again = arguments(str(root), "dedup.toml")

    def there(name: str) -> bool:
        return bool(list(root.glob(f"dedup/*/*/{name}")))

    kill_when(again, lambda: there("cells.npy"), lambda: there("pairs-*"))
    kill_when(again, lambda: there("pairs-*"), lambda: there("dedup.json"))
    run(again)
    made = {str(path.relative_to(root)): path.read_bytes() for path in root.glob("dedup/*/*/*")}
    assert made == expected
