"""Parquet: groups are row groups; columns that are not asked for are not read."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate import access

PARQUET = ".parquet"


class ParquetSource:
    """A `Source` of an opened Parquet file."""

    def __init__(self, parquet: pq.ParquetFile) -> None:
        self._parquet = parquet
        self.schema: pa.Schema = parquet.schema_arrow
        metadata = parquet.metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self.groups: npt.NDArray[np.int64] = np.array([group.num_rows for group in groups], np.int64)
        self.largest_group: int = max((group.total_byte_size for group in groups), default=0)

    def batches(
        self, groups: Sequence[int] | None, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """As `Source` has it."""
        yield from self._parquet.iter_batches(batch_size=batch_rows, row_groups=groups, columns=columns)


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[ParquetSource]:
    """Open a file whose pages are held against their checksums, where it has them."""
    with access.open_input(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        yield ParquetSource(parquet)
