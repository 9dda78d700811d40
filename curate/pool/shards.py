"""The pool: an explicit, ordered, fingerprinted inventory of shards, and how their rows are read. Never modified."""

import base64
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate import access, storage
from curate.errors import CurateError, InputChangedError, ShardDamagedError
from curate.formats.source import Source, open_source
from curate.messages import one_line
from curate.pool.column_types import plain_batch
from curate.pool.columns import Columns
from curate.pool.derived import derived_schema, made_of, with_derived
from curate.recipe import BadShardPolicy
from curate.sealed import seal, unseal
from curate.storage import FileInfo, Store

ADDED_COLUMN = "curate"
"""The struct column that curated files carry beside the user's own."""

PICTURE_BYTES = 2**16
"""Of a picture that is only named, of which nothing is known before: one of 512 pixels, as web pages have it."""

READ_ROWS = 1024
"""Rows that are held at once while some of them are picked out, or none."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of the pool, as it was when the inventory was made."""

    index: int
    name: str
    """Path within the pool: what people and manifests call it."""
    path: str
    size: int
    version: str
    """etag on an object store, modification time in ns on a local disk; and those of the side-car, if there is one."""
    rows: int
    columns: Columns
    schema: int = 0
    """Which of the pool's schemas the file has."""
    largest_row_group: int = 0
    """Bytes, uncompressed."""
    side_car: str = ""
    """Path of the Parquet file beside a tar."""
    offsets: str = ""
    """URL of the index of a tar: where its samples lie in it."""

    @property
    def bytes(self) -> int:
        """Of the file, and about those of the pictures that it names: what a task that holds its rows has in memory."""
        return self.size + self.rows * PICTURE_BYTES * (self.columns.paths is not None)

    @property
    def key(self) -> str:
        """Names this version of this file, read by these columns, in the root: `00000-1f2e3d4c5b6a`."""
        identity = json.dumps([self.path, self.size, self.version, self.columns.identity()])
        # A leading dot would hide the file from `Store.list`; a file system takes 255 bytes.
        stem = PurePosixPath(self.name).stem.lstrip(".")[:50]
        return f"{stem}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The inventory. `rows` counts every row of every shard that could be read."""

    shards: tuple[Shard, ...]
    columns: Columns
    schema: pa.Schema
    """Union of the shards' schemas: what a curated file's own columns look like before images are widened."""
    ignored: tuple[str, ...]
    """Files in the pool's folders that are not shards (hidden, temporary, other suffix)."""
    skipped: tuple[str, ...]
    """One line per bad shard that `on_bad_shard = "skip"` left out."""
    schemas: tuple[pa.Schema, ...] = ()
    """Of the shards, each once: what is known of a file whose footer need not be read again."""
    on_bad_shard: BadShardPolicy = "fail"
    """For whoever reads on: a footer may be sound and a page damaged."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and versions of the shards, and of the columns used."""
        identity = [[s.name, s.size, s.version, s.rows] for s in self.shards] + [self.columns.identity()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        record = {
            "shards": [{k: v for k, v in asdict(shard).items() if k != "columns"} for shard in self.shards],
            "columns": self.columns.to_json(),
            "schema": schema_text(self.schema),
            "schemas": [schema_text(schema) for schema in self.schemas],
            "ignored": self.ignored,
            "skipped": self.skipped,
            "on_bad_shard": self.on_bad_shard,
        }
        return seal(record)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Pool":
        """The inverse of `to_bytes`; `name` is for messages."""
        record = unseal(data, name)
        columns = Columns.from_json(record["columns"])
        return cls(
            shards=tuple(Shard(columns=columns, **shard) for shard in record["shards"]),
            columns=columns,
            schema=schema_of(record["schema"]),
            schemas=tuple(map(schema_of, record["schemas"])),
            ignored=tuple(record["ignored"]),
            skipped=tuple(record["skipped"]),
            on_bad_shard=record.get("on_bad_shard", "fail"),  # inventories that were made before it was kept
        )


def schema_text(schema: pa.Schema) -> str:
    """A schema as a record holds it."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_of(text: str) -> pa.Schema:
    """The inverse of `schema_text`."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def load_pool(store: Store, fingerprint: str) -> Pool:
    """The inventory that a round was planned on.

    Raises:
        FileNotFoundError: if the root does not hold it.
        DamagedError: it is not what was written.
    """
    name = f"pools/{fingerprint}.json"
    return Pool.from_bytes(store.read_bytes(name), name)


def read_batches(shard: Shard, columns: Sequence[str] | None, *, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Rows of a shard in order, `batch_rows` at a time.

    Args:
        shard: of the pool.
        columns: their names, of the file's columns and its folders'; those that are neither are left out. All if None.
        batch_rows: rows at a time, at most.

    Raises:
        InputChangedError: if the file is not the one that the inventory recorded.
        ShardDamagedError: a page does not decode or differs from its checksum, where it has one.
        UserError, StoreError: the store refuses or fails, which says nothing of the file.
    """
    _check_unchanged(shard)
    rows = 0
    with _opened(shard, columns, lambda: rows) as source:
        for batch in source.batches(None, made_of(columns, shard.columns), batch_rows):
            rows += batch.num_rows
            yield with_derived(plain_batch(batch), shard.path, shard.columns, columns)
    if rows != shard.rows:
        raise ShardDamagedError(shard.path, shard.rows, f"{rows}")


def row_groups(shard: Shard) -> list[int]:
    """Rows of each part of a shard that is read whole: of a row group, a record batch, a sample of a tar.

    Raises:
        InputChangedError, ShardDamagedError, UserError, StoreError: as `read_batches`.
    """
    _check_unchanged(shard)
    with _opened(shard, None) as source:
        return [int(rows) for rows in source.groups]


def read_some(
    shard: Shard, rows: npt.NDArray[np.int64], columns: Sequence[str] | None, *, batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Some rows of a shard, from the row groups that hold them and no others.

    Args:
        shard: of the pool.
        rows: their numbers, ascending.
        columns: their names, those that the file has not are left out; all columns if None.
        batch_rows: that are held at once, wanted or not.

    Yields:
        Numbers of rows, and these rows in plain types, in order.

    Raises:
        InputChangedError, ShardDamagedError, UserError, StoreError: as `read_batches`.
    """
    _check_unchanged(shard)
    read = 0
    with _opened(shard, columns, lambda: read) as source:
        starts = np.cumsum([0, *source.groups])
        held = np.unique(np.searchsorted(starts, rows, side="right") - 1)
        numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in held]) if len(held) else rows[:0]
        found = 0
        for batch in source.batches(held.tolist(), made_of(columns, shard.columns), batch_rows):
            here = numbers[read : read + batch.num_rows]
            read += batch.num_rows
            wanted = np.flatnonzero(np.isin(here, rows, assume_unique=True))
            if len(wanted):
                found += len(wanted)
                picked = plain_batch(batch).take(pa.array(wanted))
                yield here[wanted], with_derived(picked, shard.path, shard.columns, columns)
    if found != len(rows):
        raise ShardDamagedError(shard.path, shard.rows, f"{found} of {len(rows)} that are wanted")


