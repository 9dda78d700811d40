"""Cut a Parquet file into shards that a worker can hold: the way out for row groups that are too large."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from curate import storage
from curate.errors import UserError

ROW_GROUP_ROWS = 256


def reshard_file(url: str, folder: Path, *, rows_per_shard: int) -> Iterator[Path]:
    """Write the rows of one file, in order and unchanged, as shards with row groups of 256.

    Args:
        url: the file.
        folder: where the shards go; they are named after the file.
        rows_per_shard: of each but the last.

    Yields:
        Each shard once it is complete.

    Raises:
        UserError: a shard of that name exists already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = PurePosixPath(url).stem
    with storage.open_input(url) as file, pq.ParquetFile(file) as parquet:
        shards = -(-parquet.metadata.num_rows // rows_per_shard)
        batches = parquet.iter_batches(batch_size=ROW_GROUP_ROWS)
        held = next(batches, None)
        for number in range(shards):
            path = folder / f"{stem}-{number:05d}.parquet"
            if path.exists():
                raise UserError(f"{path}: exists already; choose an empty folder")
            partial = path.with_suffix(".partial")
            left = rows_per_shard
            with pq.ParquetWriter(partial, parquet.schema_arrow, compression="zstd") as writer:
                while held is not None and left:
                    writer.write_batch(held.slice(0, left), row_group_size=ROW_GROUP_ROWS)
                    taken = min(left, held.num_rows)
                    left -= taken
                    held = held.slice(taken) if taken < held.num_rows else next(batches, None)
            partial.rename(path)
            yield path
