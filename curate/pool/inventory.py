"""The inventory: list a pool, look at every footer or index, and say of every file why it is no shard."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from curate.errors import CurateError, UserError
from curate.formats.source import cache_folder, format_of, list_shards, of_other_format, open_source, side_cars
from curate.formats.tar import TAR, index_url, keep_index
from curate.messages import one_line
from curate.pool.column_types import (
    is_caption,
    is_image,
    is_list_of_texts,
    is_nested_text,
    is_text,
    is_uid,
    plain_type,
    united,
    why_unwritable,
)
from curate.pool.columns import Columns
from curate.pool.derived import derived_schema
from curate.pool.hive import with_folder_schema
from curate.pool.shards import ADDED_COLUMN, Pool, Shard, schema_of, schema_text, version_of
from curate.pool.wanted import check_where, columns_asked, read_uids
from curate.recipe import PoolSection
from curate.storage import FileInfo

# Column names as img2dataset, Hugging Face datasets, DataComp and LAION write them, most specific first.
IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "img", "image_bytes")
PATH_COLUMNS = ("file_name", "filepath", "image_path", "path")
"""As `imagefolder` and open_clip's tables call what names a picture."""
CAPTION_COLUMNS = ("caption", "txt", "text", "alt_text", "TEXT", "title", "captions")
FOOTER_THREADS = 16


def take_inventory(
    section: PoolSection,
    *,
    section_name: str = "pool",
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
    known: Pool | None = None,
    indices: str | None = None,
) -> Pool:
    """List the pool, read every footer that is not known, and check every shard.

    Of tars every header is read once, which on an object store is the whole tar, for it has no index: see `indices`.

    Args:
        section: where the pool is and what its columns are called.
        section_name: what the recipe calls the section, for messages.
        progress: wraps the iteration over footers, given it and its length.
        known: an earlier inventory: the footer of a file that is still the same is not read again.
        indices: folder or URL where indices of tars are kept; one of this machine's user if None.

    Raises:
        UserError: one line per bad shard or other mistake, all at once.
    """
    mistakes: list[str] = []
    opened, ignored = _listed_files(section, indices or cache_folder())
    read = _footers_of(known)
    unread = [file for file in opened if file not in read]
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        new: Iterable[_Footer] = threads.map(lambda file: _read_footer(file, opened[file]), unread)
        if progress and unread:
            new = progress(new, len(unread))
        read |= zip(unread, new, strict=True)

    good = [(file, read[file]) for file in opened if read[file].schema is not None]
    bad = [read[file].error for file in opened if read[file].schema is None]
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
            own = derived_schema(footer.schema, file.path, columns)
            try:
                schema = united([own] if schema is None else [schema, own])
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
    columns = _with_wishes(columns, section, schema)
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
                side_car=opened[file].side_car,
                offsets=opened[file].index,
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
class _Opened:
    """What opening a file takes beside its path."""

    side_car: str
    index: str


@dataclass(frozen=True, kw_only=True)
class _Footer:
    rows: int = 0
    schema: pa.Schema | None = None
    largest_row_group: int = 0
    error: str = ""


def _listed_files(section: PoolSection, indices: str) -> tuple[dict[FileInfo, _Opened], list[str]]:
    """The files of a pool, in order, and the paths that were passed over.

    Raises:
        UserError: paths at which there is nothing, all together.
    """
    files: dict[str, FileInfo] = {}
    ignored: list[str] = []
    mistakes: list[str] = []
    for url in [section.path] if isinstance(section.path, str) else section.path:
        try:
            found, passed_over = list_shards(url)
        except UserError as error:
            mistakes += error.lines
            continue
        files |= {file.path: file for file in found}
        ignored += passed_over
    if mistakes:
        raise UserError(*mistakes)
    beside = side_cars(list(files.values()))
    if beside and (first := next(iter(beside.values()))).path in files and _holds_pictures(first.path, section):
        # A pool of Parquet, whatever tars are: the first pair tells of all.
        ignored += beside
        for path in beside:
            del files[path]
        beside = {}
    opened = {}
    for path in sorted(files.keys() - {file.path for file in beside.values()}):
        other = beside.get(path)
        file = replace(files[path], version=version_of(files[path], other))
        index = index_url(indices, path, file.size, file.version) if path.endswith(TAR) else ""
        opened[file] = _Opened(side_car=other.path if other else "", index=index)
    return opened, ignored


def _holds_pictures(path: str, section: PoolSection) -> bool:
    """Whether a Parquet file beside a tar has a column of pictures itself; what is wrong with it is told later."""
    try:
        with open_source(path) as source:
            name = section.image or _first(IMAGE_COLUMNS, source.schema)
            return name in source.schema.names and is_image(source.schema.field(name).type)
    except CurateError:
        raise
    except Exception:
        return False


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


