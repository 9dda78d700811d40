"""The walk, scaled out: drop exact duplicates, count candidates, find where each super-batch begins."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from curate.dedup import Dedup, kept_rows
from curate.embeddings import contents, embedding_name, read_embeddings
from curate.errors import UserError
from curate.parquet import write_table
from curate.pool import Pool, Shard
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.tally import Tally
from curate.walk import DUPLICATE_EXACT, END, ROW, Rows, Walk, in_walk_order, read_walk, walk_folder, walk_rows
from pipelines.cluster import exchange, fetch, groups

ROWS_PER_BUCKET = 2_000_000
BUCKET_BYTES = ROWS_PER_BUCKET * ROW.itemsize * 8
"""What a task holds of one: its parts, all of them, in order, and the orders of five columns."""
SHOWN_CLASHES = 5

DUPLICATES_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("duplicate_of_shard", pa.int32()),
        ("duplicate_of_row", pa.int64()),
    ]
)


def lay_walk(
    store: Store,
    pool: Pool,
    reference: EncoderSpec,
    *,
    seed: int,
    epoch: int,
    super_batch_size: int,
    dedup: Dedup | None = None,
) -> Walk:
    """Make an epoch's walk, or read it if it was made before.

    Args:
        store: the root.
        pool: the inventory.
        reference: its embedding files are complete.
        seed: of the recipe.
        epoch: of the walk.
        super_batch_size: B.
        dedup: whose dropped rows are no candidates; None if exact duplicates alone are none.

    Returns:
        The walk; exact duplicates and whom they duplicate are in `walks/<fingerprint>/duplicates-*.parquet`.

    Raises:
        UserError: the recipe's uid column does not tell pairs apart.
    """
    without = dedup.folder if dedup else None
    folder = walk_folder(pool, reference, seed=seed, epoch=epoch, super_batch_size=super_batch_size, dedup=without)
    if (laid := read_walk(store, folder)) is not None:
        return laid
    if pool.columns.uid:
        _check_uids(store, pool, reference)

    buckets = list(range(1 + pool.rows // ROWS_PER_BUCKET))

    def split(shards: list[Shard]) -> list[tuple[Rows, Counter[str]]]:
        rows, statuses = _candidates(store, shards, reference, without, seed=seed, epoch=epoch)
        parts = _by_key(rows, len(buckets))
        return [(part, statuses if i == 0 else Counter()) for i, part in enumerate(parts)]

    def join(bucket: int, parts: Sequence[tuple[Rows, Counter[str]]]) -> _Bucket:
        rows = np.concatenate([rows for rows, _ in parts])
        order, representative = in_walk_order(rows)
        duplicate = representative != np.arange(len(rows))
        _write_duplicates(store, f"{folder}/duplicates-{bucket:06d}.parquet", rows[order], representative, duplicate)
        statuses = sum((statuses for _, statuses in parts), Counter[str]())
        return _Bucket(keys=rows["key"][order[~duplicate]], duplicates=int(duplicate.sum()), statuses=statuses)

    # The keys stay where they are: counts come here first, then the keys at the boundaries that they imply.
    joined = exchange(groups(pool.shards), split, buckets, join, title="candidates", join_memory=BUCKET_BYTES)
    summaries = fetch([_summary.remote(bucket) for bucket in joined])
    counts = [count for count, _, _ in summaries]
    duplicates = sum(found for _, found, _ in summaries)
    statuses = sum((found for _, _, found in summaries), Counter[str]())
    candidates = sum(counts)
    embedded = Tally.of("embed", statuses.items())
    dropped = Counter(dedup.dropped if dedup else {})
    dropped[DUPLICATE_EXACT] += duplicates
    walk = Walk(
        epoch=epoch,
        embedded=embedded,
        deduplicated=Tally(step="dedup", rows_in=embedded.kept, kept=candidates, dropped=dropped),
        boundaries=_boundaries(counts, joined, super_batch_size),
    )
    store.put_bytes(f"{folder}/walk.json", walk.to_bytes())
    return walk


def _candidates(
    store: Store, shards: Sequence[Shard], reference: EncoderSpec, dedup: str | None, *, seed: int, epoch: int
) -> tuple[Rows, Counter[str]]:
    """Usable rows of some shards that no deduplication dropped, and all their rows counted by status."""
    parts = [np.empty(0, ROW)]
    statuses = Counter[str]()
    for shard in shards:
        table = read_embeddings(store, embedding_name(reference.sha, shard), ["status", "content"])
        statuses.update(table["status"].to_pylist())
        parts.append(candidate_rows(store, shard, table, dedup, seed=seed, epoch=epoch))
    return np.concatenate(parts), statuses


def candidate_rows(store: Store, shard: Shard, table: pa.Table, dedup: str | None, *, seed: int, epoch: int) -> Rows:
    """The rows of a shard that can be used and that no deduplication dropped, by its embedding file's columns."""
    usable = np.flatnonzero(np.asarray(table["status"].to_pylist(), object) == "ok")
    usable = kept_rows(store, dedup, shard, usable)
    return walk_rows(contents(table["content"])[usable], shard.index, usable, seed=seed, epoch=epoch)


