"""Arrow's own files, as `datasets.save_to_disk` leaves them: groups are record batches.

A local file is mapped into memory, so that only what is asked for is read. A stream on an object store has no index: it
is read from its beginning, up to the last group that is asked for.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate import access

ARROW = ".arrow"
MAGIC = b"ARROW1"
"""How the file format begins, which `datasets` does not write; it writes the stream format."""


class ArrowSource:
    """A `Source` of an opened Arrow file or stream."""

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        self._indexed = file.read(len(MAGIC)) == MAGIC
        sizes, self.largest_group = [], 0
        for batch in self._all():
            sizes.append(batch.num_rows)
            self.largest_group = max(self.largest_group, batch.nbytes)
        self.groups: npt.NDArray[np.int64] = np.array(sizes, np.int64)
        self.schema: pa.Schema = self._open().schema

    def _open(self) -> pa.RecordBatchReader | pa.RecordBatchFileReader:
        self._file.seek(0)
        return pa.ipc.open_file(self._file) if self._indexed else pa.ipc.open_stream(self._file)

    def _all(self, groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        reader = self._open()
        if self._indexed:
            for number in range(reader.num_record_batches) if groups is None else groups:
                yield reader.get_batch(number)
            return
        last = None if groups is None else max(groups, default=-1)
        wanted = None if groups is None else set(groups)
        for number, batch in enumerate(reader):
            if last is not None and number > last:
                return
            if wanted is None or number in wanted:
                yield batch

    def batches(
        self, groups: Sequence[int] | None, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """As `Source` has it."""
        for batch in self._all(groups):
            some = batch if columns is None else batch.select([name for name in batch.schema.names if name in columns])
            some.validate(full=True)  # Arrow's files have no checksums: at least no offset leads out of the file
            for start in range(0, some.num_rows, batch_rows):
                yield some.slice(start, batch_rows)


@contextlib.contextmanager
def open_arrow(path: str) -> Iterator[ArrowSource]:
    """Open an Arrow file or stream."""
    if access.is_local(path):
        with pa.memory_map(path) as file:
            yield ArrowSource(file)
        return
    with access.open_input(path) as opened, pa.PythonFile(opened, mode="r") as file:
        yield ArrowSource(file)
