"""Pictures of a round: in its files, or, of one that holds none, in the shards of its pool."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.embed.files import content_hash
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.pool.shards import ADDED_COLUMN, READ_ROWS, Shard, caption_bytes, image_bytes, load_pool, read_some
from curate.storage import Store

HELD_POOLS = 4


def pictures_of(store: Store, rows: pa.Table | pa.RecordBatch, columns: Mapping[str, Any]) -> list[bytes]:
    """The encoded pictures of some rows of curated files, in their order.

    Args:
        store: the root.
        rows: with image and caption, or, if the round holds no pictures, caption and added column.
        columns: of the round's manifest.

    Raises:
        UserError: a shard of the pool is gone, is another one or cannot be read; a picture is not the one chosen.
    """
    image = str(columns["image"])
    if "pool" not in columns:
        return list(image_bytes(_whole(rows.column(image))).to_pylist())
    added = _whole(rows.column(ADDED_COLUMN))
    names, numbers = added.field("source_shard"), added.field("source_row").to_numpy()
    captions = caption_bytes(_whole(rows.column(str(columns["caption"])))).to_pylist()
    contents = added.field("content").to_pylist()
    shards = _shards(store, columns["pool"])
    found: list[bytes] = [b""] * len(added)
    for name in pc.unique(names).to_pylist():
        places = np.flatnonzero(pc.equal(names, name).to_numpy(zero_copy_only=False))
        places = places[np.argsort(numbers[places])]
        for place, data in zip(places.tolist(), _read(shards[name], numbers[places], image), strict=True):
            if data is None or content_hash(data, captions[place]) != contents[place]:
                raise UserError(
                    f"{shards[name].path}: row {numbers[place]}: expected the picture that the round was chosen with, "
                    f"found {'none' if data is None else 'another one'}; restore it: the round holds no pictures "
                    "(output.mode = 'index')"
                )
            found[place] = data
    return found


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _read(shard: Shard, rows: npt.NDArray[np.int64], image: str) -> list[bytes | None]:
    """Pictures of some rows of a shard, ascending."""
    try:
        batches = [batch for _, batch in read_some(shard, rows, [image], batch_rows=READ_ROWS)]
    except (InputChangedError, ShardDamagedError) as error:
        raise UserError(
            f"{shard.path}: expected the file that the round was chosen from, which holds its pictures "
            f"(output.mode = 'index'); found another one ({error}); restore the shard"
        ) from error
    return [data for batch in batches for data in image_bytes(batch.column(image)).to_pylist()]


@lru_cache(HELD_POOLS)
def _shards(store: Store, fingerprint: str) -> Mapping[str, Shard]:
    return {shard.name: shard for shard in load_pool(store, fingerprint).shards}
