"""Columns that a shard has not itself: those of its folders, pictures that it only names, one caption of several.

They are made as rows are read, so that whoever reads a shard finds one column of pictures and one of captions in it:

    <paths>_bytes      binary  the picture that a column of paths or URLs names; null where there is none
    <captions>_drawn   string  one of a list of captions, drawn by `pool.caption_seed` and the list alone
    <captions>_which   int32   which of them it is
    <column>_<field>…  string  the caption in a struct or in JSON, `pool.caption = "json.caption"`, with its _which

Of Hugging Face's struct<bytes, path> a picture is fetched by its path where it has no bytes.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate import access
from curate.errors import UserError
from curate.pool.column_types import is_caption
from curate.pool.columns import Columns
from curate.pool.hive import with_folder_columns, with_folder_schema

IMAGE_MISSING = "image_missing"
FETCHES = 32
"""At a time from an object store, which answers each after some 30 ms."""


def derived_schema(schema: pa.Schema, path: str, columns: Columns) -> pa.Schema:
    """A file's schema with the columns that are made of it, as far as it has what they are made of."""
    schema = with_folder_schema(schema, path)
    if (index := schema.get_field_index(columns.image)) >= 0 and pa.types.is_struct(kind := schema.field(index).type):
        # Where no row of a file has bytes: they are fetched by the path.
        fields = [field.with_type(pa.binary()) if _is_unread(field) else field for field in kind]
        schema = schema.set(index, schema.field(index).with_type(pa.struct(fields)))
    if columns.paths and columns.paths in schema.names:
        schema = schema.append(pa.field(columns.image, pa.binary()))
    if columns.captions_column in schema.names:
        schema = schema.append(pa.field(columns.caption, pa.string()))
        schema = schema.append(pa.field(which_name(columns), pa.int32()))
    return schema


def _is_unread(field: pa.Field) -> bool:
    return bool(field.name == "bytes" and pa.types.is_null(field.type))


def which_name(columns: Columns) -> str:
    """Of the column that says which caption was drawn."""
    return columns.caption.removesuffix("_drawn") + "_which"


def made_of(names: Sequence[str] | None, columns: Columns) -> list[str] | None:
    """What has to be read of a file for some columns, derived ones among them."""
    if names is None:
        return None
    found = list(names)
    if columns.paths and columns.image in names:
        found.append(columns.paths)
    if columns.captions_column and {columns.caption, which_name(columns)} & set(names):
        found.append(columns.captions_column)
    return list(dict.fromkeys(found))


def with_derived(batch: pa.RecordBatch, path: str, columns: Columns, names: Collection[str] | None) -> pa.RecordBatch:
    """Rows of a file with the columns that are made of it, of these names; all of them if None.

    Args:
        batch: in plain types.
        path: of the file.
        columns: of the pool.
        names: that are wanted.

    Raises:
        UserError, StoreError: pictures are to be fetched from where none can be, or the store fails.
    """
    batch = with_folder_columns(batch, path, names)
    base = columns.images or path.rpartition("/")[0]

    def add(name: str, column: pa.Array) -> None:
        nonlocal batch
        if names is None or name in names:
            batch = batch.append_column(name, column)

    if columns.paths and columns.paths in batch.schema.names and (names is None or columns.image in names):
        add(columns.image, pa.array(fetch(base, batch.column(columns.paths).to_pylist()), pa.binary()))
    elif columns.image in batch.schema.names:
        batch = _with_bytes(batch, base, columns.image)
    if columns.captions and columns.captions_column in batch.schema.names:
        several = _captions(batch.column(columns.captions_column), columns.captions)
        drawn = [draw(found, columns.caption_seed) for found in several]
        # As text without a check: one that is not UTF-8 must not take its whole batch with it.
        add(columns.caption, pa.array([caption for caption, _ in drawn], pa.binary()).view(pa.string()))
        add(which_name(columns), pa.array([which for _, which in drawn], pa.int32()))
    if names is not None:
        batch = batch.select([name for name in batch.schema.names if name in names])
    return batch


def draw(captions: Sequence[bytes], seed: int) -> tuple[bytes | None, int | None]:
    """One of some captions, and its number; the same for the same captions and seed. Empty ones are not drawn.

    >>> draw([b"a dog", b"", b"ein Hund"], seed=0) in {(b"a dog", 0), (b"ein Hund", 2)}
    True
    """
    usable = [number for number, caption in enumerate(captions) if caption.strip()]
    if not usable:
        return (captions[0], 0) if captions else (None, None)
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for caption in captions:
        digest.update(len(caption).to_bytes(8, "little"))
        digest.update(caption)
    number = usable[int.from_bytes(digest.digest(), "little") % len(usable)]
    return captions[number], number


