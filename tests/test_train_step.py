"""A step in micro-batches is the step of the whole batch, and the tiled loss is open_clip's, to rounding."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from curate.errors import UserError
from curate.jobs.contrastive import contrastive_loss
from curate.jobs.optimize import Trainee, make_optimizer, take_step
from curate.jobs.ranks import Ranks, join_ranks
from curate.jobs.sharding import shard_weights
from curate.models.encoder import load_model, normalize_pixels, split_transform
from curate.recipe import TrainSection
from curate.storage import Store
from tests.helpers import CPU, tiny_encoder

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(240)

ALONE = Ranks(rank=0, world_size=1, device=CPU)
FORK = multiprocessing.get_context("fork")
LOSSES = ["sigmoid", "softmax"]


def on_ranks(count: int, run: Callable[[Ranks], Any]) -> None:
    """Run this in so many processes that have joined each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def process(rank: int) -> None:
        where = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in where.items()}
        with join_ranks() as ranks:
            run(ranks)

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(count)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(200)
    assert [each.exitcode for each in processes] == [0] * count


# --- the loss against open_clip's ----------------------------------------------------------------------------------


def leaves(b: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Embeddings of b pairs, a little alike, with scale and bias: all want a gradient."""
    draw = torch.Generator().manual_seed(b)
    zimg = normalize(torch.randn(b, 24, generator=draw, dtype=torch.float64), dim=1)
    ztxt = normalize(zimg + torch.randn(b, 24, generator=draw, dtype=torch.float64), dim=1)
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (14.0, -10.0)]
    return [value.to(dtype).requires_grad_() for value in (zimg, ztxt, *scalars)]


def literal(loss: str, zimg: Tensor, ztxt: Tensor, scale: Tensor, bias: Tensor, ranks: Ranks = ALONE) -> Tensor:
    where = {"rank": ranks.rank, "world_size": ranks.world_size}
    if loss == "sigmoid":
        return open_clip.loss.SigLipLoss(**where)(zimg, ztxt, scale, bias)
    return open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, **where)(zimg, ztxt, scale)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("b", "tile_rows"), [(1, 1), (7, 1), (7, 3), (64, 64), (64, 10), (300, 128)])
def test_the_tiled_loss_is_open_clips(loss: str, b: int, tile_rows: int) -> None:
    ours, theirs = leaves(b, torch.float64), leaves(b, torch.float64)
    found = contrastive_loss(*ours, loss=loss, ranks=ALONE, tile_logits=tile_rows * b)
    expected = literal(loss, *theirs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    (3 * found).backward()
    (3 * expected).backward()
    for mine, its in zip(ours, theirs, strict=True):
        wanted = torch.zeros_like(mine) if its.grad is None else its.grad  # the softmax loss has no bias
        torch.testing.assert_close(mine.grad, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_tiled_loss_in_single_precision(loss: str) -> None:
    ours, theirs = leaves(2048), leaves(2048)
    found, expected = contrastive_loss(*ours, loss=loss, ranks=ALONE, tile_logits=2**18), literal(loss, *theirs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    found.backward()
    expected.backward()
    for mine, its in zip(ours, theirs, strict=True):
        if its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("count", [2, 3])
def test_the_tiled_loss_over_ranks(loss: str, count: int) -> None:
    def compare(ranks: Ranks) -> None:
        b = 8 * count
        mine = slice(8 * ranks.rank, 8 * ranks.rank + 8)
        parts = [[z.detach()[mine].clone().requires_grad_() for z in leaves(b)[:2]] + leaves(b)[2:] for _ in range(2)]
        whole = leaves(b)
        found = contrastive_loss(*parts[0], loss=loss, ranks=ranks, tile_logits=3 * b)
        expected = literal(loss, *parts[1], ranks=ranks)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        found.backward()
        expected.backward()
        for ours, theirs in zip(*parts, strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
        # And the mean over the ranks is the loss of the whole.
        together = contrastive_loss(*whole, loss=loss, ranks=ALONE)
        together.backward()
        assert ranks.mean(found) == pytest.approx(together.item(), abs=1e-5)
        torch.testing.assert_close(parts[0][0].grad / count, whole[0].grad[mine], atol=1e-6, rtol=1e-5)

    on_ranks(count, compare)


# --- the step --------------------------------------------------------------------------------------------------------


def trainee_of(
    folder: Path, loss: str, ranks: Ranks = ALONE, micro_batch: int = 10**6, *, shard: bool = False, **changes: Any
) -> Trainee:
    """A tiny model, the same each time; with `changes` of its configuration."""
    store = Store(str(folder / f"root-{ranks.rank}"))
    spec = tiny_encoder(store, folder / f"config-{ranks.rank}", **changes)
    model = load_model(store, spec, ranks.device)[0]
    if loss == "softmax" and model.logit_bias is not None:
        model.logit_bias.requires_grad_(False)
    if shard:
        shard_weights(model, ranks)
    settings = TrainSection(micro_batch=micro_batch)
    shift = split_transform(model)[1]
    return Trainee(
        model=model,
        parallel=ranks.wrap(model),
        optimizer=make_optimizer(model, settings),
        loss=loss,
        ranks=ranks,
        normalize=lambda pixels: normalize_pixels(pixels, shift),
        micro_batch=micro_batch,
        grad_clip=1e6,
    )


def batch_of(b: int, size: int = 32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (b, size, size, 3), dtype=torch.uint8, generator=draw)
    return pixels, torch.randint(1, 49407, (b, 24), generator=draw)


def gradients(trainee: Trainee, pixels: Tensor, texts: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step, the same draws each time."""
    torch.manual_seed(5)
    loss, _ = take_step(trainee, pixels, texts, rate=0.0)
    found = {name: weight.grad for name, weight in trainee.model.named_parameters() if weight.grad is not None}
    assert found
    return loss, found


DROPOUT = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
                          "patch_dropout": 0.5}}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "b", "micro_batch", "changes"),
    [
        *((loss, *case, {}) for loss in LOSSES for case in [(2048, 256), (2048, 300), (48, 1), (48, 47)]),
        *((loss, 48, 16, DROPOUT) for loss in LOSSES),
        ("softmax", 48, 16, {"init_logit_bias": None}),
    ],
)
def test_micro_batches_are_one_step(tmp_path: Path, loss: str, b: int, micro_batch: int, changes: Any) -> None:
    batch = batch_of(b)
    split = trainee_of(tmp_path, loss, micro_batch=micro_batch, **changes)
    drops = "vision_cfg" in changes
    whole = trainee_of(tmp_path, loss, **changes)
    value, found = gradients(split, *batch)
    if drops:  # in parts, other patches are dropped than in one pass; the same ones each time
        again = gradients(split, *batch)
        assert value == again[0]
        assert all(grad.equal(again[1][name]) for name, grad in found.items())
        value_in_parts, expected = literally(whole, *batch, micro_batch=micro_batch)
    else:
        value_in_parts, expected = gradients(whole, *batch)
    assert value == pytest.approx(value_in_parts, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def literally(trainee: Trainee, pixels: Tensor, texts: Tensor, *, micro_batch: int) -> tuple[float, dict[str, Tensor]]:
    """The step with all graphs of all parts kept until the loss is known."""
    torch.manual_seed(5)
    trainee.model.train()
    parts = [
        trainee.model(trainee.normalize(pixels[i : i + micro_batch]), texts[i : i + micro_batch])
        for i in range(0, len(pixels), micro_batch)
    ]
    zimg, ztxt = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    value = literal(trainee.loss, zimg, ztxt, *parts[0][2:4])
    value.backward()
    return value.item(), {n: w.grad for n, w in trainee.model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch", [32, 5])
def test_micro_batches_on_two_ranks(tmp_path: Path, loss: str, micro_batch: int) -> None:
    pixels, texts = batch_of(64)
    value, expected = gradients(trainee_of(tmp_path, loss), pixels, texts)

    def compare(ranks: Ranks) -> None:
        mine = slice(32 * ranks.rank, 32 * ranks.rank + 32)
        trainee = trainee_of(tmp_path, loss, ranks, micro_batch)
        for _ in range(2):  # what one step leaves in the buckets must not be in the next one's gradients
            ours, found = gradients(trainee, pixels[mine], texts[mine])
            assert ours == pytest.approx(value, abs=1e-5)
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5)
        dist.barrier()

    on_ranks(2, compare)


@pytest.mark.parametrize("micro_batch", [48, 16])
def test_grad_checkpointing_changes_nothing(tmp_path: Path, micro_batch: int) -> None:
    batch = batch_of(48)
    value, expected = gradients(trainee_of(tmp_path, "sigmoid"), *batch)
    trainee = trainee_of(tmp_path, "sigmoid", micro_batch=micro_batch)
    trainee.model.set_grad_checkpointing()
    ours, found = gradients(trainee, *batch)
    assert ours == pytest.approx(value, abs=1e-6)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.exhaustive  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")  # and says what it thinks of the model
@pytest.mark.parametrize("changes", [{}, DROPOUT])
def test_a_compiled_model_learns_the_same(tmp_path: Path, changes: Any) -> None:
    batch = batch_of(48)
    trainee = replace(trainee_of(tmp_path, "sigmoid", micro_batch=16, **changes), compiled=True)
    trainee.model.compile(dynamic=False)
    names = set(trainee.model.state_dict())
    value, found = gradients(trainee, *batch)
    # What it drops is drawn by compiled code, so that the literal step runs the same.
    whole = trainee_of(tmp_path, "sigmoid", **changes)
    assert set(whole.model.state_dict()) == names
    if changes:
        whole.model.compile(dynamic=False)
    expected_value, expected = literally(whole, *batch, micro_batch=16)
    assert value == pytest.approx(expected_value, abs=1e-5)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_batch_normalisation_cannot_be_split(tmp_path: Path) -> None:
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    trainee = trainee_of(tmp_path, "sigmoid", micro_batch=3, vision_cfg=resnet)
    with pytest.raises(UserError, match=r"train.micro_batch = 3: .* batch normalisation, .* set train.micro_batch = 8"):
        take_step(trainee, *batch_of(8), rate=0.0)
