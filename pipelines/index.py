"""The index of a pool, scaled out: embeddings of new shards -> buckets by hash -> duplicates by shard.

shards, in groups         one task each    contents and uids of their rows, a part for each bucket
buckets                   one task each    all rows of some hashes: a bucket's file, and its duplicates by group
groups of shards          one task each    a file of duplicates
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.embed.files import contents, embedding_name, halves, read_embeddings
from curate.errors import UserError
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
from curate.sealed import seal, unseal
from curate.select.index import (
    ENTRY,
    ROWS_PER_BUCKET,
    Entries,
    Index,
    Ints,
    Kind,
    bucket_name,
    bucket_of,
    duplicates_name,
    earlier_index,
    first_of_equal,
    index_folder,
    read_entries,
    read_index,
    uid_digest,
    usable_rows,
    write_duplicates,
    write_entries,
)
from curate.storage import Store

LEAST_ROWS, MOST_GROUPS = 65_536, 1024
"""Rows of the shards that one task reads, where the pool has no more groups than that: parts grow with the pool."""
BUCKET_BYTES = ROWS_PER_BUCKET * ENTRY.itemsize * 8
"""What a task holds of one: its parts, all of them, in order, and the orders of five columns."""
SHOWN_CLASHES = 5


@dataclass(frozen=True, kw_only=True)
class _Making:
    """What all tasks are given."""

    store: Store
    reference: EncoderSpec
    dedup: str | None
    folder: str
    scratch: str
    kinds: tuple[Kind, ...]
    buckets: int
    first_shards: tuple[int, ...]
    """Of each group of the pool's shards."""
    fresh: int
    """Groups of shards that the earlier index does not know."""
    earlier: Index | None
    moved: npt.NDArray[np.int32]
    """The index now of each shard of the earlier pool."""


