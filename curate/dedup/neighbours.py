"""Near neighbours: every pair of unit rows whose cosine is at least a threshold, cell by cell.

k-means cuts the rows into K cells. Two rows of one cell are compared in that cell. Two rows x and y of different cells
with |x - y| <= r, where r² = 2 - 2 threshold, lie on different sides of the plane that separates the two centroids, so
that one of them is within r / 2 of that plane: it is a border row of the other's cell and is compared there. Each row
is put into the nearest `BORDERS` of the cells that it borders on. Where no row borders on more, every pair is found;
`Assignment.beyond` says which rows do, and so how far that guarantee holds.

    z      [n, D]  unit rows, float32
    home   [n]     number of the cell that a row lies in
    border [n, BORDERS]  of those that it borders on, nearest first, then -1

The cells follow SemDeDup (arXiv 2303.09540, section 3), which compares within cells alone.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.seeds import derive_seed

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

BORDERS = 3
ITERATIONS = 8
SAMPLE_PER_CELL = 100
"""Rows per cell on which k-means is trained. With 8 iterations: what docs/dedup.md was measured with."""
MOST_SAMPLED = 2**18
"""Rows on which it is trained at most: 512 MiB at D = 512."""
LEAST_PER_CELL = 4
"""Fewer sampled rows than this make no cell of their own."""
ROUNDING = 1e-5
"""A sampled row that is no further from the mean is the mean; and how much further a border reaches than it need."""
GIANT = 8
"""A cell that holds so many times the mean of the sample is split."""
MOST_CELLS = 8192
"""Distances between all centroids are held, a few times, at once: 256 MiB each; more where giant cells were split."""
FEW_ROWS = 8192
"""So many rows are one cell: comparing all of them takes less than finding cells."""
TILE = 2048
"""Rows and columns of a tile of cosines: 16 MiB."""
VERIFIED = {"cpu": 8192, "cuda": 2**16}
"""Pairs that are verified at once: 100 MiB at D = 512, and 800 MiB on CUDA, where each batch waits for the device."""
FOUND = 2**22
"""Pairs that a kernel has room for, 32 MiB: of more it finds those of a part of the rows at a time."""
PLACED_BYTES = 2**30
"""Distances from rows to centroids that CUDA holds at once, at most, and at most an eighth of what is free."""
NORMED = 2**14
"""Rows whose norms are computed at once, in float64: 64 MiB at D = 512."""
HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where rows lie among the cells."""

    home: Ints
    border: Ints
    beyond: Bools
    """[n] whether a row borders on more than `BORDERS` cells, so that a pair of it may be missed."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """K cells: a row belongs to the one whose centroid has the largest inner product with it, less the mean.

    Embeddings share a mean, which a few spherical centroids would all follow; without it they tell rows apart. Moving
    all rows by it leaves their distances as they are.
    """

    mean: Floats
    """[D]"""
    centroids: Floats
    """[K, D] unit rows."""

    def assign(self, z: npt.NDArray[np.floating] | Tensor, threshold: float, device: torch.device) -> Assignment:
        """Home, and borders for pairs of cosine at least `threshold`, of rows z [n, D] of norm 1 or nearly so."""
        centroids = torch.from_numpy(self.centroids).to(device)
        mean = torch.from_numpy(self.mean).to(device)
        if len(centroids) == 1 or not len(z):
            alone = np.zeros(len(z), np.int64)
            return Assignment(home=alone, border=np.full((len(z), BORDERS), -1), beyond=np.zeros(len(z), bool))
        # 1 / distance between centroids; a centroid is no neighbour of itself or of a copy of itself.
        nearness = (2 - 2 * centroids @ centroids.T).clamp_min(1e-6).rsqrt()
        reach = (2 - 2 * threshold) ** 0.5 / 2 + ROUNDING
        width = min(BORDERS + 2, len(centroids))
        parts: list[tuple[Tensor, ...]] = []
        step = TILE
        if device.type == "cuda":  # a few launches for many rows
            free = min(PLACED_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
            step = max(TILE, free // (4 * len(centroids)))
        for start in range(0, len(z), step):
            rows = normalized(torch.as_tensor(z[start : start + step]).to(device))
            inner = (rows - mean) @ centroids.T  # [n, K]
            best, home = inner.max(dim=1)
            # Distance of the rows from the plane between both centroids. That of the home itself is 0: it comes first.
            distance = (best[:, None] - inner).mul_(nearness[home])
            distance.scatter_(1, home[:, None], -1)
            near, border = distance.topk(width, dim=1, largest=False)
            near, border = near[:, 1:], border[:, 1:]
            border = torch.where(near <= reach, border, -1)
            beyond = border[:, BORDERS:].ge(0).any(dim=1)
            border = torch.nn.functional.pad(border[:, :BORDERS], (0, BORDERS - min(BORDERS, width - 1)), value=-1)
            parts.append((home, border, beyond))
        home, border, beyond = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return Assignment(home=home.numpy(), border=border.numpy(), beyond=beyond.numpy())

    def to_array(self) -> Floats:
        """[K + 1, D]: the mean, then the centroids."""
        return np.concatenate([self.mean[None], self.centroids])

    @classmethod
    def from_array(cls, array: Floats) -> "Cells":
        """The inverse of `to_array`."""
        return cls(mean=array[0], centroids=array[1:])


def unit_rows(z: npt.NDArray[np.floating]) -> Floats:
    """Z [n, D] in float32 with norm 1: stored in float16, rows are off by up to 1e-3."""
    return np.asarray(normalized(torch.from_numpy(z)).numpy())


def normalized(z: Tensor) -> Tensor:
    """As `unit_rows`, on any device, and on all of them to the last bit.

    Squares of float16 numbers up to 4 and their sum, if it is below 16, are exact in float64, in any order.
    """
    norms = [
        torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64) for part in torch.split(z, NORMED)
    ]
    return z.to(torch.float32, copy=True).div_(torch.cat(norms).float())


def cell_count(rows: int) -> int:
    """K for so many rows: half their square root.

    Finding a row's cell costs K products, comparing it there as many as a cell has rows, and cells that cut through
    dense regions have most rows on borders, where they are compared again. With the whole, half and a quarter of the
    square root, 100,000 planted rows took .133, .073 and .101 of the bare product, a million 114, 67 and 59 s.
    """
    return 1 if rows <= FEW_ROWS else min(MOST_CELLS, round(rows**0.5 / 2))


def sample_share(rows: int, cells: int) -> float:
    """Share of the rows on which so many cells are trained."""
    return min(1.0, min(MOST_SAMPLED, SAMPLE_PER_CELL * cells) / max(1, rows)) if cells > 1 else 0.0


def train_cells(sample: Floats, cells: int, device: torch.device | None = None) -> Cells:
    """Spherical k-means with FAISS on unit rows [n, D], centred; cells that are much larger than others are split.

    Equal samples give equal cells, up to the rounding of whatever computes them. The sample is overwritten.
    """
    mean = sample.mean(axis=0) if len(sample) else np.zeros(sample.shape[1], np.float32)
    sample -= mean
    norms = np.linalg.norm(sample, axis=1, keepdims=True)
    if (norms <= ROUNDING).any():  # of which k-means would make cells of noise
        sample, norms = sample[norms[:, 0] > ROUNDING], norms[norms[:, 0] > ROUNDING]
    cells = max(1, min(cells, len(sample) // LEAST_PER_CELL))
    if cells == 1:
        return Cells(mean=mean, centroids=np.zeros((1, sample.shape[1]), np.float32))
    sample /= norms
    limit = max(LEAST_PER_CELL * GIANT, GIANT * len(sample) // cells)
    return Cells(mean=mean, centroids=np.concatenate(list(_split(sample, cells, limit, device))))


def _split(rows: Floats, cells: int, limit: int, device: torch.device | None, depth: int = 3) -> Iterator[Floats]:
    """Centroids of `cells` cells, those with more than `limit` rows split again in the same way."""
    centroids, home = _kmeans(rows, cells, device)
    sizes = np.bincount(home, minlength=cells)
    yield centroids[sizes <= limit]
    for giant in np.flatnonzero(sizes > limit):
        if depth == 0:  # copies of one another, which no cell tells apart
            yield centroids[giant : giant + 1]
        else:
            yield from _split(rows[home == giant], max(2, GIANT * sizes[giant] // limit), limit, device, depth - 1)


def _kmeans(rows: Floats, cells: int, device: torch.device | None) -> tuple[Floats, Ints]:
    # FAISS brings an OpenBLAS of 2021 that takes a CPU which it does not know for one of 2004, four times slower; it
    # reads the name of a core that it does know while it is loaded.
    core = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability())
    if core:
        os.environ.setdefault("OPENBLAS_CORETYPE", core)
    import faiss  # noqa: PLC0415

    faiss.omp_set_num_threads(torch.get_num_threads())
    kmeans = faiss.Kmeans(
        rows.shape[1],
        cells,
        niter=ITERATIONS,
        spherical=True,
        seed=derive_seed(0, "cells") % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
        gpu=device is not None and device.type == "cuda" and faiss.get_num_gpus() > 0,  # faiss-cpu has none
    )
    kmeans.train(rows)
    home = kmeans.index.search(rows, 1)[1][:, 0]
    assert kmeans.centroids is not None
    return kmeans.centroids, home


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """When two rows are near-duplicates."""

    image: float
    """Least cosine of their images."""
    caption: float | None = None
    """And of their captions; these do not matter if None."""


def near_pairs(
    zimg: Tensor,
    ztxt: Tensor | None,
    threshold: Threshold,
    *,
    inner: int,
    fresh: Tensor,
    images_alone: Tensor,
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Pairs (i, j), i < j, i < inner, that are near-duplicates: compared in tiles, verified one by one.

    A plain tiled product is what finds them: FAISS's flat search, which computes both halves of the symmetric product,
    takes nearly twice as long on a CPU, see `python -m benchmarks.dedup.speed`. Whatever finds them, what is yielded is
    the same, in another order: all that might be near is verified.

    Args:
        zimg: [n, D] unit rows, float32, on the device that compares them.
        ztxt: likewise, of the captions; None if `threshold` has none.
        threshold: of a pair.
        inner: rows that are compared with all later ones; the others are compared with these alone.
        fresh: [n] bool; pairs of rows that are not fresh are left out. Fresh rows had best come first.
        images_alone: [n] bool; a pair with such a row need not have similar captions.

    Yields:
        i [m], j [m] and cosine [m] of their images.
    """
    least = threshold.image - rounding(zimg.shape[1])
    find = _find_fused if zimg.is_cuda and HAS_TRITON else _find_tiled
    batch = VERIFIED.get(zimg.device.type, VERIFIED["cuda"])
    for i, j in find(zimg, least, inner, fresh):
        for a, b in zip(torch.split(i, batch), torch.split(j, batch), strict=True):
            cosine = _cosine(zimg, a, b)
            good = cosine >= threshold.image
            if threshold.caption is not None and ztxt is not None:
                good &= (_cosine(ztxt, a, b) >= threshold.caption) | images_alone[a] | images_alone[b]
            at = good.nonzero().squeeze(1)
            if len(at):
                yield a[at].cpu().numpy(), b[at].cpu().numpy(), cosine[at].cpu().numpy()


