"""The trainer's processes: one, or as many as torchrun started."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from curate.errors import UserError
from curate.recipe import DeviceType

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)
"""All ranks but the first wait in a collective while that one waits for a round."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its fellows."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def device_type(self) -> DeviceType:
        """As `torch.device.type` names it."""
        return "cuda" if self.device.type == "cuda" else "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, writes and speaks."""
        return self.rank == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first rank decides, on every rank."""
        value = [decide() if self.first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(value, src=0, device=torch.device("cpu"))
        return value[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on the first; empty on the others."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.gather_object(value, found if self.first else None, dst=0)
        return found if self.first else []

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over all ranks, on every rank."""
        return self.sum(value.detach().clone()).item() / self.world_size

    def concatenate(self, part: Tensor) -> Tensor:
        """Every rank's part [n, ...] in the order of the ranks, [W · n, ...], without a gradient."""
        if self.world_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank; in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def wrap(self, model: Any) -> Any:
        """The model such that its gradients are means over all ranks; one that is sharded sees to that itself."""
        if self.world_size == 1 or isinstance(model, FSDPModule):
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)


@contextlib.contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, as its environment variables say; alone without them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=device)
        return
    if cuda:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: rank {device.index} of this machine finds {torch.cuda.device_count()} GPUs; start "
                "as many ranks as there are GPUs"
            )
        torch.cuda.set_device(device)
    # Decisions and uids go through gloo, so that waiting for a round does not keep a GPU busy.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()
