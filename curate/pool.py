"""The pool: an explicit, ordered, fingerprinted inventory of Parquet shards. Files are never modified."""

import base64
import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate import access, storage
from curate.column_types import is_caption, is_image, is_uid, plain_batch, plain_type, united, why_unwritable
from curate.errors import CurateError, InputChangedError, ShardDamagedError, UserError
from curate.hive import with_folder_columns, with_folder_schema
from curate.messages import one_line
from curate.recipe import BadShardPolicy, PoolSection
from curate.sealed import seal, unseal
from curate.storage import FileInfo, Store

# Column names as img2dataset, Hugging Face datasets, DataComp and LAION write them, most specific first.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
CAPTION_COLUMNS = ("caption", "txt", "text", "alt_text", "TEXT", "title")
ADDED_COLUMN = "curate"
"""The struct column that curated files carry beside the user's own."""

FOOTER_THREADS = 16
READ_ROWS = 1024
"""Rows that are held at once while some of them are picked out, or none."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of the pool hold what."""

    image: str
    caption: str
    uid: str | None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of the pool, as it was when the inventory was made."""

    index: int
    name: str
    """Path within the pool: what people and manifests call it."""
    path: str
    size: int
    version: str
    """etag on an object store, modification time in ns on a local disk."""
    rows: int
    columns: Columns
    schema: int = 0
    """Which of the pool's schemas the file has."""
    largest_row_group: int = 0
    """Bytes, uncompressed."""

    @property
    def key(self) -> str:
        """Names this version of this file, read by these columns, in the root: `00000-1f2e3d4c5b6a`."""
        identity = json.dumps([self.path, self.size, self.version, asdict(self.columns)])
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
        identity = [[s.name, s.size, s.version, s.rows] for s in self.shards] + [asdict(self.columns)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        record = {
            "shards": [{k: v for k, v in asdict(shard).items() if k != "columns"} for shard in self.shards],
            "columns": asdict(self.columns),
            "schema": _schema_text(self.schema),
            "schemas": [_schema_text(schema) for schema in self.schemas],
            "ignored": self.ignored,
            "skipped": self.skipped,
            "on_bad_shard": self.on_bad_shard,
        }
        return seal(record)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Pool":
        """The inverse of `to_bytes`; `name` is for messages."""
        record = unseal(data, name)
        columns = Columns(**record["columns"])
        return cls(
            shards=tuple(Shard(columns=columns, **shard) for shard in record["shards"]),
            columns=columns,
            schema=_schema_of(record["schema"]),
            schemas=tuple(map(_schema_of, record["schemas"])),
            ignored=tuple(record["ignored"]),
            skipped=tuple(record["skipped"]),
            on_bad_shard=record.get("on_bad_shard", "fail"),  # inventories that were made before it was kept
        )


def _schema_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _schema_of(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def load_pool(store: Store, fingerprint: str) -> Pool:
    """The inventory that a round was planned on.

    Raises:
        FileNotFoundError: if the root does not hold it.
        DamagedError: it is not what was written.
    """
    name = f"pools/{fingerprint}.json"
    return Pool.from_bytes(store.read_bytes(name), name)


def take_inventory(
    section: PoolSection,
    *,
    section_name: str = "pool",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
    known: Pool | None = None,
) -> Pool:
    """List the pool, read every footer that is not known, and check every shard.

    Args:
        section: where the pool is and what its columns are called.
        section_name: what the recipe calls the section, for messages.
        progress: wraps the iteration over footers, given it and its length.
        known: an earlier inventory: the footer of a file that is still the same is not read again.

    Raises:
        UserError: one line per bad shard or other mistake, all at once.
    """
    files: dict[str, FileInfo] = {}
    ignored: list[str] = []
    mistakes: list[str] = []
    for url in [section.path] if isinstance(section.path, str) else section.path:
        try:
            found, passed_over = storage.list_parquet(url)
        except UserError as error:
            mistakes += error.lines
            continue
        files |= {file.path: file for file in found}
        ignored += passed_over
    if mistakes:
        raise UserError(*mistakes)

    ordered = [files[path] for path in sorted(files)]
    read = _footers_of(known)
    unread = [file for file in ordered if file not in read]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        new: Iterable[_Footer] = threads.map(_read_footer, unread)
        if progress and unread:
            new = progress(new, len(unread))
        read |= zip(unread, new, strict=True)
    footers = [read[file] for file in ordered]

    good = [(file, footer) for file, footer in zip(ordered, footers, strict=True) if footer.schema is not None]
    bad = [footer.error for footer in footers if footer.schema is None]
    columns: Columns | None = None
    for file, footer in good:
        try:
            columns = _find_columns(section, footer.schema, file.path, section_name)
            break
        except UserError as error:
            mistakes += error.lines
    if columns is None:
        raise UserError(*bad, *mistakes)
    usable: list[tuple[FileInfo, _Footer]] = []
    schema: pa.Schema | None = None
    for file, footer in good:
        lines = _shard_mistakes(file, footer, columns, section.max_row_group_bytes, section_name)
        if not lines:
            try:
                schema = united([footer.schema] if schema is None else [schema, footer.schema])
                usable.append((file, footer))
            except pa.ArrowException as error:
                lines = [
                    f"{file.path}: expected the column types of the shards before it, found others "
                    f"({one_line(error)}); give the column one type in all shards"
                ]
        bad += lines
    if bad and section.on_bad_shard == "fail":
        raise UserError(*bad)
    if not usable:
        raise UserError(
            *bad, f"{section_name}.path = {section.path!r}: no shard of the pool can be used; mend the files above"
        )
    names = _relative_names([file.path for file, _ in usable])
    texts = [_schema_text(footer.schema) for _, footer in usable]
    schemas = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return Pool(
        shards=tuple(
            Shard(
                index=i,
                name=name,
                path=file.path,
                size=file.size,
                version=file.version,
                rows=footer.rows,
                columns=columns,
                schema=schemas[text],
                largest_row_group=footer.largest_row_group,
            )
            for i, (name, (file, footer), text) in enumerate(zip(names, usable, texts, strict=True))
        ),
        columns=columns,
        schema=schema,
        schemas=tuple(map(_schema_of, schemas)),
        ignored=tuple(ignored),
        skipped=tuple(bad),
        on_bad_shard=section.on_bad_shard,
    )


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
    with _opened(shard, columns, lambda: rows) as parquet:
        for batch in parquet.iter_batches(batch_size=batch_rows, columns=columns):
            rows += batch.num_rows
            yield with_folder_columns(batch, shard.path, columns)
    if rows != shard.rows:
        raise ShardDamagedError(shard.path, shard.rows, f"{rows}")


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
    with _opened(shard, columns, lambda: read) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        held = np.unique(np.searchsorted(starts, rows, side="right") - 1)
        numbers = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in held]) if len(held) else rows[:0]
        found = 0
        for batch in parquet.iter_batches(batch_size=batch_rows, row_groups=held.tolist(), columns=columns):
            here = numbers[read : read + batch.num_rows]
            read += batch.num_rows
            wanted = np.flatnonzero(np.isin(here, rows, assume_unique=True))
            if len(wanted):
                found += len(wanted)
                picked = plain_batch(batch).take(pa.array(wanted))
                yield here[wanted], with_folder_columns(picked, shard.path, columns)
    if found != len(rows):
        raise ShardDamagedError(shard.path, shard.rows, f"{found} of {len(rows)} that are wanted")


