"""Logits of pairs, reduced row by row and never stored: what a row adds to a loss, given some columns.

    logit[i, j] = scale · rows[i] · columns[j] + bias        rows [B, D], columns [c, D]

In tiles that a CPU's cache holds; on CUDA, for embeddings in half precision, in tiles that never leave the chip
(`curate.kernels`). Either way products are summed in float32, or in float64 for float64 embeddings.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Logits of one tile that is stored. On a CPU it stays in the second-level cache between product and reduction (512 kB
# in float32; of 2^15 to 2^20 the fastest at D = 512, c = 256). On CUDA 128 MiB, whatever is free: another height may
# multiply in another order, and a rounding may change a draw.
TILE_LOGITS = {"cpu": 1 << 17, "cuda": 1 << 25}
TIE = 1e-6
"""Cosines of unit rows closer than this are equal: float32 sums of one vector's products differ in their last bits."""
HAS_TRITON = find_spec("triton") is not None


def add_softplus_(running: Tensor, rows: Tensor, columns: Tensor, *, scale: float, bias: float, sign: int = 1) -> None:
    """Add to ``running`` [B] each row's sum of softplus(logit) over the columns, times ``sign``."""
    if _is_fused(rows):
        from curate.kernels import reduce_logits  # noqa: PLC0415

        running.add_(reduce_logits(rows, columns, scale, bias, softplus=True), alpha=sign)
        return
    for at, tile in _tiles(rows, columns, scale, bias):
        # As log Π(1 + e^-|x|) + Σ relu(x), 32 factors to a log, it was no faster.
        running[at].add_(softplus(tile).sum(1), alpha=sign)


def add_logsumexp_(running: Tensor, rows: Tensor, columns: Tensor, *, scale: float) -> None:
    """Add to the log-sum-exps ``running`` [B] those of each row's logits; the bias cancels in what they are for."""
    if _is_fused(rows):
        from curate.kernels import reduce_logits  # noqa: PLC0415

        torch.logaddexp(running, reduce_logits(rows, columns, scale, 0.0, softplus=False), out=running)
        return
    for at, tile in _tiles(rows, columns, scale, 0.0):
        peak = tile.amax(1, keepdim=True)
        tile_lse = tile.sub_(peak).exp_().sum(1).log_().add_(peak.squeeze(1))
        torch.logaddexp(running[at], tile_lse, out=running[at])


def diagonal_cosines(zimg: Tensor, ztxt: Tensor) -> Tensor:
    """Product [B] of each row with its own pair's, block by block in one buffer: no [B, D] temporary arises."""
    B, D = zimg.shape
    cosines = zimg.new_empty(B, dtype=accumulator(zimg))
    buffer = _buffer(cosines, D)
    block_rows = len(buffer) // max(1, D)
    for start in range(0, B, block_rows):
        block = zimg[start : start + block_rows]
        products = buffer[: block.numel()].view_as(block).copy_(block).mul_(ztxt[start : start + block_rows])
        cosines[start : start + block_rows] = products.sum(1)
    return cosines


def accumulator(*arrays: Tensor) -> torch.dtype:
    """What products of these arrays are summed in."""
    return torch.float64 if any(z.dtype == torch.float64 for z in arrays) else torch.float32


def _is_fused(rows: Tensor) -> bool:
    return HAS_TRITON and rows.is_cuda and rows.element_size() == 2


def _tiles(rows: Tensor, columns: Tensor, scale: float, bias: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield logits in blocks of rows; the next tile overwrites this one."""
    dtype, width = accumulator(rows), len(columns)
    buffer = _buffer(rows.new_empty(0, dtype=dtype), width)
    bias_term = buffer.new_full((), bias)
    # Half precision: CUDA multiplies it as it is and sums in float32; a CPU is faster once it is widened.
    as_it_is = rows.is_cuda and rows.element_size() == 2
    columns = columns if as_it_is else columns.to(dtype)
    block_rows = buffer.numel() // width
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        tile = buffer[: len(block) * width].view(len(block), width)
        if as_it_is:
            torch.mm(block, columns.T, out_dtype=dtype, out=tile)
        else:
            torch.mm(block.to(dtype), columns.T, out=tile)
        torch.add(bias_term, tile, alpha=scale, out=tile)  # one pass for both
        yield slice(start, start + len(block)), tile


def _buffer(like: Tensor, columns: int) -> Tensor:
    return like.new_empty(max(TILE_LOGITS.get(like.device.type, TILE_LOGITS["cuda"]), columns))
