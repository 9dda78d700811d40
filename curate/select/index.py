"""The index of a pool: where each content and each uid lies, which rows repeat others, how many candidates there are.

index/<what decides it>/<pool>/contents-000003.parquet    one row per row of the pool, by content
index/<what decides it>/<pool>/uids-000003.parquet        likewise by uid, where the pool has a uid column
index/<what decides it>/<pool>/duplicates-000003.parquet  rows that repeat another, of a run of shards
index/<what decides it>/<pool>/index.json                 the account; written last

It is made once for a pool and a reference. That of a pool that grew reads the embeddings of its new shards alone, and
the index before it.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.dedup.files import kept_rows
from curate.dedup.files import made_with as made_with_of_dedup
from curate.embed.files import contents, embedding_name, read_embeddings
from curate.models.spec import EncoderSpec
from curate.parquet import read_table, write_table
from curate.pool.shards import Pool, Shard, load_pool
from curate.sealed import seal, unseal
from curate.select.windows import Rows, keyed_rows
from curate.storage import Store

Kind = Literal["contents", "uids"]
Entries = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]

ENTRY = np.dtype([("low", "<u8"), ("high", "<u8"), ("shard", "<i4"), ("row", "<i8"), ("usable", "?")])
"""One row of the pool: both halves of a 128-bit hash, where it lies, whether it may be a candidate."""
DUPLICATE_EXACT = "duplicate_exact"
ROWS_PER_BUCKET = 2_000_000
ROW_GROUP = 16_384
"""Rows of a bucket's file that a look-up reads."""

