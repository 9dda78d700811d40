"""Windows: an epoch's random order of the shards, runs of them, and within each run a random order of the rows.

An epoch puts the shards in an order of its own. A window is a run of consecutive shards in that order; its candidates
are the rows that can be used and that repeat no other. Each candidate gets a 64-bit key from its content, the seed and
the epoch; in ascending order of the keys the window is cut into super-batches of B. A super-batch is the candidates
between two keys, so whoever holds a row can tell which super-batch it belongs to without knowing any other row, and
nobody ever holds the whole order. What a round reads is what lies in its windows, however large the pool is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.pool.shards import Shard
from curate.recipe import SelectionSection
from curate.sealed import seal, unseal
from curate.seeds import derive_seed
from curate.storage import Store

UInt64s = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

ROW = np.dtype([("key", "<u8"), ("content_low", "<u8"), ("content_high", "<u8"), ("shard", "<i4"), ("row", "<i8")])
"""One candidate: its key, both halves of its content hash, where it lies in the pool."""

EARLIER_ROUND, LATER_ROUND, WINDOW_END = "earlier_round", "later_round", "window_end"
"""Why candidates are not a round's: their turn was before it or comes after it in this epoch, or they are left over
where a window is cut into super-batches."""
END = 2**64
"""Beyond the largest key."""
MIXED_SHARDS = 16
"""Shards of a window at least, so that a super-batch is a mixture of topics though each shard may have its own.

By `python -m benchmarks.windows` (docs/scale.md): where each shard is one topic of thirty, what is drawn from windows
of 16 scores 0.767 against 0.775 of the whole pool, and 0.737 from windows of 2; where shards are mixed, 2 would do.
"""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A run of shards in an epoch's order."""

    shards: tuple[int, ...]
    """Their indices in the pool, ascending."""
    candidates: int
    """Rows of these shards that a super-batch may hold."""


@dataclass(frozen=True, kw_only=True)
class EpochRange:
    """Where a round is in an epoch: `super_batches` from number `start` on, counted through all windows."""

    epoch: int
    start: int
    super_batches: int

    @property
    def stop(self) -> int:
        """Number of the first super-batch after this range."""
        return self.start + self.super_batches

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What a round takes of one window."""

    window: Window
    start: int
    """Number, within the window, of its first super-batch that the round takes."""
    super_batches: int
    first: int
    """Number, within the round, of that super-batch."""


def windows_of(
    shards: Sequence[Shard],
    candidates: Sequence[int],
    *,
    seed: int,
    epoch: int,
    window_rows: int | None,
    least_shards: int = MIXED_SHARDS,
) -> list[Window]:
    """The windows of an epoch.

    Args:
        shards: of the pool.
        candidates: of each shard.
        seed: of the recipe.
        epoch: orders the shards.
        window_rows: candidates of a window at least; None for one window of all shards.
        least_shards: of a window.

    Returns:
        Windows that hold every shard once. Shards that are left at the end belong to the last window, so that no row
        waits for another epoch because of where its shard happens to lie.
    """
    salt = derive_seed(seed, "shards", epoch)
    ranked = sorted(range(len(shards)), key=lambda i: hashlib.sha256(f"{salt}/{shards[i].key}".encode()).digest())
    runs: list[list[int]] = [[]]
    rows = 0
    for index in ranked:
        if window_rows is not None and rows >= window_rows and len(runs[-1]) >= least_shards:
            runs.append([])
            rows = 0
        runs[-1].append(index)
        rows += candidates[index]
    if len(runs) > 1 and (rows < (window_rows or 0) or len(runs[-1]) < least_shards):
        left = runs.pop()
        runs[-1] += left
    return [Window(shards=tuple(sorted(run)), candidates=sum(candidates[i] for i in run)) for run in runs]


def next_range(
    previous: EpochRange | None, *, held: int, super_batches: int | None, same: bool = True
) -> EpochRange | None:
    """Where the next round is; None if even a fresh epoch has too few super-batches.

    Args:
        previous: the last round's range.
        held: super-batches of an epoch.
        super_batches: wanted; as many as an epoch holds if None.
        same: whether the last round went through these very windows; else a new epoch begins.
    """
    wanted = held if super_batches is None else super_batches
    if not wanted or wanted > held:
        return None
    if previous is None:
        return EpochRange(epoch=0, start=0, super_batches=wanted)
    if same and previous.stop + wanted <= held:
        return EpochRange(epoch=previous.epoch, start=previous.stop, super_batches=wanted)
    return EpochRange(epoch=previous.epoch + 1, start=0, super_batches=wanted)


def windows_through(selection: SelectionSection, *, seed: int, index: str) -> list[Any]:
    """What windows depend on, beside the epoch: with another pool, reference, seed, B or size they are others."""
    return [index, seed, selection.super_batch_size, selection.least_window_rows]


def next_windows(
    shards: Sequence[Shard],
    candidates: Sequence[int],
    selection: SelectionSection,
    *,
    seed: int,
    index: str,
    before: Mapping[str, Any] | None,
) -> tuple[list[Window], EpochRange] | None:
    """The windows of the epoch that the next round is in, and its range; None if a fresh epoch has too few candidates.

    Args:
        shards: of the pool.
        candidates: of each shard.
        selection: sizes.
        seed: of the recipe.
        index: folder of the pool's index.
        before: `lineage["windows"]` of the last round; None if there was none. If it went through other windows, the
            next one begins a new epoch.
    """
    previous = None if before is None else EpochRange(**before["taken"])
    same = before is not None and before["through"] == windows_through(selection, seed=seed, index=index)
    epoch = 0 if previous is None else previous.epoch if same else previous.epoch + 1
    while True:
        windows = windows_of(shards, candidates, seed=seed, epoch=epoch, window_rows=selection.least_window_rows)
        held = sum(window.candidates // selection.super_batch_size for window in windows)
        taken = next_range(previous, held=held, super_batches=selection.super_batches, same=same)
        if taken is None:
            return None
        if taken.epoch == epoch:
            return windows, taken
        epoch = taken.epoch


def stretches(windows: Sequence[Window], taken: EpochRange, super_batch_size: int) -> list[Stretch]:
    """What a range takes of each window that it meets."""
    found = []
    ends = list(accumulate(window.candidates // super_batch_size for window in windows))
    for window, stop, begin in zip(windows, ends, [0, *ends], strict=False):
        low, high = max(begin, taken.start), min(stop, taken.stop)
        if low < high:
            found.append(Stretch(window=window, start=low - begin, super_batches=high - low, first=low - taken.start))
    return found


def row_keys(content: UInt64s, *, seed: int, epoch: int) -> UInt64s:
    """Keys [n] of contents [n, 2]: equal contents have equal keys, others independent uniform ones.

    The mixing steps are those of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    salt = np.uint64(derive_seed(seed, "walk", epoch))
    return _mix(_mix(content[:, 0] ^ salt) ^ content[:, 1])


