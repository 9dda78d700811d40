"""Write, scaled out: source shards are read once more and only chosen rows travel, to the file that wants them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from curate.errors import DamagedError
from curate.manifest import CuratedFile
from curate.pool import ADDED_COLUMN, Pool, Shard
from curate.selected import read_selected, selected_name
from curate.storage import Store
from curate.write import chosen_rows, read_written, record_written, write_curated, written_name
from pipelines.cluster import exchange, fetch, groups


def write_round(
    store: Store,
    pool: Pool,
    *,
    sub_batches: int,
    sub_batch_size: int,
    file_rows: int,
    round_number: int,
    folder: str,
    steps: str,
) -> list[CuratedFile]:
    """Write every curated file of a round that is not in place yet.

    Args:
        store: the root.
        pool: the inventory.
        sub_batches: of the round; their selected files are complete.
        sub_batch_size: b.
        file_rows: rows per file, rounded to whole sub-batches.
        round_number: of the round.
        folder: the round's.
        steps: folder of its steps.

    Returns:
        The files in the order of their sub-batches.

    Raises:
        InputChangedError: a shard is not the file that was inventoried.
        DamagedError: a file is not in the store as it was written.
    """
    per_file = max(1, file_rows // sub_batch_size)
    names = [written_name(steps, i) for i in range(-(-sub_batches // per_file))]
    there = set(store.list(steps))
    todo = [i for i, name in enumerate(names) if name not in there]
    wanted = [i for i in range(sub_batches) if i // per_file in todo]

    def split(shards: list[Shard]) -> list[pa.Table]:
        picks = _picks_of(store, shards, [selected_name(steps, i) for i in wanted])
        rows = [
            chosen_rows(shard, pool, here, round_number)
            for shard in shards
            if len(here := picks.filter(pc.equal(picks["shard"], shard.index)))
        ]
        if not rows:
            return [None] * len(todo)
        # Batch by batch: `Table.take` would join all images first, copying them and overflowing 32-bit offsets.
        batches = [batch for table in rows for batch in table.to_batches()]
        numbers = [batch.column(ADDED_COLUMN).field("sub_batch").to_numpy() // per_file for batch in batches]
        return [
            pa.Table.from_batches(
                [
                    batch.take(pa.array(np.flatnonzero(number == i)))
                    for batch, number in zip(batches, numbers, strict=True)
                    if (number == i).any()
                ],
                batches[0].schema,
            )
            for i in todo
        ]

    def join(number: int, parts: Sequence[pa.Table | None]) -> None:
        pieces = [part for part in parts if part is not None]
        file = write_curated(pieces, store, folder, columns=pool.columns, sub_batch_size=sub_batch_size)
        record_written(store, names[number], file)

    # A file is put together in memory: its rows as they come, and in order.
    file_bytes = 2 * per_file * sub_batch_size * sum(shard.size for shard in pool.shards) // max(1, pool.rows)
    fetch(exchange(groups(pool.shards), split, todo, join, title="write", join_memory=file_bytes))
    files = [read_written(store, name) for name in names]
    fetch([_read_back.remote(store, folder, file, name) for file, name in zip(files, names, strict=True)])
    return files


@ray.remote
def _read_back(store: Store, folder: str, file: CuratedFile, receipt: str) -> None:
    """Hash what is about to be published, as it lies in the store.

    Raises:
        DamagedError: it is not what was written; its receipt is gone then, so that it is written again.
    """
    name = f"{folder}/{file.name}"
    try:
        with store.open_input(name) as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        found = "no file"
    if found != file.sha256:
        store.delete(receipt)
        raise DamagedError(name, f"sha256 {found[:12]} and not {file.sha256[:12]}")


def _picks_of(store: Store, shards: Sequence[Shard], names: Sequence[str]) -> pa.Table:
    """The selected rows of these shards, one file after the other: all of a round's may be too many to hold."""
    first, last = shards[0].index, shards[-1].index
    parts = []
    for name in names:
        table, _ = read_selected(store, name)
        parts.append(table.filter((pc.field("shard") >= first) & (pc.field("shard") <= last)))
    return pa.concat_tables(parts)