def _read_footer(file: FileInfo, how: _Opened) -> _Footer:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", file.path):
        return _Footer(error=f"{file.path!r}: expected a name in UTF-8 without control characters; rename the file")
    kind = format_of(file.path)
    if file.size == 0:
        return _Footer(error=f"{file.path}: expected {kind}, found 0 bytes; remove or replace it")
    try:
        if how.index:
            keep_index(file.path, how.index, cache_folder())
        with open_source(file.path, index=how.index, side_car=how.side_car) as source:
            return _Footer(
                rows=int(source.groups.sum()),
                schema=with_folder_schema(source.schema, file.path),
                largest_row_group=source.largest_group,
            )
    except CurateError:
        raise  # the store failed or refuses: nothing is known of the file
    except Exception as error:  # a fuzzed footer raises whatever it likes, ValueError and OverflowError included
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a local disk: Arrow's own OSErrors carry no number
        reason = one_line(error)
        what = "a broken footer" if kind == "a Parquet file" else "a broken one"
        return _Footer(
            error=f"{file.path}: expected {kind}, found {what} ({reason}); "
            + (of_other_format(file.path) or "remove or replace it")
        )


def _listed(schema: pa.Schema) -> str:
    """Its column names, the first of them if they are many, in one line whatever they contain."""
    names = [name if name.isprintable() else repr(name) for name in schema.names]
    return ", ".join(names[:20]) + (f", … ({len(names)} columns)" if len(names) > 20 else "") or "no column"


def _find_columns(section: PoolSection, schema: pa.Schema, path: str, section_name: str) -> Columns:
    """The pool's columns by the recipe, else by convention."""
    image = section.image or _first((*IMAGE_COLUMNS, *PATH_COLUMNS), schema)
    caption = section.caption or _first(CAPTION_COLUMNS, schema)
    missing = [
        f"expected the {role} column as one of {', '.join(known)} (or name it with {section_name}.{role})"
        for role, name, known in (("image", image, IMAGE_COLUMNS), ("caption", caption, CAPTION_COLUMNS))
        if name is None
    ]
    if image is None or caption is None:
        hint = (
            f'; captions in JSON are named as {section_name}.caption = "json.caption"' if "json" in schema.names else ""
        )
        raise UserError(f"{path}: {' and '.join(missing)}, found {_listed(schema)}; rename or name the column{hint}")
    columns = Columns(image=image, caption=caption, uid=section.uid)
    once = [name for name in schema.names if schema.names.count(name) == 1]  # others are the shard's mistakes
    if image in once and is_text(schema.field(image).type):
        columns = replace(columns, image=f"{image}_bytes", paths=image, images=section.images)
    elif section.images is not None:
        columns = replace(columns, images=section.images)
    if "." in caption and caption not in schema.names:
        columns = replace(columns, caption=caption.replace(".", "_"), captions=caption)
    elif caption in once and is_list_of_texts(schema.field(caption).type):
        columns = replace(columns, caption=f"{caption}_drawn", captions=caption)
    # Where a shuffle of the pool, or a round, has made them before, they are taken as they are.
    if columns.paths and columns.image in once and is_image(schema.field(columns.image).type):
        columns = replace(columns, paths=None)
    if columns.captions and columns.caption in once and is_text(schema.field(columns.caption).type):
        columns = replace(columns, captions=None)
    return replace(columns, caption_seed=section.caption_seed) if columns.captions else columns


def _with_wishes(columns: Columns, section: PoolSection, schema: pa.Schema) -> Columns:
    """With what says which rows are wanted, once it is known to mean something for rows of the pool's schema.

    Raises:
        UserError: it means nothing.
    """
    if section.where is not None:
        asked = columns_asked(section.where, schema)
        if not asked:
            raise UserError(
                f"pool.where = {section.where!r}: expected a condition on columns of the pool, {_listed(schema)}, "
                "found none of them in it; name one"
            )
        check_where(section.where, pa.schema([schema.field(name) for name in asked]))
        columns = replace(columns, where=section.where, where_columns=tuple(asked))
    if section.keep is not None:
        _, sha = read_uids(section.keep)
        columns = replace(columns, keep=section.keep, keep_sha=sha)
    return columns


def _first(names: Sequence[str], schema: pa.Schema) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _shard_mistakes(
    file: FileInfo, footer: _Footer, columns: Columns, max_row_group_bytes: int, section_name: str
) -> list[str]:
    """Why this shard cannot be used, one line each; an empty shard is fine."""
    schema = footer.schema
    assert schema is not None
    if repeated := [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]:
        return [f"{file.path}: expected each column once, found {repeated[0]!r} twice; rename or drop one"]
    lines = []
    for role, name, accepts, expected in _roles(columns):
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
        if field.name not in (columns.image, columns.caption, columns.uid, columns.paths)
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


def _roles(columns: Columns) -> Iterator[tuple[str, str | None, Callable[[pa.DataType], bool], str]]:
    """The columns that are asked of a file: role, name, which types are accepted and how messages call them."""
    if columns.paths:
        yield "image", columns.paths, is_text, "string, as in the shards before it"
    else:
        yield "image", columns.image, is_image, "binary or struct<bytes: binary, …>"
    head, dot, _ = (columns.captions or "").partition(".")
    if dot:
        yield "caption", head, is_nested_text, "JSON or a struct"
    elif head:
        yield "caption", head, is_list_of_texts, "a list of strings, as in the shards before it"
    else:
        yield "caption", columns.caption, is_caption, "string"
    yield "uid", columns.uid, is_uid, "string or integer"


def _relative_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folder that all of them share."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return ["/".join(path.split("/")[shared:]) for path in paths]