def _by_key(rows: Rows, count: int) -> list[Rows]:
    """Rows in `count` buckets of equal key ranges."""
    bucket = (rows["key"] >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
    return [rows[bucket == i] for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """The candidates whose keys fall into one range."""

    keys: npt.NDArray[np.uint64]
    """Ascending, one for each distinct pair."""
    duplicates: int
    statuses: Counter[str]


@ray.remote
def _summary(bucket: _Bucket) -> tuple[int, int, Counter[str]]:
    return len(bucket.keys), bucket.duplicates, bucket.statuses


@ray.remote
def _keys_at(bucket: _Bucket, positions: npt.NDArray[np.int64]) -> list[int]:
    return [int(key) for key in bucket.keys[positions]]


def _boundaries(counts: Sequence[int], buckets: Sequence[ray.ObjectRef], super_batch_size: int) -> tuple[int, ...]:
    """Keys of the candidates that are numbers 0, B, 2B, … of the walk; `END` where the last one would be."""
    held = sum(counts) // super_batch_size
    if held == 0:
        return ()
    ranks = np.arange(held + 1) * super_batch_size
    starts = np.cumsum([0, *counts])
    inside = [ranks[(ranks >= first) & (ranks < last)] - first for first, last in pairwise(starts)]
    found = fetch([_keys_at.remote(bucket, ranks) for bucket, ranks in zip(buckets, inside, strict=True)])
    boundaries = [key for keys in found for key in keys]
    return (0, *boundaries[1:], *([END] if len(boundaries) == held else []))


def _write_duplicates(
    store: Store,
    name: str,
    rows: Rows,
    representative: npt.NDArray[np.int64],
    duplicate: npt.NDArray[np.bool_],
) -> None:
    left, kept = rows[duplicate], rows[representative[duplicate]]
    columns = [left["shard"], left["row"], kept["shard"], kept["row"]]
    arrays = [pa.array(np.ascontiguousarray(c)) for c in columns]
    write_table(store, name, pa.Table.from_arrays(arrays, schema=DUPLICATES_SCHEMA))


def _check_uids(store: Store, pool: Pool, reference: EncoderSpec) -> None:
    """Refuse a uid column that names two rows alike."""
    buckets = list(range(1 + pool.rows // ROWS_PER_BUCKET))

    def split(shards: list[Shard]) -> list[Rows]:
        parts = [np.empty(0, ROW)]
        for shard in shards:
            uids = read_embeddings(store, embedding_name(reference.sha, shard), ["uid"])["uid"].to_pylist()
            digests = [hashlib.blake2b((uid or "").encode(), digest_size=16).digest() for uid in uids]
            halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
            parts.append(walk_rows(halves, shard.index, np.arange(len(uids)), seed=0, epoch=0))
        return _by_key(np.concatenate(parts), len(buckets))

    def join(bucket: int, parts: Sequence[Rows]) -> tuple[int, list[tuple[int, int, int, int]]]:
        rows = np.concatenate(parts)
        order, representative = in_walk_order(rows)
        rows = rows[order]
        clashes = np.flatnonzero(representative != np.arange(len(rows)))
        pairs = [(rows[representative[i]], rows[i]) for i in clashes[:SHOWN_CLASHES]]
        return len(clashes), [(int(a["shard"]), int(a["row"]), int(b["shard"]), int(b["row"])) for a, b in pairs]

    found = fetch(exchange(groups(pool.shards), split, buckets, join, title="uids", join_memory=BUCKET_BYTES))
    total = sum(count for count, _ in found)
    if not total:
        return
    shown = [place for _, places in found for place in places][:SHOWN_CLASHES]
    lines = [
        f"{pool.shards[b].path}: row {b_row}: {pool.columns.uid} is that of row {a_row} of {pool.shards[a].path} too"
        for a, a_row, b, b_row in shown
    ]
    way_out = (
        f"pool.uid = {pool.columns.uid!r}: {total} rows repeat a uid; name a column that tells pairs apart, or none"
    )
    raise UserError(*lines, way_out)
