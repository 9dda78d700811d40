"""What tests run in a process of its own, because it needs a Ray of its own; each function is one such run."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from curate.embed.run import Embedder, embed_shard, reading_for
from curate.errors import ClusterError, UserError
from curate.models.encoder import load_encoder
from curate.pipelines.cluster import CPUS, Devices, connect, device, run_tasks, take_devices
from curate.pipelines.crops import Croppers
from curate.recipe import EmbedSection, ResourcesSection
from curate.storage import Store
from tests.helpers import drawn_pool, tiny_encoder


def found(*_: Any) -> tuple[int, list[str], str]:
    """Of a task: its process, the GPUs that it was given, and where it computes."""
    torch.cuda.is_available = lambda: True
    return os.getpid(), ray.get_runtime_context().get_accelerator_ids()["GPU"], str(device())


def compute(*_: Any) -> str:
    """Where a task computes whose torch finds no CUDA."""
    torch.cuda.is_available = lambda: False
    return str(device())


def late(i: int, _: Any) -> tuple[int, list[str]]:
    """A task that takes its time."""
    time.sleep(0.2 * i)
    return os.getpid(), ray.get_runtime_context().get_accelerator_ids()["GPU"]


def die(*_: Any) -> None:
    """A task that takes its process with it."""
    os._exit(1)


def pretended_gpus() -> None:
    """Ray believes in two GPUs that every process sees, as on a node that has them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)

    # The driver and tasks that were given no GPU.
    torch.cuda.is_available = lambda: True
    assert device() == torch.device("cpu")
    assert {where for _, _, where in run_tasks(found, range(2), None, title="tasks")} == {"cpu"}

    two = Devices(gpus=2)
    # Tasks on GPUs: a process has one of them from the first to the last.
    seen = run_tasks(found, range(6), None, title="tasks", devices=two)
    assert {where for _, _, where in seen} == {"cuda:0"}
    assert sorted({(pid, *ids) for pid, ids, _ in seen}, key=lambda seen: seen[1]) == [
        (pid, number) for number in ("0", "1") for pid in {pid for pid, ids, _ in seen if ids == [number]}
    ]
    assert len({pid for pid, _, _ in seen}) == 2

    # And none where the recipe says CPUs.
    seen = run_tasks(found, range(2), None, title="tasks", devices=CPUS)
    assert {where for _, _, where in seen} == {"cpu"}

    # A GPU that Ray counts and torch cannot use.
    with pytest.raises(UserError, match=r"^node .*: Ray gave GPU [01] to a worker whose torch .* finds no CUDA"):
        run_tasks(compute, [0], None, title="tasks", devices=Devices(gpus=2))


def gpus_of_several_steps() -> None:
    """A process of one step has no other GPU in a later one. Who finishes first decides what Ray lends to whom."""
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)

    seen: dict[int, set[str]] = {}
    for order in ([0, 1], [1, 0], [1, 0]):
        for pid, ids in run_tasks(late, order, None, title="tasks", devices=Devices(gpus=2)):
            seen.setdefault(pid, set()).update(ids)
    assert {len(ids) for ids in seen.values()} == {1}, seen


def gpus_that_come_later() -> None:
    """A cluster of CPU nodes that a GPU node joins."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    connect(cluster.address)
    said: list[str] = []

    def resources(**how: Any) -> ResourcesSection:
        return ResourcesSection(address=cluster.address, **how)

    assert take_devices(resources(device="cpu"), said.append) == CPUS
    assert said == []
    assert take_devices(resources(), said.append) == CPUS
    assert said == [
        "computing on CPUs: Ray finds no GPU on the cluster's 2 nodes; resources.device = 'cuda' would insist on one"
    ]
    with pytest.raises(UserError) as caught:
        take_devices(resources(device="cuda", wait_s=1), said.append)
    assert "expected 1 GPU in the cluster, found 0 on 2 nodes after 1 s; add GPU nodes" in str(caught.value)
    said.clear()

    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(take_devices, resources(device="cuda", workers=2, wait_s=60), said.append)
        time.sleep(2)
        assert not waiting.done()
        cluster.add_node(num_cpus=2, num_gpus=2)
        assert waiting.result(timeout=30) == Devices(gpus=2)
    assert said == ["waiting for 2 GPUs: 0 there; for 60 s at most"]
    said.clear()
    assert take_devices(resources(), said.append) == Devices(gpus=2)
    assert said == ["computing on 2 GPUs of the cluster's 3 nodes; resources.device = 'cpu' would leave them alone"]
    ray.shutdown()
    cluster.shutdown()


def a_laptop_that_is_told_to_use_gpus() -> None:
    """Nothing can join a Ray that was started here, so nothing is waited for; and nothing is said or overruled.

    For tests/test_environment.py, which has an environment to try it in.
    """
    came = []
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    connect("local")
    os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"expected 1 GPU on this machine, found 0; set resources.device to"):
        take_devices(ResourcesSection(device="cuda"), print)
    assert time.monotonic() - began < 5


def a_worker_that_dies() -> None:
    """Again and again: nothing of it is told but what is raised."""
    connect("local")
    with pytest.raises(ClusterError, match="Ray: a worker died"):
        run_tasks(die, [0], None, title="tasks")


def crops_of_another_node() -> None:
    """Pictures that are decoded on two nodes, of which one is lost on the way."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    lost = cluster.add_node(num_cpus=2)
    connect(cluster.address)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/root")
        pool = drawn_pool(Path(folder) / "pool", rows=240, shards=4, broken_share=0.2)
        encoder = load_encoder(store, tiny_encoder(store, Path(folder)), torch.device("cpu"))
        settings = EmbedSection(batch_size=9, chunk_rows=20)
        croppers = Croppers(reading_for({"x": encoder}), 2, pin=False)

        def nodes() -> set[str]:
            return set(ray.get([actor.__ray_call__.remote(node) for actor in croppers._actors]))

        assert len(nodes()) == 2
        embedder = Embedder({"x": encoder}, settings, loader=croppers)
        for shard in pool.shards:
            embed_shard(shard, {f"here/{shard.index}": encoder}, store, settings)
            embedder.embed(shard, {"x": f"there/{shard.index}"}, store)
            assert store.read_bytes(f"here/{shard.index}") == store.read_bytes(f"there/{shard.index}")
            if shard.index == 1:
                cluster.remove_node(lost, allow_graceful=False)
        embedder.close()
    ray.shutdown()
    cluster.shutdown()


def node(_: Any) -> str:
    """Where an actor is."""
    return str(ray.get_runtime_context().get_node_id())


RUNS: tuple[Callable[[], None], ...] = (pretended_gpus,)
LONG_RUNS: tuple[Callable[[], None], ...] = (
    gpus_of_several_steps,
    gpus_that_come_later,
    a_worker_that_dies,
    crops_of_another_node,
)
"""For make test-all: each starts several nodes or actors."""
