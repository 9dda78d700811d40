"""Write, scaled out: each chosen row is read once more from its shard, and travels to the file that wants it.

sub-batches, in blocks     one task each    their rows, a part for each group of shards
groups of shards           one task each    the chosen rows, with images, a part for each file
files                      one task each    their parts in, a curated file out
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import DamagedError
from curate.parts import by_destination, pack_table, read_parts, remove_parts, unpack_table, write_parts
from curate.pipelines.cluster import groups, run_tasks
from curate.pool.columns import Columns
from curate.pool.shards import ADDED_COLUMN, Shard
from curate.rounds.manifest import CuratedFile
from curate.rounds.write import chosen_rows, read_written, record_written, write_curated, written_name
from curate.select.files import read_selected, selected_name
from curate.storage import Store

GROUP_BYTES = 2**29
"""Of the shards that one task reads, were all of their rows chosen."""
BLOCK_ROWS = 1_000_000
"""Chosen rows, without images, that one task parts by shard."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What the tasks of a window are given."""

    store: Store
    columns: Columns
    schema: pa.Schema
    """Of curated files."""
    round: int
    folder: str
    """The round's."""
    steps: str
    """Of the round's steps."""
    first: int
    """Number, within the round, of the window's first sub-batch."""
    sub_batches: int
    """Of the window."""
    sub_batch_size: int
    per_file: int
    """Sub-batches of a file."""
    first_shards: tuple[int, ...] = ()
    """Of each group of the window's shards: the index of its first."""
    blocks: int = 0

    @property
    def files(self) -> int:
        """Of the window."""
        return -(-self.sub_batches // self.per_file)

    def receipt(self, file: int) -> str:
        """Name of the record of one of the window's files: called after its first sub-batch."""
        return written_name(self.steps, self.first + file * self.per_file)

    def parts(self, kind: str) -> str:
        """How the names of all files of parts of one kind begin."""
        return f"{self.steps}/{kind}-{self.first:06d}"

    def part_name(self, kind: str, number: int) -> str:
        """Name of a file of parts."""
        return f"{self.parts(kind)}-{number:06d}"


def write_window(writing: Writing, shards: Sequence[Shard]) -> list[CuratedFile]:
    """Write every curated file of a window that is not in place yet.

    Args:
        writing: what decides them; the window's selected files are complete.
        shards: of the window.

    Returns:
        The files in the order of their sub-batches.

    Raises:
        InputChangedError: a shard is not the file that was inventoried.
        DamagedError: a file is not in the store as it was written.
    """
    store = writing.store
    there = set(store.list(writing.steps))
    todo = [i for i in range(writing.files) if writing.receipt(i) not in there]
    if todo:
        rows = max(1, sum(shard.rows for shard in shards))
        row_bytes = max(1, sum(shard.bytes for shard in shards) // rows)
        sources = groups(shards, max(1, GROUP_BYTES // row_bytes))
        per_block = max(1, BLOCK_ROWS // writing.sub_batch_size)
        blocks = [range(i, min(i + per_block, writing.sub_batches)) for i in range(0, writing.sub_batches, per_block)]
        writing = replace(writing, first_shards=tuple(group[0].index for group in sources), blocks=len(blocks))
        run_tasks(_part_picks, list(enumerate(blocks)), writing, title="chosen rows")
        largest = max(sum(shard.bytes for shard in group) for group in sources)
        run_tasks(_part_rows, list(enumerate(sources)), writing, title="read", memory=2 * largest)
        # A file is put together in memory: its rows as they come, and in order.
        file_bytes = 2 * writing.per_file * writing.sub_batch_size * row_bytes
        run_tasks(_write_file, [(i, len(sources)) for i in todo], writing, title="write", memory=file_bytes)
    for kind in ("picks", "rows"):
        remove_parts(store, writing.parts(kind))
    return run_tasks(_read_back, range(writing.files), writing, title="read back")


def _part_picks(item: tuple[int, range], writing: Writing) -> None:
    """Write the chosen rows of some sub-batches, without images, a part for each group of shards."""
    number, block = item
    name, count = writing.part_name("picks", number), len(writing.first_shards)
    if writing.store.exists(name):
        return
    names = [selected_name(writing.steps, writing.first + i) for i in block]
    picks = pa.concat_tables([read_selected(writing.store, name)[0] for name in names])
    picks = picks.replace_schema_metadata(None).combine_chunks()
    group = np.searchsorted(np.array(writing.first_shards), picks["shard"].to_numpy(), side="right") - 1
    parts = by_destination(group, count, lambda at: pack_table(picks.take(pa.array(at))))
    write_parts(writing.store, name, parts, count=count)


def _part_rows(item: tuple[int, Sequence[Shard]], writing: Writing) -> None:
    """Write the chosen rows of a group of shards, with images, a part for each file."""
    number, shards = item
    name = writing.part_name("rows", number)
    if writing.store.exists(name):
        return
    names = [writing.part_name("picks", i) for i in range(writing.blocks)]
    parts = [unpack_table(part) for part in read_parts(writing.store, names, number)]
    batches: list[pa.RecordBatch] = []
    if parts:
        picks = pa.concat_tables(parts)
        for shard in shards:
            if len(here := picks.filter(pc.equal(picks["shard"], shard.index))):
                batches += chosen_rows(
                    shard, here, columns=writing.columns, schema=writing.schema, round_number=writing.round
                ).to_batches()
    # Batch by batch: `Table.take` would join all images first, copying them and overflowing 32-bit offsets.
    numbers = [
        (batch.column(ADDED_COLUMN).field("sub_batch").to_numpy() - writing.first) // writing.per_file
        for batch in batches
    ]
    files = (
        [batch.take(pa.array(np.flatnonzero(at == i))) for batch, at in zip(batches, numbers, strict=True) if i in at]
        for i in range(writing.files)
    )
    parts_of = (pack_table(pa.Table.from_batches(found)) if found else b"" for found in files)
    write_parts(writing.store, name, parts_of, count=writing.files)


def _write_file(item: tuple[int, int], writing: Writing) -> None:
    """Write one curated file from the parts of all groups of shards, and its receipt."""
    number, sources = item
    names = [writing.part_name("rows", i) for i in range(sources)]
    pieces = [unpack_table(part) for part in read_parts(writing.store, names, number)]
    file = write_curated(
        pieces, writing.store, writing.folder, columns=writing.columns, sub_batch_size=writing.sub_batch_size
    )
    record_written(writing.store, writing.receipt(number), file)


def _read_back(number: int, writing: Writing) -> CuratedFile:
    """Hash what is about to be published, as it lies in the store.

    Raises:
        DamagedError: it is not what was written; its receipt is gone then, so that it is written again.
    """
    file = read_written(writing.store, writing.receipt(number))
    name = f"{writing.folder}/{file.name}"
    try:
        with writing.store.open_input(name) as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError:
        found = "no file"
    if found != file.sha256:
        writing.store.delete(writing.receipt(number))
        raise DamagedError(name, f"sha256 {found[:12]} and not {file.sha256[:12]}")
    return file
