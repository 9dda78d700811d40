"""Parquet files: how they are opened and read. In the root every page carries a checksum, and is checked when read."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.errors import CurateError, DamagedError
from curate.messages import one_line
from curate.storage import Store

CHECKED = {"write_page_checksum": True}
"""How each file of ours is written."""
FETCHED_BYTES = 2**26
"""That are asked for at a time of a file whose row groups are smaller."""


@contextlib.contextmanager
def open_parquet(file: Any, *, footer: Any = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, whose pages are held against their checksums, where it has them.

    Args:
        file: as `open_for_arrow` opens it; it is left by this.
        footer: its `metadata` from before, if it is not to be read again.

    Raises:
        ArrowException, OSError, ValueError: it is no Parquet file, or damaged, now or when it is read.
        UserError, StoreError, InputChangedError: as `open_for_arrow`.
    """
    # Ranges that lie side by side in a store are better asked for at once, and before they are needed.
    ahead = not isinstance(file, pa.NativeFile)
    with (
        file,
        pq.ParquetFile(file, metadata=footer, pre_buffer=ahead, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def batches_of(
    parquet: pq.ParquetFile, rows: int, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows of a file in order, a bounded part of it in memory.

    To the end of an iteration Arrow holds all that it fetched for it: of a file of a gigabyte 1.2 GB.

    Args:
        parquet: the file.
        rows: of a batch at most.
        columns: all if None.
        groups: numbers of row groups; all if None.
    """
    metadata = parquet.metadata
    wanted = [
        column
        for column in range(metadata.num_columns)
        if columns is None or metadata.schema.column(column).path.partition(".")[0] in columns
    ]
    some: list[int] = []
    size = 0
    for group in range(metadata.num_row_groups) if groups is None else groups:
        here = sum(metadata.row_group(group).column(column).total_compressed_size for column in wanted)
        if some and size + here > FETCHED_BYTES:
            yield from parquet.iter_batches(rows, row_groups=some, columns=columns)
            some, size = [], 0
        some.append(group)
        size += here
    yield from parquet.iter_batches(rows, row_groups=some, columns=columns)


def write_table(store: Store, name: str, table: pa.Table, **layout: Any) -> None:
    """Write a file whole, or not at all; `layout` as `pyarrow.parquet.write_table` takes it."""
    with store.local_scratch() as scratch:
        path = scratch / "table.parquet"
        pq.write_table(table, path, **{"compression": "zstd"} | CHECKED | layout)
        store.put_file(path, name)


def read_table(
    store: Store,
    name: str,
    *,
    schema: pa.Schema | None = None,
    columns: Sequence[str] | None = None,
    filters: Any = None,
) -> pa.Table:
    """Read a file, or some columns or rows of it.

    Args:
        store: the root.
        name: of the file.
        schema: that it must have, whole.
        columns: all if None.
        filters: as `pyarrow.parquet.read_table` takes them.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not what was written.
    """
    with open_table(store, name) as parquet:
        if schema is not None and parquet.schema_arrow != schema:
            raise DamagedError(name, "its columns are others")
        if filters is None:
            table = parquet.read(None if columns is None else list(columns))
            if len(table) != parquet.metadata.num_rows:
                raise DamagedError(name, f"{len(table)} rows of {parquet.metadata.num_rows}")
            return table
    with damage_told(name), store.open_for_arrow(name) as file:
        return pq.read_table(file, columns=columns and list(columns), filters=filters, page_checksum_verification=True)


@contextlib.contextmanager
def open_table(store: Store, name: str, *, footer: Any = None) -> Iterator[pq.ParquetFile]:
    """Open a file to read parts of it; raises as `read_table`.

    Args:
        store: the root.
        name: of the file.
        footer: its `metadata` from before, if it is not to be read again.
    """
    with damage_told(name), open_parquet(store.open_for_arrow(name), footer=footer) as parquet:
        yield parquet


@contextlib.contextmanager
def damage_told(name: str) -> Iterator[None]:
    """Name the file whose damage makes a reader raise whatever it likes; what the store did is told as the store's."""
    try:
        yield
    except (CurateError, FileNotFoundError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk: Arrow's own OSErrors carry no number
        raise DamagedError(name, one_line(error)) from error