def _captions(column: pa.Array, path: str) -> list[list[bytes]]:
    """The captions of each row: of a list, or at a path in structs and then in JSON; none where there is none."""
    fields = path.split(".")[1:]
    while fields and pa.types.is_struct(column.type):
        if column.type.get_field_index(fields[0]) < 0:
            return [[] for _ in range(len(column))]
        column = pc.struct_field(column, fields.pop(0))
    values = column.cast(_as_bytes(column.type)).to_pylist()
    if fields:
        values = [_within(value, fields) for value in values]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [[text for one in some if (text := _text(one)) is not None] for some in lists]


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """A type of texts, or of lists of them, as one of bytes, which any text has."""
    of = pa.types
    if of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind):
        return pa.large_list(pa.large_binary())
    return pa.large_binary() if is_caption(kind) else kind


def _within(text: bytes | None, fields: Sequence[str]) -> Any:
    """What lies at a path in JSON; None if it is none, or has no such path: the row has no caption then."""
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> bytes | None:
    """A caption as bytes; None for what is no text. Half a pair of surrogates is no UTF-8, and is counted as such."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return value if isinstance(value, bytes) else None


def _with_bytes(batch: pa.RecordBatch, base: str, name: str) -> pa.RecordBatch:
    """The pictures that Hugging Face's struct names by a path, and has no bytes of, in its bytes."""
    column = batch.column(name)
    kind = column.type
    if not (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0):
        return batch
    named = pc.and_(pc.and_(column.field("bytes").is_null(), column.field("path").is_valid()), column.is_valid())
    absent = np.flatnonzero(named.to_numpy(zero_copy_only=False)).tolist()
    if not absent:
        return batch
    held, paths = (column.field(field).to_pylist() for field in ("bytes", "path"))
    valid = column.is_valid().to_pylist()
    for place, data in zip(absent, fetch(base, [paths[place] for place in absent]), strict=True):
        held[place] = data
    fields = [
        pa.array(held, pa.binary() if _is_unread(field) else field.type)
        if field.name == "bytes"
        else column.field(field.name)
        for field in kind
    ]
    made = pa.StructArray.from_arrays(
        fields, names=[field.name for field in kind], mask=pa.array([not one for one in valid])
    )
    return batch.set_column(batch.schema.get_field_index(name), name, made)


def missing(batch: pa.RecordBatch, columns: Columns, images: Sequence[bytes | None]) -> list[str | None]:
    """What kept the picture of each row from being read that is named by a path; None where nothing did."""
    if columns.paths:
        paths = batch.column(columns.paths).to_pylist() if columns.paths in batch.schema.names else [None] * len(images)
    else:
        column = batch.column(columns.image)
        if not (pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0):
            return [None] * len(images)
        paths = column.field("path").to_pylist()
    return [
        f"{path}: expected a picture, found no such file" if image is None and path else None
        for path, image in zip(paths, images, strict=True)
    ]


def fetch(base: str, paths: Sequence[str | None]) -> list[bytes | None]:
    """The bytes of files; None where there is no such file.

    Args:
        base: folder that relative paths are of.
        paths: local ones, or URLs that fsspec opens.

    Raises:
        UserError, StoreError: the store refuses or fails; or a URL of the web, which changes and vanishes.
    """
    urls = [None if not path else _located(base, str(path)) for path in paths]
    if all(url is None or access.is_local(url) for url in urls):
        return [None if url is None else _read(url) for url in urls]
    with ThreadPoolExecutor(FETCHES) as threads:
        return list(threads.map(lambda url: None if url is None else _read(url), urls))


def _located(base: str, path: str) -> str:
    if re.match("https?://", path):
        raise UserError(
            f"{path[:200]}: expected a path or a URL of an object store, found one of the web; download the pictures "
            "first: img2dataset does"
        )
    return path if "://" in path or os.path.isabs(path) else f"{base}/{path}"


def _read(url: str) -> bytes | None:
    fs, path = access.filesystem(url)
    try:
        return bytes(access.persist(url, lambda: fs.cat_file(path)))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except ValueError:  # a name with a NUL
        return None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return None
        raise