def read_rows(shard: Shard, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Some rows of a shard, ascending, in plain types, from the row groups that hold them.

    Raises:
        InputChangedError, ShardDamagedError, UserError, StoreError: as `read_batches`.
    """
    found = read_some(shard, np.array(rows, np.int64), columns, batch_rows=READ_ROWS)
    with _opened(shard, columns) as source:
        whole = derived_schema(source.schema, shard.path, shard.columns)
    some = pa.schema([field for field in whole if field.name in columns])
    none = plain_batch(pa.RecordBatch.from_pylist([], some))
    return pa.Table.from_batches([none, *(batch.select(some.names) for _, batch in found)])


def spread(rows: int, most: int) -> list[int]:
    """Numbers of some of so many rows, evenly from the first to the last; of all of them if these are not more.

    >>> spread(10, 4), spread(3, 4), spread(0, 4)
    ([0, 3, 6, 9], [0, 1, 2], [])
    """
    found: list[int] = np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(int)).tolist()
    return found


@contextlib.contextmanager
def _opened(shard: Shard, columns: Sequence[str] | None, rows: Callable[[], int] = lambda: 0) -> Iterator[Source]:
    """A shard's file, of which these columns are read; `rows` says, for messages, how many were read."""
    try:
        with _source_of(shard) as source:
            yield source
    except (CurateError, GeneratorExit):
        raise
    except Exception as error:  # a damaged file makes a reader raise whatever it likes
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a local disk: Arrow's own OSErrors carry no number
        where = f"in column {column!r}" if (column := _damaged_column(shard, columns)) else "somewhere"
        found = f"a damaged page {where} after row {rows()} ({one_line(error)})"
        raise ShardDamagedError(shard.path, shard.rows, found) from error


def _source_of(shard: Shard) -> contextlib.AbstractContextManager[Source]:
    return open_source(shard.path, index=shard.offsets, side_car=shard.side_car)


def _damaged_column(shard: Shard, columns: Sequence[str] | None) -> str | None:
    """The first of some columns that cannot be read, by reading each alone; None if none is found again."""
    with access.open_input(shard.path):  # which raises, whatever is caught within, what the store did
        for name in (made_of(columns, shard.columns) if columns else None) or _names(shard):
            try:
                with _source_of(shard) as source:
                    for _ in source.batches(None, [name], READ_ROWS):
                        pass
            except Exception:
                return name
    return None


def _names(shard: Shard) -> list[str]:
    """Of a damaged file's columns, none if not even those can be read."""
    try:
        with _source_of(shard) as source:
            return list(source.schema.names)
    except Exception:
        return []


def version_of(file: FileInfo, side_car: FileInfo | None) -> str:
    """The version of a shard: of its file, and of the one beside a tar."""
    return file.version if side_car is None else f"{file.version}+{side_car.size}.{side_car.version}"


def _check_unchanged(shard: Shard) -> None:
    try:
        found = storage.file_info(shard.path)
        version = version_of(found, storage.file_info(shard.side_car) if shard.side_car else None)
    except FileNotFoundError:
        raise InputChangedError(
            f"{shard.path}: expected {shard.size} bytes, found no file; the shard was removed while the round was "
            "running: put it back, or delete the round's folder to begin it anew"
        ) from None
    if (found.size, version) != (shard.size, shard.version):
        raise InputChangedError(
            f"{shard.path}: expected {shard.size} bytes, version {shard.version}, found {found.size} bytes, version "
            f"{version}; the shard changed while the round was running: restore it, or delete the round's folder "
            "to begin it anew"
        )


def image_bytes(column: pa.Array) -> pa.Array:
    """The encoded bytes of an image column, whether plain binary or Hugging Face's struct<bytes, path>."""
    if pa.types.is_struct(column.type):
        # flatten() and not field(): it carries the struct's own nulls down to the child.
        column = column.flatten()[column.type.get_field_index("bytes")]
    return column.cast(pa.large_binary())


def caption_bytes(column: pa.Array) -> pa.Array:
    """UTF-8 of a caption column, unchecked: one invalid caption must not take its whole batch with it."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())
