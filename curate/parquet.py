"""Parquet files of the root: every page carries a checksum, and is checked when it is read."""

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
    with damage_told(name), store.open_input(name) as file:
        return pq.read_table(file, columns=columns and list(columns), filters=filters, page_checksum_verification=True)


@contextlib.contextmanager
def open_table(store: Store, name: str, *, footer: Any = None) -> Iterator[pq.ParquetFile]:
    """Open a file to read parts of it; raises as `read_table`.

    Args:
        store: the root.
        name: of the file.
        footer: its `metadata` from before, if it is not to be read again.
    """
    with (
        damage_told(name),
        store.open_input(name) as file,
        pq.ParquetFile(file, metadata=footer, page_checksum_verification=True) as parquet,
    ):
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