def index_pool(
    store: Store, pool: Pool, reference: EncoderSpec, dedup: str | None, *, rows_per_bucket: int = ROWS_PER_BUCKET
) -> Index:
    """Make the index of a pool, or read it if it was made before.

    Args:
        store: the root.
        pool: the inventory.
        reference: its embedding files are complete.
        dedup: folder of the deduplication whose dropped rows are no candidates; None if there was none.
        rows_per_bucket: which one task holds.

    Raises:
        UserError: the recipe's uid column does not tell pairs apart.
    """
    folder = index_folder(reference, dedup, pool)
    if (found := read_index(store, folder)) is not None:
        return found
    before = earlier_index(store, folder, pool)
    earlier, known = before or (None, None)
    position = {shard.key: shard.index for shard in pool.shards}
    moved = [position[shard.key] for shard in known.shards] if known else []
    old = set(moved)
    size = max(LEAST_ROWS, -(-pool.rows // MOST_GROUPS))
    fresh = groups([shard for shard in pool.shards if shard.index not in old], size)
    whole = groups(pool.shards, size)
    buckets = 1 << (pool.rows // rows_per_bucket).bit_length()
    making = _Making(
        store=store,
        reference=reference,
        dedup=dedup,
        folder=folder,
        # Parts of another beginning are no parts of this one.
        scratch=f"{folder}/parts-{earlier.folder.rpartition('/')[2][:12] if earlier else 'all'}",
        kinds=("contents", "uids") if pool.columns.uid else ("contents",),
        buckets=max(buckets, earlier.buckets if earlier else 1),
        first_shards=tuple(group[0].index for group in whole),
        fresh=len(fresh),
        earlier=earlier,
        moved=np.array(moved, np.int32),
    )
    counted = run_tasks(_read_shards, list(enumerate(fresh)), making, title="index")
    run_tasks(_join_bucket, range(making.buckets), making, title="duplicates", memory=BUCKET_BYTES)
    if pool.columns.uid:
        clashes = run_tasks(_join_uids, range(making.buckets), making, title="uids", memory=BUCKET_BYTES)
        _check_uids(pool, clashes)
    repeated = Counter[int]()
    for counted_here in run_tasks(_write_duplicates, range(len(whole)), making, title="duplicates by shard"):
        repeated.update(counted_here)

    statuses = Counter(earlier.statuses if earlier else {})
    usable = dict(zip(moved, earlier.usable, strict=True)) if earlier else {}
    for found_statuses, found_usable in counted:
        statuses.update(found_statuses)
        usable |= found_usable
    index = Index(
        folder=folder,
        dedup=dedup,
        buckets=making.buckets,
        first_shards=making.first_shards,
        statuses=dict(sorted(statuses.items())),
        usable=tuple(usable[shard.index] for shard in pool.shards),
        duplicates=tuple(repeated[shard.index] for shard in pool.shards),
    )
    remove_parts(store, making.scratch)  # first: nobody looks for them once the account is there
    store.put_bytes(f"{folder}/index.json", index.to_bytes())
    return index


def _part(making: _Making, kind: str, number: int) -> str:
    return f"{making.scratch}-{kind}-{number:06d}"


def _read_shards(item: tuple[int, Sequence[Shard]], making: _Making) -> tuple[dict[str, int], dict[int, int]]:
    """Write what a group of shards has for each bucket; returns its rows by status, and by shard those usable."""
    number, shards = item
    name, count = _part(making, "shards", number), making.buckets * len(making.kinds)
    if not making.store.exists(name):
        entries: dict[Kind, list[Entries]] = {kind: [np.empty(0, ENTRY)] for kind in making.kinds}
        statuses, usable = Counter[str](), {}
        for shard in shards:
            table = read_embeddings(
                making.store,
                embedding_name(making.reference.sha, shard),
                ["status", "content", *(["uid"] if "uids" in making.kinds else [])],
            )
            for counted in pc.value_counts(table["status"]).to_pylist():
                statuses[counted["values"]] += counted["counts"]
            rows = usable_rows(making.store, making.dedup, shard, table)
            usable[shard.index] = len(rows)
            for kind in making.kinds:
                entries[kind].append(_entries_of(kind, table, shard, rows))
        parts = (part for kind in making.kinds for part in _by_bucket(np.concatenate(entries[kind]), making.buckets))
        counts = seal({"statuses": statuses, "usable": usable})
        write_parts(making.store, name, chain(parts, [counts]), count=count + 1)
    facts = unseal(read_part(making.store, name, count), name)
    return facts["statuses"], {int(shard): rows for shard, rows in facts["usable"].items()}


def _entries_of(kind: Kind, table: pa.Table, shard: Shard, usable: Ints) -> Entries:
    entries = np.zeros(len(table), ENTRY)
    by_uid = kind == "uids"
    hashes = halves([uid_digest(uid) for uid in table["uid"].to_pylist()]) if by_uid else contents(table["content"])
    entries["low"], entries["high"] = hashes.T
    entries["shard"], entries["row"] = shard.index, np.arange(len(table))
    entries["usable"][usable] = True
    return entries


def _by_bucket(entries: Entries, buckets: int) -> Iterator[bytes]:
    return by_destination(bucket_of(entries["low"], buckets), buckets, lambda at: pack_arrays(entries[at]))


def _entries(kind: Kind, bucket: int, making: _Making) -> Entries:
    """All rows of a bucket: those that the earlier index knows, and those of new shards."""
    found = [np.empty(0, ENTRY)]
    if (earlier := making.earlier) is not None:
        nested = making.buckets // earlier.buckets
        known = read_entries(making.store, bucket_name(earlier.folder, kind, bucket // nested))
        known = known[bucket_of(known["low"], making.buckets) == bucket]
        known["shard"] = making.moved[known["shard"]]
        found.append(known)
    names = [_part(making, "shards", number) for number in range(making.fresh)]
    mine = making.kinds.index(kind) * making.buckets + bucket
    found += [unpack_arrays(part)[0] for part in read_parts(making.store, names, mine)]
    return np.concatenate(found)


def _join_bucket(bucket: int, making: _Making) -> None:
    """Write a bucket by content, and for each group of shards which of its rows repeat another."""
    name, own = bucket_name(making.folder, "contents", bucket), _part(making, "duplicates", bucket)
    if making.store.exists(own):  # written last
        return
    entries = _entries("contents", bucket, making)
    order, first = first_of_equal(entries)
    entries = entries[order]
    at = np.flatnonzero(entries["usable"] & (first != np.arange(len(entries))))
    repeated, kept = entries[at], entries[first[at]]
    columns = [repeated["shard"], repeated["row"], kept["shard"], kept["row"]]
    group = np.searchsorted(np.array(making.first_shards), repeated["shard"], side="right") - 1
    parts = by_destination(group, len(making.first_shards), lambda at: pack_arrays(*(column[at] for column in columns)))
    write_entries(making.store, name, entries)
    write_parts(making.store, own, parts, count=len(making.first_shards))


def _write_duplicates(group: int, making: _Making) -> Counter[int]:
    """Write the duplicates of a group of shards, if there are any; returns their number by shard."""
    names = [_part(making, "duplicates", bucket) for bucket in range(making.buckets)]
    parts = [unpack_arrays(part) for part in read_parts(making.store, names, group)]
    if not parts:
        return Counter()
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    write_duplicates(making.store, duplicates_name(making.folder, group), columns)
    return Counter(columns[0].tolist())


def _join_uids(bucket: int, making: _Making) -> tuple[int, list[tuple[int, int, int, int]]]:
    """Write a bucket by uid; returns how many rows repeat a uid, and shard and row of some of them and of the first."""
    name = bucket_name(making.folder, "uids", bucket)
    entries = _entries("uids", bucket, making)
    entries["usable"] = True
    order, first = first_of_equal(entries)
    entries = entries[order]
    clashes = np.flatnonzero(first != np.arange(len(entries)))
    write_entries(making.store, name, entries)
    pairs = [(entries[first[i]], entries[i]) for i in clashes[:SHOWN_CLASHES].tolist()]
    return len(clashes), [(int(a["shard"]), int(a["row"]), int(b["shard"]), int(b["row"])) for a, b in pairs]


def _check_uids(pool: Pool, found: Sequence[tuple[int, Sequence[tuple[int, int, int, int]]]]) -> None:
    """Refuse a uid column that names two rows alike."""
    total = sum(count for count, _ in found)
    if not total:
        return
    shown = [clash for _, clashes in found for clash in clashes][:SHOWN_CLASHES]
    lines = [
        f"{pool.shards[b].path}: row {b_row}: {pool.columns.uid} is that of row {a_row} of {pool.shards[a].path} too"
        for a, a_row, b, b_row in shown
    ]
    way_out = (
        f"pool.uid = {pool.columns.uid!r}: {total} rows repeat a uid; name a column that tells pairs apart, or none, "
        "and delete the round's folder to begin it anew"
    )
    raise UserError(*lines, way_out)
