"""Types of columns: which ones images, captions and uids may have, and what every other one is written as.

A round copies all columns of the pool. What Arrow can read from Parquet it cannot always cut rows out of, nor do the
types of two shards always have one that holds the values of both: both are known from the schemas alone.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.messages import one_line

_PLAIN: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any], pa.DataType]], ...] = (
    (pa.types.is_dictionary, lambda kind: plain_type(kind.value_type)),
    (pa.types.is_string_view, lambda kind: pa.string()),
    (pa.types.is_binary_view, lambda kind: pa.binary()),
    (pa.types.is_list, lambda kind: pa.list_(plain_type(kind.value_type))),
    (pa.types.is_list_view, lambda kind: pa.list_(plain_type(kind.value_type))),
    (pa.types.is_large_list, lambda kind: pa.large_list(plain_type(kind.value_type))),
    (pa.types.is_large_list_view, lambda kind: pa.large_list(plain_type(kind.value_type))),
    (pa.types.is_fixed_size_list, lambda kind: pa.list_(plain_type(kind.value_type), kind.list_size)),
    (pa.types.is_map, lambda kind: pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))),
    (
        pa.types.is_struct,
        lambda kind: pa.struct([field.with_type(plain_type(field.type)).with_nullable(True) for field in kind]),
    ),
)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that values of this one are written as: known to every reader of Parquet, and rows can be taken of it.

    Views and dictionaries become plain values, and so within lists, maps and structs, whose fields may all be null.

    >>> str(plain_type(pa.list_view(pa.struct([pa.field("a", pa.string_view(), nullable=False)]))))
    'list<item: struct<a: string>>'
    """
    return next((make(kind) for is_it, make in _PLAIN if is_it(kind)), kind)


def plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in `plain_type`s; columns that have them already are not copied."""
    for i, field in enumerate(batch.schema):
        if (kind := plain_type(field.type)) != field.type:
            batch = batch.set_column(i, field.with_type(kind).with_nullable(True), batch.column(i).cast(kind))
    return batch


@functools.cache
def why_unwritable(kind: pa.DataType) -> str | None:
    """Why a column of this type could not be written into a round, found by trying it; None if it could."""
    try:
        values = pa.nulls(1, kind).cast(plain_type(kind)).take(pa.array([0]))
        pq.write_table(pa.table({"column": values}), pa.BufferOutputStream())
    except (pa.ArrowException, NotImplementedError, TypeError) as error:
        return one_line(error, 120)
    return None


def united(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema that holds every value of all of them unchanged, in plain types.

    Raises:
        pa.ArrowException: there is none.
    """
    plain = []
    for schema in schemas:
        fields = [field.with_type(plain_type(field.type)).with_nullable(True) for field in schema]
        plain.append(pa.schema(fields, metadata=schema.metadata))
    union = pa.unify_schemas(plain, promote_options="permissive")
    for field in union:
        kinds = {schema.field(field.name).type for schema in plain if field.name in schema.names}
        # Arrow promotes further than every value follows, and would fail, hours later, on the first that does not fit.
        if not all(_holds(field.type, kind) for kind in kinds):
            found = " and ".join(sorted(map(str, kinds)))
            raise pa.ArrowInvalid(f"column {field.name!r} is {found}, and no one type holds the values of both")
    return union


def _holds(wide: pa.DataType, kind: pa.DataType) -> bool:
    """Whether each value of a plain type is the same value in the wider one that Arrow found for it and for another."""
    of = pa.types
    if wide == kind or of.is_null(kind):
        return True
    if of.is_nested(wide) and of.is_nested(kind):
        return _holds_nested(wide, kind)
    if of.is_integer(wide) and of.is_integer(kind):
        grown = wide.bit_width - kind.bit_width
        return bool(grown > 0 if of.is_signed_integer(wide) else grown > 0 and of.is_unsigned_integer(kind))
    if of.is_decimal(wide) and of.is_decimal(kind):
        return bool(wide.scale >= kind.scale and wide.precision - wide.scale >= kind.precision - kind.scale)
    either = (
        (of.is_floating(wide) and of.is_floating(kind) and wide.bit_width > kind.bit_width)
        or (of.is_large_string(wide) and of.is_string(kind))
        or (of.is_large_binary(wide) and of.is_binary(kind))
        or ((of.is_binary(wide) or of.is_large_binary(wide)) and of.is_fixed_size_binary(kind))
        # A day has room in every unit. A finer timestamp or duration has not for every coarser one.
        or (of.is_time(wide) and of.is_time(kind))
    )
    return bool(either)


def _holds_nested(wide: pa.DataType, kind: pa.DataType) -> bool:
    of = pa.types
    if of.is_struct(wide) and of.is_struct(kind):
        once = len({field.name for field in wide}) == len(wide)
        return once and all(_holds(wide.field(field.name).type, field.type) for field in kind)
    if of.is_map(wide) and of.is_map(kind):
        return _holds(wide.key_type, kind.key_type) and _holds(wide.item_type, kind.item_type)
    lists = (of.is_list, of.is_large_list, of.is_fixed_size_list)
    both = all(any(is_list(one) for is_list in lists) for one in (wide, kind))
    return both and _holds(wide.value_type, kind.value_type)


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold images: plain bytes, or Hugging Face's struct<bytes, path>."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and is_image(kind.field(index).type)
    return _is_binary(kind) or pa.types.is_null(kind)


def is_caption(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold captions."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return is_text(kind) or _is_binary(kind) or pa.types.is_null(kind)


def is_uid(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold what identifies pairs."""
    return is_text(kind) or pa.types.is_integer(kind)


def is_list_of_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds several captions for each row."""
    of = pa.types
    lists = (of.is_list, of.is_large_list, of.is_fixed_size_list, of.is_list_view, of.is_large_list_view)
    return any(is_list(kind) for is_list in lists) and (is_text(kind.value_type) or of.is_null(kind.value_type))


def is_nested_text(kind: pa.DataType) -> bool:
    """Whether a caption may lie within values of this type: structs, or JSON as text or bytes."""
    return pa.types.is_struct(kind) or is_caption(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