ENTRIES_SCHEMA = pa.schema([(name, pa.from_numpy_dtype(ENTRY[name])) for name in ENTRY.names or ()])
DUPLICATES_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("duplicate_of_shard", pa.int32()),
        ("duplicate_of_row", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index of a pool, complete."""

    folder: str
    dedup: str | None
    """Folder of the deduplication whose dropped rows are no candidates."""
    buckets: int
    """Files by content, and as many by uid: a power of two, so that those of a smaller pool nest in them."""
    first_shards: tuple[int, ...]
    """Of each file of duplicates the first shard that it tells of."""
    statuses: Mapping[str, int]
    """Rows of the pool by the status of their embedding."""
    usable: tuple[int, ...]
    """Of each shard the rows that can be used and that no deduplication dropped."""
    duplicates: tuple[int, ...]
    """Of each shard the usable rows that repeat another one."""

    @cached_property
    def candidates(self) -> list[int]:
        """Of each shard the rows that a super-batch may hold."""
        return [usable - repeated for usable, repeated in zip(self.usable, self.duplicates, strict=True)]

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        return seal(asdict(self))


def index_folder(reference: EncoderSpec, dedup: str | None, pool: Pool) -> str:
    """Folder of an index within the root; the folder above is that of all pools that were asked for alike.

    What a deduplication drops depends on the whole pool, so that with one every pool has an index from scratch.
    """
    identity = json.dumps([reference.sha, dedup])
    return f"index/{hashlib.sha256(identity.encode()).hexdigest()[:16]}/{pool.fingerprint}"


def read_index(store: Store, folder: str) -> Index | None:
    """An index, or None if it is not complete."""
    name = f"{folder}/index.json"
    try:
        record = unseal(store.read_bytes(name), name)
    except FileNotFoundError:
        return None
    return Index(**record | {name: tuple(record[name]) for name in ("first_shards", "usable", "duplicates")})


def earlier_index(store: Store, folder: str, pool: Pool) -> tuple[Index, Pool] | None:
    """The largest complete index, asked for alike, of shards that the pool still holds."""
    held = {shard.key for shard in pool.shards}
    found = []
    for other in store.list(folder.rpartition("/")[0]):
        if (index := read_index(store, other)) is not None:
            earlier = load_pool(store, other.rpartition("/")[2])
            if held.issuperset(shard.key for shard in earlier.shards):
                found.append((earlier.rows, other, index, earlier))
    return max(found)[2:] if found else None


def bucket_name(folder: str, kind: Kind, number: int) -> str:
    """Name of a file of entries within the root."""
    return f"{folder}/{kind}-{number:06d}.parquet"


def duplicates_name(folder: str, number: int) -> str:
    """Name of a file of duplicates within the root."""
    return f"{folder}/duplicates-{number:06d}.parquet"


def bucket_of(low: npt.NDArray[np.uint64], buckets: int) -> Ints:
    """Number of the bucket of each hash, by the upper bits of its first half."""
    bits = buckets.bit_length() - 1
    return (low >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(low), np.int64)


def first_of_equal(entries: Entries) -> tuple[Ints, Ints]:
    """Which entries repeat another one.

    Returns:
        order [n], which sorts entries by hash, the usable ones of equal hash first, then by shard and row; and for each
        position in that order the position of its representative: the first of its hash.
    """
    order = np.lexsort([entries["row"], entries["shard"], ~entries["usable"], entries["high"], entries["low"]])
    hashes = entries[["low", "high"]][order]
    first = np.arange(len(entries))
    first[1:][hashes[1:] == hashes[:-1]] = 0
    return order, np.maximum.accumulate(first)


def write_entries(store: Store, name: str, entries: Entries) -> None:
    """Write a bucket, sorted."""
    columns = [pa.array(np.ascontiguousarray(entries[field.name])) for field in ENTRIES_SCHEMA]
    write_table(store, name, pa.Table.from_arrays(columns, schema=ENTRIES_SCHEMA), row_group_size=ROW_GROUP)


def read_entries(store: Store, name: str) -> Entries:
    """The inverse of `write_entries`."""
    return _records(read_table(store, name, schema=ENTRIES_SCHEMA))


def look_up(store: Store, index: Index, kind: Kind, digest: bytes) -> list[tuple[int, int]]:
    """Shard and row of each row of the pool whose content or uid has this 16-byte hash: reads one row group or two."""
    low, high = (int(half) for half in np.frombuffer(digest, "<u8"))
    number = int(bucket_of(np.array([low], np.uint64), index.buckets)[0])
    name = bucket_name(index.folder, kind, number)
    table = read_table(store, name, filters=(pc.field("low") == pa.scalar(low, pa.uint64())))
    found = _records(table.filter(pc.field("high") == pa.scalar(high, pa.uint64())))
    return [(int(entry["shard"]), int(entry["row"])) for entry in found]


def uid_digest(uid: str | None) -> bytes:
    """16 bytes that two uids share exactly if they are equal."""
    return hashlib.blake2b((uid or "").encode(errors="surrogatepass"), digest_size=16).digest()


def write_duplicates(store: Store, name: str, columns: Sequence[npt.NDArray[np.generic]]) -> None:
    """Write the rows that repeat another one, columns as in `DUPLICATES_SCHEMA`, by shard and row."""
    order = np.lexsort([columns[1], columns[0]])
    arrays = [pa.array(np.ascontiguousarray(column[order])) for column in columns]
    write_table(store, name, pa.Table.from_arrays(arrays, schema=DUPLICATES_SCHEMA), row_group_size=ROW_GROUP)


def read_duplicates(store: Store, index: Index, shard: Shard) -> pa.Table:
    """The rows of a shard that repeat another one: a table of `DUPLICATES_SCHEMA`, by row."""
    if not index.duplicates[shard.index]:
        return DUPLICATES_SCHEMA.empty_table()
    name = duplicates_name(index.folder, bisect_right(index.first_shards, shard.index) - 1)
    return read_table(store, name, schema=DUPLICATES_SCHEMA, filters=[("shard", "=", shard.index)])


def usable_rows(store: Store, dedup: str | None, shard: Shard, table: pa.Table) -> Ints:
    """The rows of a shard that can be used and that no deduplication dropped, by the status column of its file."""
    ok = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
    return kept_rows(store, dedup, shard, ok)


def candidate_rows(store: Store, shard: Shard, reference: EncoderSpec, index: Index, *, seed: int, epoch: int) -> Rows:
    """The candidates of a shard with their keys, by row; no vector is read."""
    table = read_embeddings(store, embedding_name(reference.sha, shard), ["status", "content"])
    rows = usable_rows(store, index.dedup, shard, table)
    rows = np.setdiff1d(rows, read_duplicates(store, index, shard)["row"].to_numpy(), assume_unique=True)
    return keyed_rows(contents(table["content"])[rows], shard.index, rows, seed=seed, epoch=epoch)


def made_with(store: Store, name: str) -> list[str]:
    """What goes with a file that is to be made again: its account, or what `curate.dedup.files` says."""
    if name.startswith("index/") and not name.endswith("/index.json"):
        return [f"{name.rpartition('/')[0]}/index.json", name]
    return made_with_of_dedup(store, name)


def _records(table: pa.Table) -> Entries:
    entries = np.empty(len(table), ENTRY)
    for name in ENTRY.names or ():
        entries[name] = table[name].to_numpy()
    return entries
