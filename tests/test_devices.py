"""What is computed on: GPUs that Ray gave, that come later, or that are left alone; and the memory that tasks need."""

import os

import loky
import numpy as np
import pytest
import ray
import torch

from curate.errors import UserError
from curate.jest import Embeddings, jointly_sample_batch
from curate.pipelines import cluster
from curate.pipelines.cluster import Devices, run_tasks
from curate.pipelines.embed import ACTOR_BYTES, _workers
from curate.recipe import EncoderSection, ResourcesSection
from curate.select.draw import Scale, embeddings_of


def test_cpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **how: asked.update(how))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect("local")
    assert asked["num_cpus"] == max(2, loky.cpu_count()) + 2 < 64


def asked(*_: object) -> float:
    """Of the lease that Ray runs this task under."""
    return float(ray.get_runtime_context().get_assigned_resources().get("memory", 0))


@pytest.mark.usefixtures("ray_local")
def test_tasks_that_hold_much_ask_for_it() -> None:
    many = 2**30
    assert run_tasks(asked, [0], None, title="t", memory=many) == [many]
    with pytest.raises(
        UserError, match=r"^select: a task needs 1024\.0 GiB, the largest node has [\d.]+ GiB for tasks;"
    ):
        run_tasks(asked, [0], None, title="select", memory=2**40)


@pytest.mark.usefixtures("ray_local")
def test_no_more_actors_than_can_live_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Resources": {"CPU": 8, "memory": 3.5 * ACTOR_BYTES}}] * 2)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 16})
    assert _workers(ResourcesSection(), Devices(gpus=0), ACTOR_BYTES) == 6
    assert _workers(ResourcesSection(), Devices(gpus=0), ACTOR_BYTES // 2) == 14
    assert _workers(ResourcesSection(workers=9), Devices(gpus=0), ACTOR_BYTES) == 6
    assert _workers(ResourcesSection(workers=5), Devices(gpus=3), ACTOR_BYTES) == 3
    assert _workers(ResourcesSection(workers=2), Devices(gpus=3), ACTOR_BYTES) == 2
    with pytest.raises(UserError, match=r"embed: a task needs 6\.0 GiB, the largest node has 5\.2 GiB"):
        _workers(ResourcesSection(), Devices(gpus=0), 4 * ACTOR_BYTES)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "cuda", "cpu"), [("auto", "bf16", "fp32"), ("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16")]
)
def test_the_precision_of_a_device(precision: str, cuda: str, cpu: str) -> None:
    section = EncoderSection(model="x", precision=precision)
    assert (section.precision_on("cuda"), section.precision_on("cpu")) == (cuda, cpu)
    assert EncoderSection(model="x").precision == "auto"


def test_selection_keeps_half_precision_where_it_is_fast() -> None:
    z = np.ones((3, 4), np.float16)
    scale = Scale(logit_scale=10.0, logit_bias=-10.0)
    assert embeddings_of((z, z), scale, torch.device("cpu")).zimg.dtype == torch.float32
    # Of what is not a CPU, the one that is here.
    assert embeddings_of((z, z), scale, torch.device("meta")).zimg.dtype == torch.float16


# --- on a card -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_half_precision_on_cuda_scores_as_float32_does(loss: str) -> None:
    rng = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(4, 512, 64, generator=rng), dim=-1).half()

    def drawn(device: str, dtype: torch.dtype) -> torch.Tensor:
        own, ref = (Embeddings(*z[i : i + 2].to(device, dtype), 10.0, -10.0) for i in (0, 2))
        return jointly_sample_batch(
            own, ref, sub_batch_size=64, n_chunks=1, loss=loss, gain=1e-6, generator=torch.Generator().manual_seed(1)
        )

    half, full = drawn("cuda", torch.float16), drawn("cpu", torch.float32)
    assert half.positions.cpu().equal(full.positions)
    torch.testing.assert_close(half.scores.cpu(), full.scores, atol=1e-3, rtol=1e-3)
