"""Tables that name pictures, as `imagefolder` and open_clip have them: `metadata.jsonl`, `.csv` and `.tsv`.

They hold names and words and no picture, so that one is read whole.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from curate import access

LISTED = (".jsonl", ".csv", ".tsv")
LARGEST = 2**31 - 1
"""Bytes, of a block of Arrow's readers."""


class ListingSource:
    """A `Source` of a table in memory, which is one group."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self.schema: pa.Schema = table.schema
        self.groups = np.array([len(table)] if len(table) else [], np.int64)
        self.largest_group: int = table.nbytes

    def batches(
        self, groups: Sequence[int] | None, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """As `Source` has it."""
        if groups is None or len(groups):
            names = [name for name in self.schema.names if columns is None or name in columns]
            yield from self._table.select(names).to_batches(max_chunksize=batch_rows)


@contextlib.contextmanager
def open_listing(path: str) -> Iterator[ListingSource]:
    """Read a table of JSON lines, or of values between commas or tabs under a line of names."""
    suffix = PurePosixPath(path).suffix.lower()
    with access.open_input(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size >= LARGEST:
            raise ValueError("it has 2 GiB or more, and is read whole; cut it, or write Parquet")
        block_size = max(2**20, size + 1)  # one, for Arrow decides on types by the first: a later one might have others
        if suffix == ".jsonl":
            block = pa.json.ReadOptions(block_size=block_size)
            yield ListingSource(pa.json.read_json(file, read_options=block))
        else:
            parse = pa.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            block = pa.csv.ReadOptions(block_size=block_size)
            # All of it text: the key 00012 is not the number 12.
            convert = pa.csv.ConvertOptions(default_column_type=pa.string())
            yield ListingSource(pa.csv.read_csv(file, read_options=block, parse_options=parse, convert_options=convert))
