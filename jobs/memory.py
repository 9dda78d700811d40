"""What one rank of the trainer holds in memory, known before it is trained."""

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curate.jobs.contrastive import TILE_LOGITS, TILES_HELD
from curate.jobs.sharding import blocks_of
from curate.messages import counted
from curate.models.encoder import image_size_of
from curate.models.resolution import TwoResolutions
from curate.reader.pieces import PIECE_ROWS
from curate.recipe import DeviceType, TrainSection

PREFETCHED = 2
"""Pieces that each of a loader's processes holds ahead: torch's default."""
NODE_RANKS = 8
"""As many as a usual node has GPUs."""


@dataclass(frozen=True, kw_only=True)
class TrainerMemory:
    """Bytes that tensors hold on each rank: on its device, and in the memory of its machine; on a CPU the two are one.

    Allocators keep more: glibc's up to 1.7 times as much in what was measured.
    """

    weights: int
    """With gradients, those that are sent, and AdamW's two moments; of sharded ones, this rank's."""
    gathered: int
    """Of sharded ones, those that are whole for a while, with their gradients, at the peak."""
    activations: int
    """Of a forward and backward pass of one micro-batch, at the peak."""
    loss: int
    """Embeddings of the batch, their gradients, and the tiles of logits."""
    batches: int
    """Pixels and token ids of the share of two batches: one is put together while the other is trained on."""
    loaders: int
    """Pieces that processes hand over, in shared memory."""
    device_type: DeviceType
    micro_batch: int
    """Pairs of a forward pass."""
    rows: int
    """Of this rank's share of a batch."""
    ranks: int
    """W, that share the batch."""

    @property
    def device(self) -> int:
        """On the device."""
        return self.weights + self.gathered + self.activations + self.loss

    @property
    def host(self) -> int:
        """Beside it."""
        return self.batches + self.loaders

    def __str__(self) -> str:
        share = f" as one of {self.ranks} and {_gb(self.gathered)} gathered" if self.gathered else ""
        return (
            f"{_gb(self.device)} on its {self.device_type} (weights, gradients and moments {_gb(self.weights)}{share}, "
            f"activations of {counted(self.micro_batch, 'pair')} {_gb(self.activations)}, the loss {_gb(self.loss)}), "
            f"{_gb(self.host)} in memory (shares of {counted(self.rows, 'picture')} {_gb(self.batches)}, loaders "
            f"{_gb(self.loaders)})"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def stated_ranks(batch: int, settings: TrainSection) -> int:
    """Ranks that a statement is made for before there are any: one, or where they share weights those of a usual node.

    >>> stated_ranks(4096, TrainSection()), stated_ranks(4096, TrainSection(fully_shard=True))
    (1, 8)
    """
    return max(ranks for ranks in range(1, NODE_RANKS + 1) if batch % ranks == 0) if settings.fully_shard else 1


def trainer_memory(
    model: Any,
    *,
    rows: int,
    batch: int,
    embed_dim: int,
    settings: TrainSection,
    device_type: DeviceType,
    smaller: int | None = None,
) -> TrainerMemory:
    """What training holds, from shapes alone: nothing is computed.

    Args:
        model: open_clip's, on the CPU, made for this: it is prepared for training.
        rows: of this rank's share of a batch, b / W.
        batch: b.
        embed_dim: D.
        settings: the recipe's.
        device_type: what it trains on: a GPU computes in bf16.
        smaller: height and width at which `approximate_share` of the pictures are seen; needed where it is not 0.

    Raises:
        RuntimeError: the forward pass depends on values, so that shapes do not tell.
    """
    if settings.grad_checkpointing:
        model.set_grad_checkpointing()
    model.train()
    ranks = batch // rows
    sharded = settings.fully_shard and ranks > 1
    # DistributedDataParallel has a second copy of the gradient, in the buckets that it sends.
    times = 5 if ranks > 1 and not sharded else 4
    weights = sum(weight.nbytes * (times if weight.requires_grad else 1) for weight in model.parameters())
    height, width = image_size_of(model)
    micro_batch = min(rows, settings.micro_batch)
    row_bytes = height * width * 3 + 8 * model.context_length
    return TrainerMemory(
        weights=-(-weights // ranks) if sharded else weights,
        gathered=_gathered_bytes(model) if sharded else 0,
        activations=_peak_bytes(model, micro_batch, settings.approximate_share, smaller, bf16=device_type == "cuda"),
        # Of both towers: this rank's, their parts and gradients; of one tower at a time: the whole batch's, and theirs.
        loss=4 * embed_dim * (6 * rows + 2 * batch) + 4 * TILES_HELD * min(rows * batch, max(TILE_LOGITS, batch)),
        batches=(2 if settings.workers else 1) * rows * row_bytes,
        loaders=settings.workers * PREFETCHED * PIECE_ROWS * row_bytes if settings.data == "rounds" else 0,
        device_type=device_type,
        micro_batch=micro_batch,
        rows=rows,
        ranks=ranks,
    )


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def _gathered_bytes(model: Any) -> int:
    """Most bytes of weights that are not this rank's own and of their gradients."""
    blocks = [_bytes_of(block) for block in blocks_of(model)]
    root = _bytes_of(model) - sum(blocks)
    # Of the root weights and gradient. In the backward pass of a block likewise; beside it the gradient of the block
    # before is on its way to those who keep it, and the weights of the next one are on theirs.
    return 2 * root + 4 * max(blocks, default=0)


def _peak_bytes(model: Any, rows: int, share: float, smaller: int | None, *, bf16: bool) -> int:
    """Most bytes that a forward and backward pass holds at once, beside the weights and their gradients."""
    # Without a GPU, fake tensors pretend that there is one. Autograd counts devices at its first backward pass: were
    # that one of theirs, it would start threads for a GPU, and processes forked later could not differentiate.
    torch.autograd.backward(torch.ones(1, requires_grad=True).sum())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        state: dict[str, Tensor] = {
            name: fake.from_tensor(value) for name, value in model.state_dict(keep_vars=True).items()
        }
        for weight in state.values():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        texts = torch.zeros(rows, model.context_length, dtype=torch.int64)
        small = 0 if smaller is None else round(rows * share)
        sees = contextlib.nullcontext() if smaller is None else TwoResolutions(model, smaller).installed()
        with _Live(state.values()) as live, sees:
            whole = torch.zeros(rows - small, 3, *image_size_of(model))
            images = whole if smaller is None else (whole, torch.zeros(small, 3, smaller, smaller), torch.arange(rows))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
                zimg, ztxt, *_ = functional_call(model, state, (images, texts))
            torch.autograd.backward(zimg.float().sum() + ztxt.float().sum())
        return int(live.peak)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations have made and that are still there.

    Args:
        given: tensors that are not counted, nor are their views, which operations return as well.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
