"""Cut a Parquet file into shards that a worker can hold: the way out for row groups that are too large."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from curate import access
from curate.errors import CurateError, UserError
from curate.messages import one_line
from curate.parquet import batches_of, open_parquet

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 2**26


def reshard_file(
    url: str, folder: Path, *, rows_per_shard: int, row_group_bytes: int = ROW_GROUP_BYTES
) -> Iterator[Path]:
    """Write the rows of one file, in order and unchanged, as shards with small row groups.

    Args:
        url: the file.
        folder: where the shards go; they are named after the file.
        rows_per_shard: of each but the last.
        row_group_bytes: uncompressed; a row group is larger only if a single row is.

    Yields:
        Each shard once it is complete.

    Raises:
        UserError: no such file, or not Parquet, or damaged; a shard of that name exists already.
    """
    stem = PurePosixPath(url).stem
    with _opened(url) as parquet:
        folder.mkdir(parents=True, exist_ok=True)
        shards = max(1, -(-parquet.metadata.num_rows // rows_per_shard))
        batches = _readable(url, batches_of(parquet, ROW_GROUP_ROWS))
        held = next(batches, None)
        for number in range(shards):
            path = folder / f"{stem}-{number:05d}.parquet"
            if path.exists():
                raise UserError(f"{path}: exists already; choose an empty folder")
            partial = path.with_suffix(".partial")
            left = rows_per_shard
            with pq.ParquetWriter(partial, parquet.schema_arrow, compression="zstd") as writer:
                while held is not None and left:
                    for piece in pieces(held.slice(0, left), row_group_bytes):
                        writer.write_batch(piece, row_group_size=ROW_GROUP_ROWS)
                    taken = min(left, held.num_rows)
                    left -= taken
                    held = held.slice(taken) if taken < held.num_rows else next(batches, None)
            partial.rename(path)
            yield path


@contextlib.contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    with contextlib.ExitStack() as stack:
        try:
            parquet = stack.enter_context(open_parquet(access.open_for_arrow(url)))
        except (OSError, ValueError) as error:  # pyarrow's own are either
            reason = one_line(error)
            raise UserError(f"{url}: expected a Parquet file; {reason}; correct the path") from error
        yield parquet


def _readable(url: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (CurateError, GeneratorExit):
        raise
    except Exception as error:  # a damaged file makes a reader raise whatever it likes
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of a local disk: Arrow's own OSErrors carry no number
        reason = one_line(error)
        raise UserError(f"{url}: expected readable rows, found a damaged page ({reason}); replace the file") from error


def pieces(batch: pa.RecordBatch, most_bytes: int) -> Iterator[pa.RecordBatch]:
    """Slices of a batch, of at most so many bytes, or of one row."""
    if batch.nbytes <= most_bytes or batch.num_rows == 1:
        yield batch
        return
    half = batch.num_rows // 2
    yield from pieces(batch.slice(0, half), most_bytes)
    yield from pieces(batch.slice(half), most_bytes)
