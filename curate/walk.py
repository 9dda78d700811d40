"""The walk: a uniform random order of the pool's candidates, cut into disjoint super-batches.

Each candidate gets a 64-bit key from its content, the seed and the epoch, and the walk goes through the keys in
ascending order. A super-batch is the B candidates between two keys, so whoever holds a row can tell which super-batch
it belongs to without knowing any other row, and nobody ever holds the whole order. Equal pairs have equal keys: they
meet in one place, where all but the first of the inventory leave as exact duplicates. When fewer candidates are left
than the next round wants, the walk begins anew with the next epoch's keys.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.pool import Pool
from curate.sealed import seal, unseal
from curate.seeds import derive_seed
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.tally import Tally

UInt64s = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]

ROW = np.dtype([("key", "<u8"), ("low", "<u8"), ("high", "<u8"), ("shard", "<i4"), ("row", "<i8")])
"""One candidate on its way through the walk: key, both halves of its content hash, place in the pool."""

DUPLICATE_EXACT = "duplicate_exact"
END = 2**64
"""Beyond the largest key."""


@dataclass(frozen=True, kw_only=True)
class WalkRange:
    """A round's place in the walk: `super_batches` from number `start` on, of one epoch."""

    epoch: int
    start: int
    super_batches: int

    @property
    def stop(self) -> int:
        """Number of the first super-batch after this range."""
        return self.start + self.super_batches

    def to_json(self) -> dict[str, Any]:
        """Plain values for plan and manifest."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One epoch's walk through a pool, for one B."""

    epoch: int
    embedded: Tally
    deduplicated: Tally
    boundaries: tuple[int, ...]
    """Keys at which the super-batches begin, and the one at which the last whole one ends."""

    @property
    def candidates(self) -> int:
        """Distinct usable pairs of the pool."""
        return self.deduplicated.kept

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        record = {
            "epoch": self.epoch,
            "embedded": self.embedded.to_json(),
            "deduplicated": self.deduplicated.to_json(),
            "boundaries": self.boundaries,
        }
        return seal(record)


def walk_folder(
    pool: Pool, reference: EncoderSpec, *, seed: int, epoch: int, super_batch_size: int, dedup: str | None = None
) -> str:
    """Folder of a walk within the root, named by all that decides it."""
    identity = json.dumps([pool.fingerprint, reference.sha, seed, epoch, super_batch_size, *([dedup] if dedup else [])])
    return f"walks/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def read_walk(store: Store, folder: str) -> Walk | None:
    """The walk in a folder, or None if it is not laid yet."""
    name = f"{folder}/walk.json"
    try:
        record = unseal(store.read_bytes(name), name)
    except FileNotFoundError:
        return None
    return Walk(
        epoch=record["epoch"],
        embedded=Tally(**record["embedded"]),
        deduplicated=Tally(**record["deduplicated"]),
        boundaries=tuple(record["boundaries"]),
    )


def walk_keys(content: UInt64s, *, seed: int, epoch: int) -> UInt64s:
    """Keys [n] of contents [n, 2]: equal contents have equal keys, others independent uniform ones.

    The mixing steps are those of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    salt = np.uint64(derive_seed(seed, "walk", epoch))
    return _mix(_mix(content[:, 0] ^ salt) ^ content[:, 1])


def walk_rows(content: UInt64s, shard: int, rows: npt.NDArray[np.int64], *, seed: int, epoch: int) -> Rows:
    """Records of dtype `ROW` for rows of one shard."""
    records = np.empty(len(rows), ROW)
    records["key"] = walk_keys(content, seed=seed, epoch=epoch)
    records["low"], records["high"] = content.T
    records["shard"] = shard
    records["row"] = rows
    return records


def in_walk_order(rows: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order of the walk, and who represents whom in it.

    Returns:
        order [n], which sorts `rows` by key, then content, then place in the pool; and for each place in that order
        the place of its representative: itself, unless an equal pair stands before it.
    """
    order = np.lexsort([rows[name] for name in ("row", "shard", "high", "low", "key")])
    content = rows[["low", "high"]][order]
    representative = np.arange(len(rows))
    representative[1:][content[1:] == content[:-1]] = 0
    return order, np.maximum.accumulate(representative)


def next_range(
    previous: WalkRange | None,
    *,
    candidates: int,
    super_batch_size: int,
    super_batches: int | None,
    same_pool: bool = True,
) -> WalkRange | None:
    """Where the next round walks; None if even a fresh epoch has too few candidates.

    Args:
        previous: the last round's range.
        candidates: of the whole pool, duplicates removed.
        super_batch_size: B.
        super_batches: wanted; as many as an epoch holds if None.
        same_pool: whether the last round walked through this very pool with this very B; else a new epoch begins.
    """
    held = candidates // super_batch_size
    wanted = held if super_batches is None else super_batches
    if not wanted or wanted > held:
        return None
    if previous is None:
        return WalkRange(epoch=0, start=0, super_batches=wanted)
    if same_pool and previous.stop + wanted <= held:
        return WalkRange(epoch=previous.epoch, start=previous.stop, super_batches=wanted)
    return WalkRange(epoch=previous.epoch + 1, start=0, super_batches=wanted)


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


def _mix(x: UInt64s) -> UInt64s:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
