"""Columns written in the names of folders, `lang=en/year=2024/part-0.parquet`, as Hive and Spark leave them."""

from collections.abc import Collection
from urllib.parse import unquote

import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_columns(path: str) -> dict[str, str | None]:
    """The columns that the folders of a path or URL name, with this file's values.

    All folders count, whichever of them the pool's path names: whoever asks for `pool/lang=en` alone means to know it.

    >>> folder_columns("s3://bucket/lang=en/city=K%C3%B6ln/day=__HIVE_DEFAULT_PARTITION__/a=b.parquet")
    {'lang': 'en', 'city': 'Köln', 'day': None}
    """
    pairs = [folder.partition("=") for folder in path.split("/")[:-1]]
    return {unquote(key): None if value == NULL else unquote(value) for key, equals, value in pairs if key and equals}


def with_folder_schema(schema: pa.Schema, path: str) -> pa.Schema:
    """A file's schema and, as strings, the columns of its folders that it has not itself."""
    for name in folder_columns(path):
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema


def with_folder_columns(batch: pa.RecordBatch, path: str, columns: Collection[str] | None) -> pa.RecordBatch:
    """Rows of a file and the columns of its folders that they have not, of these columns, or all if None."""
    for name, value in folder_columns(path).items():
        if name not in batch.schema.names and (columns is None or name in columns):
            batch = batch.append_column(name, pa.repeat(pa.scalar(value, pa.string()), batch.num_rows))
    return batch
