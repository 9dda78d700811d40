"""Windows, scaled out: where the super-batches of a window begin, found without sorting its rows in one place."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

from curate.models.spec import EncoderSpec
from curate.parts import (
    by_destination,
    pack_arrays,
    read_part,
    read_parts,
    remove_parts,
    unpack_arrays,
    write_parts,
)
from curate.pipelines.cluster import groups, run_tasks
from curate.pool.shards import Pool, Shard
from curate.select.index import Index, candidate_rows
from curate.select.windows import END, Window, cut_name, read_cut, write_cut
from curate.storage import Store

GROUP_ROWS = 262_144
"""Rows of the shards that one task reads: their keys and contents alone."""
ROWS_PER_BUCKET = 16_000_000
"""Keys that one task sorts."""


@dataclass(frozen=True, kw_only=True)
class _Cutting:
    """What all tasks are given."""

    store: Store
    reference: EncoderSpec
    index: Index
    seed: int
    epoch: int
    scratch: str
    sources: int
    buckets: int


def cut_window(
    store: Store,
    pool: Pool,
    reference: EncoderSpec,
    index: Index,
    window: Window,
    *,
    seed: int,
    epoch: int,
    super_batch_size: int,
    rows_per_bucket: int = ROWS_PER_BUCKET,
) -> tuple[int, ...]:
    """The keys at which a window's super-batches begin, and the one at which the last whole one ends.

    They are those of the candidates that are numbers 0, B, 2B, … in ascending order of keys; `END` where the last one
    would be. Found once, and read from the root after that.
    """
    shards = [pool.shards[i] for i in window.shards]
    name = cut_name(index.folder, shards, seed=seed, epoch=epoch, super_batch_size=super_batch_size)
    if (cut := read_cut(store, name)) is not None:
        return cut
    sources = groups(shards, GROUP_ROWS)
    cutting = _Cutting(
        store=store,
        reference=reference,
        index=index,
        seed=seed,
        epoch=epoch,
        scratch=f"{name.rpartition('/')[0]}/keys",
        sources=len(sources),
        buckets=1 + window.candidates // rows_per_bucket,
    )
    counts = np.sum(run_tasks(_read_keys, list(enumerate(sources)), cutting, title="keys"), axis=0)
    assert counts.sum() == window.candidates, (counts.sum(), window.candidates)
    held = window.candidates // super_batch_size
    ranks = np.arange(held + 1) * super_batch_size
    starts = np.cumsum([0, *counts])
    inside = [ranks[(ranks >= first) & (ranks < last)] - first for first, last in pairwise(starts)]
    found = run_tasks(
        _keys_at, list(enumerate(inside)), cutting, title="super-batches", memory=3 * 8 * int(counts.max(initial=0))
    )
    keys = [key for keys in found for key in keys]
    boundaries = (0, *keys[1:], *([END] if len(keys) == held else [])) if held else ()
    remove_parts(store, cutting.scratch)  # first: nobody looks for them once the cut is there
    write_cut(store, name, boundaries)
    return boundaries


def _read_keys(item: tuple[int, Sequence[Shard]], cutting: _Cutting) -> npt.NDArray[np.int64]:
    """Write the keys of a group of shards, a part for each range of keys; returns how many each part holds."""
    number, shards = item
    name = f"{cutting.scratch}-{number:06d}"
    if not cutting.store.exists(name):
        found = [
            candidate_rows(
                cutting.store, shard, cutting.reference, cutting.index, seed=cutting.seed, epoch=cutting.epoch
            )["key"]
            for shard in shards
        ]
        keys = np.concatenate(found)
        bucket = ((keys >> np.uint64(32)) * np.uint64(cutting.buckets) >> np.uint64(32)).astype(np.int64)
        counts = np.bincount(bucket, minlength=cutting.buckets)
        parts = by_destination(bucket, cutting.buckets, lambda at: pack_arrays(keys[at]))
        write_parts(cutting.store, name, chain(parts, [pack_arrays(counts)]), count=cutting.buckets + 1)
    return unpack_arrays(read_part(cutting.store, name, cutting.buckets))[0].astype(np.int64)


def _keys_at(item: tuple[int, npt.NDArray[np.int64]], cutting: _Cutting) -> list[int]:
    """The keys of one range at some ranks within it."""
    bucket, ranks = item
    if not len(ranks):
        return []
    names = [f"{cutting.scratch}-{number:06d}" for number in range(cutting.sources)]
    parts = [unpack_arrays(part)[0] for part in read_parts(cutting.store, names, bucket)]
    keys = np.sort(np.concatenate(parts))
    return [int(key) for key in keys[ranks]]
