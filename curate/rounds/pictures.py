"""Pictures of a round: in its files, or, of one that holds none, in the shards of its pool."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.pool.shards import ADDED_COLUMN, READ_ROWS, Shard, image_bytes, load_pool, read_some
from curate.storage import Store

HELD_POOLS = 4


def pictures_of(store: Store, rows: pa.Table | pa.RecordBatch, image: str, pool: str | None) -> list[bytes]:
    """The encoded pictures of some rows of curated files, in their order.

    Args:
        store: the root.
        rows: with the image column, or the added one if they hold no pictures.
        image: name of the column.
        pool: fingerprint of the pool that has them, if the round has not.

    Raises:
        UserError: a shard of the pool is gone or is another one, or cannot be read.
    """
    if pool is None:
        column = rows.column(image)
        return list(image_bytes(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).to_pylist())
    added = rows.column(ADDED_COLUMN)
    added = added.combine_chunks() if isinstance(added, pa.ChunkedArray) else added
    names, numbers = added.field("source_shard"), added.field("source_row").to_numpy()
    shards = _shards(store, pool)
    found: list[bytes] = [b""] * len(added)
    for name in pc.unique(names).to_pylist():
        places = np.flatnonzero(pc.equal(names, name).to_numpy(zero_copy_only=False))
        places = places[np.argsort(numbers[places])]
        at = 0
        try:
            for some, batch in read_some(shards[name], numbers[places], [image], batch_rows=READ_ROWS):
                for place, data in zip(places[at:], image_bytes(batch.column(image)).to_pylist(), strict=False):
                    found[place] = data
                at += len(some)
        except (InputChangedError, ShardDamagedError) as error:
            raise UserError(
                f"{shards[name].path}: expected the file that the round was chosen from, which holds its pictures "
                f"(output.mode = 'index'); found another one ({error}); restore the shard"
            ) from error
    return found


@lru_cache(HELD_POOLS)
def _shards(store: Store, fingerprint: str) -> Mapping[str, Shard]:
    return {shard.name: shard for shard in load_pool(store, fingerprint).shards}
