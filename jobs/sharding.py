"""A model whose weights are sharded over the ranks: torch's `fully_shard` (FSDP2, arXiv 2304.11277).

Each rank keeps 1/W of every weight, of its gradient and of its moments. The blocks of both towers are gathered one
after the other, forward and backward, and given up again. What lies outside of them is the root's: it is gathered for
the whole of a pass. Gradients are means over the ranks, as without. `logit_scale` and `logit_bias` are scalars, which
cannot be sharded: every rank has them whole, and `clip_gradient` makes means of their gradients.

Letters: W ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from curate.jobs.ranks import Ranks


def shard_weights(model: Any, ranks: Ranks) -> None:
    """Shard a model in place; one rank holds all of it, as without.

    Args:
        model: open_clip's with two towers, the same on every rank; from the CPU a block at a time goes to the device.
        ranks: who share it.
    """
    if ranks.world_size == 1:
        model.to(ranks.device)
        return
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    whole = scalars_of(model)
    for scalar in whole:
        scalar.data = scalar.data.to(ranks.device)
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    _unhook_scalars(model)


def blocks_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What is gathered at once: the outermost runs of equal modules, as towers of transformers and of convolutions are.

    >>> from torch.nn import Linear, Sequential
    >>> tower = Sequential(Linear(2, 3), Sequential(Sequential(Linear(3, 3)), Sequential(Linear(3, 3))))
    >>> len(list(blocks_of(tower)))
    2
    """
    for child in module.children():
        ones = list(child.children()) if isinstance(child, torch.nn.ModuleList | torch.nn.Sequential) else []
        if len(ones) > 1 and len({type(one) for one in ones}) == 1:
            yield from (one for one in ones if next(one.parameters(), None) is not None)
        else:
            yield from blocks_of(child)


def scalars_of(model: Any) -> list[torch.nn.Parameter]:
    """The weights that every rank has whole."""
    return [model.logit_scale, *([] if getattr(model, "logit_bias", None) is None else [model.logit_bias])]


def is_sharded(model: Any) -> bool:
    """Whether `shard_weights` has sharded it."""
    return isinstance(model, FSDPModule)


def compile_model(model: Any) -> None:
    """Have torch.compile make a model, in place, so that names of weights stay.

    Of one that is sharded it makes each block: between them weights are gathered, which is not its to make.
    """
    # Parts of a batch have two sizes at most, each compiled by itself.
    if not is_sharded(model):
        model.compile(dynamic=False)
        return
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, dynamic=False)


def by_layout(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those that are sharded and those that are not, without empty parts: no operation takes both together."""
    parts = ([one for one in tensors if isinstance(one, DTensor) == sharded] for sharded in (True, False))
    return [part for part in parts if part]


def clip_gradient(model: Any, ranks: Ranks, most: float) -> float:
    """Bring the norm of the gradient, over all shards, down to `most`; returns what it was."""
    if is_sharded(model):
        for scalar in scalars_of(model):
            if scalar.grad is not None:
                ranks.sum(scalar.grad).div_(ranks.world_size)
    parts = by_layout([weight for weight in model.parameters() if weight.grad is not None])
    norms = [
        whole_tensor(get_total_norm([weight.grad for weight in part if weight.grad is not None])) for part in parts
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in parts:
        clip_grads_with_norm_(part, most, norm)
    return norm.item()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards, for which all ranks call this; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Tensors with all of their shards, gathered one after the other: all ranks call it, and one may keep none."""
    found = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            found[name] = whole.cpu().contiguous()
    return found


def laid_out(tensor: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, which every rank has, sharded as another of its shape is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def whole_model(model: Any, make: Callable[[], Any], ranks: Ranks) -> Any:
    """A model with all of its weights.

    Args:
        model: if it is sharded, all ranks call this.
        make: another of its architecture, on the CPU, which gets the weights.
        ranks: who share it.

    Returns:
        `model` itself if it is not sharded; else the other one on the first rank, and None on the others.
    """
    if not is_sharded(model):
        return model
    weights = whole_on_cpu(model.state_dict(), keep=ranks.first)
    if not ranks.first:
        return None
    whole = make()
    whole.load_state_dict(weights, assign=True)
    return whole


@contextmanager
def encoding(model: Any) -> Iterator[None]:
    """Within it `encode_image` and `encode_text` gather weights as a forward pass does; all ranks call them alike."""
    if not is_sharded(model):
        yield
        return
    names = ("encode_image", "encode_text")
    for name in names:
        register_fsdp_forward_method(model, name)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
        model.reshard()  # without a backward pass, what the root has gathered stays


def _unhook_scalars(model: Any) -> None:
    """Return copies of the scalars: FSDP hangs a hook on each output, and a weight would keep those of all steps."""
    forward = model.forward

    def forward_with_copies(*inputs: Any, **named: Any) -> tuple[Any, ...]:
        zimg, ztxt, *scalars = forward(*inputs, **named)
        return zimg, ztxt, *(scalar.clone() for scalar in scalars)

    model.forward = forward_with_copies
