"""Shuffle a pool once, scaled out: rows of all shards, in a random order, as new shards.

    shards, in groups    one task each    their rows, a part for each new shard
    new shards           one task each    their parts in, in the order of the keys

A row's key is a hash of the seed, its shard and its number, so that whoever does it again writes the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import CommitConflictError, InputChangedError, UserError
from curate.parquet import CHECKED
from curate.parts import by_destination, pack_table, read_parts, remove_parts, unpack_table, write_parts
from curate.pipelines.cluster import connect, footers_bar, groups, run_tasks
from curate.pool.column_types import plain_batch
from curate.pool.inventory import take_inventory
from curate.pool.reshard import ROW_GROUP_ROWS, pieces
from curate.pool.shards import READ_ROWS, Shard, read_batches
from curate.recipe import PoolSection
from curate.sealed import seal
from curate.select.windows import row_keys
from curate.storage import Store

GROUP_BYTES = 2**28
"""Of the shards that one task reads."""
KEY = "curate shuffle key"
"""A column that rows have on their way."""
RECORD = "shuffle.json"
PARTS = "parts"


@dataclass(frozen=True, kw_only=True)
class _Shuffle:
    """What all tasks are given."""

    store: Store
    """Where the new shards go."""
    schema: pa.Schema
    seed: int
    sources: int
    count: int
    """New shards."""
    row_group_bytes: int

    def part_name(self, source: int) -> str:
        return f"{PARTS}-{source:06d}"


def shard_name(number: int) -> str:
    """Name of a new shard."""
    return f"{number:06d}.parquet"


def shuffle_pool(
    pool: PoolSection,
    to: str,
    *,
    rows_per_shard: int,
    row_group_bytes: int,
    seed: int = 0,
    address: str = "local",
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write the rows of a pool, each once, in a random order.

    Args:
        pool: where its shards are.
        to: folder or `s3://bucket/prefix` of the new shards; empty, or begun by the same command.
        rows_per_shard: about; which rows meet in a shard is random, and so is how many.
        row_group_bytes: uncompressed, of the new shards.
        seed: decides the order.
        address: Ray cluster.
        say: told the counts.

    Returns:
        Names of the new shards within the folder.

    Raises:
        UserError: in the pool; or the folder holds other files, or was begun with other arguments.
        InputChangedError: a shard changed meanwhile.
    """
    store = Store(to)
    store.probe()
    inventory = take_inventory(pool, progress=footers_bar)
    count = max(1, round(inventory.rows / rows_per_shard))
    names = [shard_name(i) for i in range(count)]
    record = seal({"pool": inventory.fingerprint, "seed": seed, "shards": count, "row_group_bytes": row_group_bytes})
    found = set(store.list())
    if found and RECORD not in found:
        raise UserError(f"{store.url}: expected an empty folder, found {min(found)}; choose another one")
    try:
        store.put_if_absent(RECORD, record)
    except CommitConflictError:
        raise UserError(
            f"{store.url}/{RECORD}: the shuffle in this folder was begun with another pool, seed or size; choose an "
            "empty folder"
        ) from None
    if todo := [i for i, name in enumerate(names) if name not in found]:
        connect(address)
        row_bytes = max(1, sum(shard.bytes for shard in inventory.shards) // max(1, inventory.rows))
        sources = groups(inventory.shards, max(1, GROUP_BYTES // row_bytes))
        shuffle = _Shuffle(
            store=store,
            schema=inventory.schema,
            seed=seed,
            sources=len(sources),
            count=count,
            row_group_bytes=row_group_bytes,
        )
        largest = max(sum(shard.bytes for shard in group) for group in sources)
        run_tasks(_part_rows, list(enumerate(sources)), shuffle, title="read", memory=3 * largest)
        run_tasks(_write_shard, todo, shuffle, title="write", memory=4 * row_bytes * rows_per_shard)
    remove_parts(store, PARTS)
    written = sum(run_tasks(_count_rows, names, store, title="count"))
    if written != inventory.rows:
        raise InputChangedError(
            f"{store.url}: expected the pool's {inventory.rows:,} rows, found {written:,}; empty it and run again"
        )
    say(f"{written:,} rows of {len(inventory.shards):,} shards in {count:,} new ones, in a random order of seed {seed}")
    return names


def _part_rows(item: tuple[int, Sequence[Shard]], shuffle: _Shuffle) -> None:
    """Write the rows of a group of shards, a part for each new shard."""
    number, shards = item
    name = shuffle.part_name(number)
    if shuffle.store.exists(name):
        return
    batches = [batch for shard in shards for batch in _keyed(shard, shuffle)]
    keys = [batch.column(KEY).to_numpy() for batch in batches]
    numbers = [((key >> np.uint64(32)) * np.uint64(shuffle.count) >> np.uint64(32)).astype(np.int64) for key in keys]
    # Batch by batch: of many images joined the 32-bit offsets would overflow.
    sent = [list(by_destination(at, shuffle.count, _packed(batch))) for at, batch in zip(numbers, batches, strict=True)]
    del batches
    tables = ([unpack_table(parts[i]) for parts in sent if parts[i]] for i in range(shuffle.count))
    write_parts(
        shuffle.store,
        name,
        (pack_table(pa.concat_tables(some)) if some else b"" for some in tables),
        count=shuffle.count,
    )


def _packed(batch: pa.RecordBatch) -> Callable[[npt.NDArray[np.int64]], bytes]:
    return lambda at: pack_table(pa.Table.from_batches([batch.take(pa.array(at))]))


def _keyed(shard: Shard, shuffle: _Shuffle) -> Iterator[pa.RecordBatch]:
    """All rows of a shard in the types of the whole pool, and their keys."""
    own = int.from_bytes(hashlib.blake2b(shard.name.encode(), digest_size=8).digest(), "little")
    start = 0
    for batch in read_batches(shard, None, batch_rows=READ_ROWS):
        plain = plain_batch(batch)
        rows = np.arange(start, start + plain.num_rows, dtype=np.uint64)
        start += plain.num_rows
        keys = row_keys(np.column_stack([np.full(len(rows), own, np.uint64), rows]), seed=shuffle.seed, epoch=0)
        columns = [
            plain.column(field.name).cast(field.type)
            if field.name in plain.schema.names
            else pa.nulls(plain.num_rows, field.type)
            for field in shuffle.schema
        ]
        yield pa.RecordBatch.from_arrays(
            [*columns, pa.array(keys)], schema=shuffle.schema.append(pa.field(KEY, pa.uint64()))
        )


def _write_shard(number: int, shuffle: _Shuffle) -> None:
    """Write one new shard."""
    names = [shuffle.part_name(i) for i in range(shuffle.sources)]
    batches = [batch for part in read_parts(shuffle.store, names, number) for batch in unpack_table(part).to_batches()]
    bounds = np.cumsum([0, *(batch.num_rows for batch in batches)])
    keys = np.concatenate([np.empty(0, np.uint64), *(batch.column(KEY).to_numpy() for batch in batches)])
    order = np.argsort(keys, kind="stable")
    with shuffle.store.local_scratch() as scratch:
        path = scratch / "shard.parquet"
        with pq.ParquetWriter(path, shuffle.schema, compression="zstd", **CHECKED) as writer:
            for start in range(0, len(order), ROW_GROUP_ROWS):
                at = order[start : start + ROW_GROUP_ROWS]
                held = np.searchsorted(bounds, at, side="right") - 1
                rows = [batches[i].slice(j - bounds[i], 1) for i, j in zip(held.tolist(), at.tolist(), strict=True)]
                group = pa.Table.from_batches(rows).drop_columns([KEY]).combine_chunks()
                for batch in group.to_batches():
                    for piece in pieces(batch, shuffle.row_group_bytes):
                        writer.write_batch(piece, row_group_size=ROW_GROUP_ROWS)
        shuffle.store.put_file(path, shard_name(number))


def _count_rows(name: str, store: Store) -> int:
    with store.open_input(name) as file, pq.ParquetFile(file) as parquet:
        return int(parquet.metadata.num_rows)
