"""Parquet: groups are row groups; columns that are not asked for are not read."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate import access
from curate.parquet import batches_of, open_parquet

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
        yield from batches_of(self._parquet, batch_rows, columns, groups)


@contextlib.contextmanager
def open_shard(path: str) -> Iterator[ParquetSource]:
    """Open a file of the pool."""
    with open_parquet(access.open_for_arrow(path)) as parquet:
        yield ParquetSource(parquet)
