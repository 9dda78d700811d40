"""Triton kernels: products of half-precision rows whose tiles never leave the chip.

    reduce_logits  each row's softplus sum or log-sum-exp over its logits with some columns: `curate.logits`
    near_tiles     pairs of rows whose product is at least a threshold: `curate.dedup.neighbours`

A tile is summed in float32 by the tensor cores and used where it lies, in registers: written out, 20 G logits in
float32 are 80 GB, and each pass over them takes as long as their product. Tile shapes are fixed, not tuned on the card
at hand: another shape sums in another order, and a rounding may change a draw.

Importing this needs Triton, which comes with torch where torch knows CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGIT_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
NEAR_TILE = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def reduce_logits(rows: Tensor, columns: Tensor, scale: float, bias: float, *, softplus: bool) -> Tensor:
    """Reduce ``scale · rows @ columns.T + bias`` over the columns.

    Args:
        rows: Half precision [B, D].
        columns: [c, D], of the same dtype; c at least 1.
        scale: Factor on each product.
        bias: Added to each.
        softplus: Sum softplus, or else give the log-sum-exp.

    Returns:
        Float32 [B]. A row's value depends on that row and the columns alone, not on where it lies among the rows.
    """
    out = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    if len(rows):
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            _reduce_logits[(triton.cdiv(len(rows), LOGIT_TILE["ROWS"]),)](
                rows.contiguous(),
                columns.contiguous(),
                out,
                len(rows),
                len(columns),
                rows.shape[1],
                float(scale),
                float(bias),
                SOFTPLUS=softplus,
                WHOLE=rows.shape[1] % LOGIT_TILE["DEPTH"] == 0,
                **LOGIT_TILE,
            )
    return out


def near_tiles(
    z: Tensor, threshold: float, top: int, bottom: int, left: int, right: int, *, fresh: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Find pairs (i, j), i < j, one of them fresh, whose product is at least a threshold, in a rectangle.

    Args:
        z: Half precision [n, D], contiguous; n below 2^31.
        threshold: Least product in float32.
        top: First i.
        bottom: After the last i, at most 2^23 beyond the first.
        left: First j.
        right: After the last j.
        fresh: Bool [n].
        capacity: Pairs that there is room for.

    Returns:
        Pairs, int64 [capacity], each i · 2^32 + j, in no order; and int64 [1], how many there are: if more than
        ``capacity``, some are missing, otherwise what follows them is undefined. Neither waits for the device.
    """
    found = torch.empty(capacity, dtype=torch.int64, device=z.device)
    count = torch.zeros(1, dtype=torch.int64, device=z.device)
    grid = triton.cdiv(right - left, NEAR_TILE["COLUMNS"]), triton.cdiv(bottom - top, NEAR_TILE["ROWS"])
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        _near_tiles[grid](
            z,
            fresh.view(torch.uint8),
            found,
            count,
            capacity,
            top,
            bottom,
            left,
            right,
            z.shape[1],
            float(threshold),
            WHOLE=z.shape[1] % NEAR_TILE["DEPTH"] == 0,
            **NEAR_TILE,
        )
    return found, count


@triton.jit
def _product(
    rows, columns, i, j, D, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """Rows i [ROWS] times columns j [COLUMNS] of arrays [·, D], summed in float32."""
    tile = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    left = rows + i.to(tl.int64)[:, None] * D
    right = columns + j.to(tl.int64)[None, :] * D
    for start in range(0, D, DEPTH):
        d = start + tl.arange(0, DEPTH)
        if WHOLE:
            a = tl.load(left + d[None, :])
            b = tl.load(right + d[:, None])
        else:
            a = tl.load(left + d[None, :], mask=d[None, :] < D, other=0.0)
            b = tl.load(right + d[:, None], mask=d[:, None] < D, other=0.0)
        tile = tl.dot(a, b, tile)
    return tile


@triton.jit
def _softplus(x):
    """Softplus of a tile in registers."""
    # max(x, 0) + log(1 + t), t = exp(-|x|); 1 + t rounds small t away, which three terms of the series keep.
    t = tl.exp(-tl.abs(x))
    series = t * (1.0 - t * (0.5 - t * 0.3333333333333333))
    return tl.maximum(x, 0.0) + tl.where(t < 0.0078125, series, tl.log(1.0 + t))


@triton.jit
def _reduce_logits(
    rows,
    columns,
    out,
    B,
    c,
    D,
    scale,
    bias,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write each row's value: one program for ROWS rows, which goes through all columns."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows and columns beyond the last are the last again, which needs no mask; they are left out of what is written.
    i = tl.minimum(at, B - 1)
    total = tl.zeros((ROWS,), dtype=tl.float32)  # of softplus, or of exp(logit - peak)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for first in range(0, c, COLUMNS):
        to = first + tl.arange(0, COLUMNS)
        tile = _product(rows, columns, i, tl.minimum(to, c - 1), D, WHOLE, ROWS, COLUMNS, DEPTH)
        logits = tl.where(to[None, :] < c, tile * scale + bias, float("-inf"))
        if SOFTPLUS:
            # In halves, or what lies between exp and sum outgrows the registers.
            lower, upper = logits.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
            total += tl.sum(_softplus(lower), 1)
            total += tl.sum(_softplus(upper), 1)
        else:
            higher = tl.maximum(peak, tl.max(logits, 1))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
            peak = higher
    tl.store(out + at, total if SOFTPLUS else peak + tl.log(total), mask=at < B)


@triton.jit
def _near_tiles(
    z,
    fresh,
    found,
    count,
    capacity,
    top,
    bottom,
    left,
    right,
    D,
    threshold,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Append the pairs of one tile to `found`."""
    first_i = top + tl.program_id(1) * ROWS
    first_j = left + tl.program_id(0) * COLUMNS
    if first_j + COLUMNS - 1 > first_i:  # else no j is above its i
        i = first_i + tl.arange(0, ROWS)
        j = first_j + tl.arange(0, COLUMNS)
        new_i = tl.load(fresh + i, mask=i < bottom, other=0)
        new_j = tl.load(fresh + j, mask=j < right, other=0)
        if tl.max(new_i, 0) + tl.max(new_j, 0) > 0:
            rows, columns = tl.minimum(i, bottom - 1), tl.minimum(j, right - 1)
            tile = _product(z, z, rows, columns, D, WHOLE, ROWS, COLUMNS, DEPTH)
            near = (tile >= threshold) & (i[:, None] < j[None, :]) & (i[:, None] < bottom) & (j[None, :] < right)
            near = near & ((new_i[:, None] + new_j[None, :]) > 0)
            hits = near.to(tl.int64)
            if tl.sum(tl.sum(near.to(tl.int32), 1), 0) > 0:
                slot = tl.atomic_add(count + tl.zeros_like(hits), hits, mask=near)
                pair = i.to(tl.int64)[:, None] * 4294967296 + j.to(tl.int64)[None, :]
                tl.store(found + slot, pair, mask=near & (slot < capacity))