def read_rows(shard: Shard, rows: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Some rows of a shard, ascending, in plain types, from the row groups that hold them.

    Raises:
        InputChangedError, ShardDamagedError, UserError, StoreError: as `read_batches`.
    """
    found = read_some(shard, np.array(rows, np.int64), columns, batch_rows=READ_ROWS)
    with _opened(shard, columns) as parquet:
        none = plain_batch(pa.RecordBatch.from_pylist([], parquet.read_row_groups([], columns=list(columns)).schema))
    return pa.Table.from_batches([none, *(batch for _, batch in found)])


@contextlib.contextmanager
def _opened(
    shard: Shard, columns: Sequence[str] | None, rows: Callable[[], int] = lambda: 0
) -> Iterator[pq.ParquetFile]:
    """A shard's file, of which these columns are read; `rows` says, for messages, how many were read."""
    try:
        with (
            access.open_input(shard.path) as file,
            pq.ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            yield parquet
    except (CurateError, GeneratorExit):
        raise
    except Exception as error:  # a damaged file makes a reader raise whatever it likes
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a local disk: Arrow's own OSErrors carry no number
        where = f"in column {column!r}" if (column := _damaged_column(shard, columns)) else "somewhere"
        found = f"a damaged page {where} after row {rows()} ({one_line(error)})"
        raise ShardDamagedError(shard.path, shard.rows, found) from error


def _damaged_column(shard: Shard, columns: Sequence[str] | None) -> str | None:
    """The first of some columns that cannot be read, by reading each alone; None if none is found again."""
    with access.open_input(shard.path) as file:  # which raises, whatever is caught within, what the store did
        for name in columns or pq.ParquetFile(file).schema_arrow.names:
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    for _ in parquet.iter_batches(batch_size=READ_ROWS, columns=[name]):
                        pass
            except Exception:
                return name
    return None


def _check_unchanged(shard: Shard) -> None:
    try:
        found = storage.file_info(shard.path)
    except FileNotFoundError:
        raise InputChangedError(
            f"{shard.path}: expected {shard.size} bytes, found no file; the shard was removed while the round was "
            "running: put it back, or delete the round's folder to begin it anew"
        ) from None
    if (found.size, found.version) != (shard.size, shard.version):
        raise InputChangedError(
            f"{shard.path}: expected {shard.size} bytes, version {shard.version}, found {found.size} bytes, version "
            f"{found.version}; the shard changed while the round was running: restore it, or delete the round's folder "
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


@dataclass(frozen=True, kw_only=True)
class _Footer:
    rows: int = 0
    schema: pa.Schema | None = None
    largest_row_group: int = 0
    error: str = ""


def _footers_of(known: Pool | None) -> dict[FileInfo, _Footer]:
    """What an inventory says of the footers of its files."""
    if known is None:
        return {}
    return {
        FileInfo(path=shard.path, size=shard.size, version=shard.version): _Footer(
            rows=shard.rows, schema=known.schemas[shard.schema], largest_row_group=shard.largest_row_group
        )
        for shard in known.shards
    }


def _read_footer(file: FileInfo) -> _Footer:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", file.path):
        return _Footer(error=f"{file.path!r}: expected a name in UTF-8 without control characters; rename the file")
    if file.size == 0:
        return _Footer(error=f"{file.path}: expected a Parquet file, found 0 bytes; remove or replace it")
    try:
        with access.open_input(file.path) as handle, pq.ParquetFile(handle) as parquet:
            metadata = parquet.metadata
            groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            return _Footer(
                rows=metadata.num_rows,
                schema=with_folder_schema(parquet.schema_arrow, file.path),
                largest_row_group=max(groups, default=0),
            )
    except CurateError:
        raise  # the store failed or refuses: nothing is known of the file
    except Exception as error:  # a fuzzed footer raises whatever it likes, ValueError and OverflowError included
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a local disk: Arrow's own OSErrors carry no number
        reason = one_line(error)
        return _Footer(
            error=f"{file.path}: expected a Parquet file, found a broken footer ({reason}); remove or replace it"
        )


def _listed(schema: pa.Schema) -> str:
    """Its column names, the first of them if they are many, in one line whatever they contain."""
    names = [name if name.isprintable() else repr(name) for name in schema.names]
    return ", ".join(names[:20]) + (f", … ({len(names)} columns)" if len(names) > 20 else "") or "no column"


def _find_columns(section: PoolSection, schema: pa.Schema, path: str, section_name: str) -> Columns:
    """The pool's columns by the recipe, else by convention."""
    missing: list[str] = []
    found: dict[str, str] = {}
    for role, given, known in (
        ("image", section.image, IMAGE_COLUMNS),
        ("caption", section.caption, CAPTION_COLUMNS),
    ):
        name = given or next((name for name in known if name in schema.names), None)
        if name is None:
            missing.append(
                f"expected the {role} column as one of {', '.join(known)} (or name it with {section_name}.{role})"
            )
        else:
            found[role] = name
    if missing:
        raise UserError(f"{path}: {' and '.join(missing)}, found {_listed(schema)}; rename or name the column")
    return Columns(image=found["image"], caption=found["caption"], uid=section.uid)


def _shard_mistakes(
    file: FileInfo, footer: _Footer, columns: Columns, max_row_group_bytes: int, section_name: str
) -> list[str]:
    """Why this shard cannot be used, one line each; an empty shard is fine."""
    schema = footer.schema
    assert schema is not None
    if repeated := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        return [f"{file.path}: expected each column once, found {repeated[0]!r} twice; rename or drop one"]
    lines = []
    for role, name, accepts, expected in (
        ("image", columns.image, is_image, "binary or struct<bytes: binary, …>"),
        ("caption", columns.caption, is_caption, "string"),
        ("uid", columns.uid, is_uid, "string or integer"),
    ):
        if name is None:
            continue
        if name not in schema.names:
            lines.append(
                f"{file.path}: expected the {role} column {name!r}, found {_listed(schema)}; "
                f"mend the shard, or name the column with {section_name}.{role}"
            )
        elif not accepts(schema.field(name).type):
            lines.append(
                f"{file.path}: {role} column {name!r}: expected {expected}, found {schema.field(name).type}; "
                f"convert it, or name another column with {section_name}.{role}"
            )
    lines += [
        f"{file.path}: column {field.name!r}: expected a type whose values can be copied into a round, found "
        f"{field.type} ({why}); convert it to {plain_type(field.type)}, to string or to binary, or drop it"
        for field in schema
        if field.name not in (columns.image, columns.caption, columns.uid)
        and (why := why_unwritable(field.type)) is not None
    ]
    if ADDED_COLUMN in schema.names:
        lines.append(
            f"{file.path}: has a column {ADDED_COLUMN!r} already, the name of the one we add; rename or drop it"
        )
    if footer.largest_row_group > max_row_group_bytes:
        lines.append(
            f"{file.path}: largest row group is {footer.largest_row_group:,} bytes, the limit {max_row_group_bytes:,} "
            f"(pool.max_row_group_bytes); run: curate reshard {shlex.quote(file.path)} --to FOLDER "
            f"--row-group-bytes {max_row_group_bytes // 2}"
        )
    return lines


def _relative_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folder that all of them share."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return ["/".join(path.split("/")[shared:]) for path in paths]