def keyed_rows(content: UInt64s, shard: int, rows: npt.NDArray[np.int64], *, seed: int, epoch: int) -> Rows:
    """Records of dtype `ROW` for rows of one shard."""
    records = np.empty(len(rows), ROW)
    records["key"] = row_keys(content, seed=seed, epoch=epoch)
    records["content_low"], records["content_high"] = content.T
    records["shard"] = shard
    records["row"] = rows
    return records


def key_order(rows: Rows) -> npt.NDArray[np.int64]:
    """The order [n] that sorts rows by key, then content, then shard and row."""
    return np.lexsort([rows[name] for name in ("row", "shard", "content_high", "content_low", "key")])


def super_batch_of(keys: UInt64s, boundaries: Sequence[int]) -> npt.NDArray[np.int64]:
    """Number of the super-batch, from 0 on, that each key falls into; -1 if none.

    Args:
        keys: [n].
        boundaries: [m + 1] ascending; super-batch i holds the keys in [boundaries[i], boundaries[i + 1]).
    """
    # END does not fit into 64 bits; as the last boundary it means that there is no upper bound.
    bounded = [b for b in boundaries if b < END]
    numbers = np.searchsorted(np.array(bounded, np.uint64), keys, side="right") - 1
    numbers[numbers >= len(boundaries) - 1] = -1
    return numbers


def cut_name(index: str, shards: Sequence[Shard], *, seed: int, epoch: int, super_batch_size: int) -> str:
    """Name, within the root, of the record of where a window's super-batches begin, by all that decides it."""
    identity = json.dumps([index, seed, epoch, super_batch_size, [shard.key for shard in shards]])
    return f"windows/{hashlib.sha256(identity.encode()).hexdigest()[:24]}/cut.json"


def window_scope(index: str, *, seed: int, epoch: int, low: int, high: int) -> str:
    """Names the files of a learner that was asked for the candidates of a window from key `low` to below `high`."""
    identity = json.dumps([index, seed, epoch, low, high])
    return f"window-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"


def read_cut(store: Store, name: str) -> tuple[int, ...] | None:
    """The keys at which a window's super-batches begin and the last one ends; None if they were not found yet."""
    try:
        return tuple(unseal(store.read_bytes(name), name)["boundaries"])
    except FileNotFoundError:
        return None


def write_cut(store: Store, name: str, boundaries: Sequence[int]) -> None:
    """The inverse of `read_cut`."""
    store.put_bytes(name, seal({"boundaries": boundaries}))


def _mix(x: UInt64s) -> UInt64s:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
