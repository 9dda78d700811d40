"""Load: some rows of a shard with the vectors that models made of them."""

import numpy as np
import pyarrow as pa

from curate.embed.files import contents, embedding_name, read_embeddings, vectors
from curate.errors import InputChangedError
from curate.models.spec import EncoderSpec
from curate.pool.shards import Shard
from curate.select.draw import Candidates, Vectors
from curate.select.windows import Rows
from curate.storage import Store


def load_vectors(
    store: Store, shard: Shard, rows: Rows, reference: EncoderSpec, learner: EncoderSpec | None, scope: str
) -> Candidates:
    """Some rows of a shard with their vectors.

    Args:
        store: the root.
        shard: of the pool.
        rows: of dtype `ROW`, by row.
        reference: its embedding files are complete.
        learner: likewise for these rows; None if its vectors are not wanted.
        scope: of its files.

    Raises:
        InputChangedError: a learner embedded another pair than the reference.
    """
    own = None
    if learner is not None:
        own = _towers(store, embedding_name(learner.sha, shard, scope), rows, learner.embed_dim, shard)
    return Candidates(
        rows=rows,
        reference=_towers(store, embedding_name(reference.sha, shard), rows, reference.embed_dim, shard),
        learner=own,
    )


def _towers(store: Store, name: str, rows: Rows, width: int, shard: Shard) -> tuple[Vectors, Vectors]:
    """`zimg` and `ztxt` of some rows of an embedding file that holds all rows of its shard, or these and others."""
    table = read_embeddings(store, name, ["content", "zimg", "ztxt"], numbered=True)
    at = np.searchsorted(table["row"].to_numpy(), rows["row"])
    taken = table.take(pa.array(at[at < len(table)]))
    expected = np.column_stack([rows["content_low"], rows["content_high"]])
    if not np.array_equal(taken["row"], rows["row"]) or not np.array_equal(contents(taken["content"]), expected):
        raise InputChangedError(
            f"{name}: expected the pairs of {shard.path} as the reference saw them, found others; the shard changed "
            "but kept its size and date: touch the shard, and delete the round's folder to begin it anew"
        )
    return vectors(taken["zimg"], width), vectors(taken["ztxt"], width)
