"""The inventory: list a pool, look at every footer, and say of every file why it is no shard."""

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate import access, storage
from curate.errors import CurateError, UserError
from curate.messages import one_line
from curate.pool.column_types import is_caption, is_image, is_uid, plain_type, united, why_unwritable
from curate.pool.hive import with_folder_schema
from curate.pool.shards import ADDED_COLUMN, Columns, Pool, Shard, schema_of, schema_text
from curate.recipe import PoolSection
from curate.storage import FileInfo, of_other_format

# Column names as img2dataset, Hugging Face datasets, DataComp and LAION write them, most specific first.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
CAPTION_COLUMNS = ("caption", "txt", "text", "alt_text", "TEXT", "title")
FOOTER_THREADS = 16


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
    texts = [schema_text(footer.schema) for _, footer in usable]
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
        schemas=tuple(map(schema_of, schemas)),
        ignored=tuple(ignored),
        skipped=tuple(bad),
        on_bad_shard=section.on_bad_shard,
    )


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
            error=f"{file.path}: expected a Parquet file, found a broken footer ({reason}); "
            + (of_other_format(file.path) or "remove or replace it")
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