def rounding(D: int) -> float:
    """By how much the cosine of two unit rows [D] may exceed what is found of them in half precision.

    Rounded to float16, a unit row is off by 2^-11 and, where its elements are subnormal, 2^-25 each; so the product of
    two by twice that. Tensor cores sum in float32 and cut off: each of D additions is off by at most 2^-23. The latter
    is doubled for all that is of second order. TF32, whose numbers have as many bits, and float32 are within it.
    """
    return 2.0**-10 + D * 2.0**-22


def _find_tiled(z: Tensor, least: float, inner: int, fresh: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs i [m], j [m] whose cosine may be `least` or more, tile by tile."""
    n = len(z)
    for top in range(0, inner, TILE):
        bottom = min(inner, top + TILE)
        for left in range(top, n, TILE):
            right = min(n, left + TILE)
            if not (fresh[top:bottom].any() or fresh[left:right].any()):
                continue
            near = z[top:bottom] @ z[left:right].T >= least
            if left == top:
                near.triu_(1)
            i, j = near.nonzero(as_tuple=True)
            i, j = i + top, j + left
            wanted = fresh[i] | fresh[j]
            yield i[wanted], j[wanted]


def _find_fused(z: Tensor, least: float, inner: int, fresh: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As `_find_tiled`, by one kernel for all tiles, and one wait for how much it found.

    If that is more than there is room for, each half of the longer side is searched by itself.
    """
    from curate.kernels import near_tiles  # noqa: PLC0415

    halves = z.half()
    todo = [(0, inner, 0, len(z))] if inner else []
    while todo:
        top, bottom, left, right = todo.pop()
        found, count = near_tiles(halves, least, top, bottom, left, right, fresh=fresh, capacity=FOUND)
        m = int(count)
        if m <= FOUND:
            pairs = found[:m].sort().values  # the kernel's order is another each time
            yield pairs >> 32, pairs & 0xFFFFFFFF
        elif bottom - top >= right - left:
            middle = (top + bottom) // 2
            todo += [(middle, bottom, left, right), (top, middle, left, right)]
        else:
            middle = (left + right) // 2
            todo += [(top, bottom, middle, right), (top, bottom, left, middle)]


def _cosine(z: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Of pairs of rows, to float32: summed in float64, or the tile that a pair lies in would decide its last bits."""
    return (z[i].double() * z[j].double()).sum(dim=1).float()
