"""A shard's embedding file out of a `Layout`: everything but the vectors is made anew, for no other tool keeps it.

Rows are read, hashed and decoded as if they were embedded, so that statuses, contents and sizes are those of an
embedding run; of some rows the vectors are as well, for nothing else says which model the others are by.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn.functional import normalize

from curate.embed.decode import DECODE_TIMEOUT, WORKER_CRASH, Apart, decode_row
from curate.embed.files import embedding_name
from curate.embed.layouts import Layout, pair_key, pairs_of
from curate.embed.loader import start_server
from curate.embed.pieces import Decode, Raw, Reading, Slice
from curate.embed.run import reading_for
from curate.embed.shard import Job, write_files
from curate.errors import ShardDamagedError, UserError
from curate.models.encoder import Encoder
from curate.pool.shards import Shard, spread
from curate.storage import Store

NAME = "reference"
PIECE_ROWS = 256
PART_PIECES = 16
"""4,096 rows: a row group of the file."""
SAMPLED_ROWS = 4
"""Of each shard, that are embedded anew."""
LEAST_COSINE = 0.999
"""Of those rows to what was found: half precision and another resize stay above, another model is far below."""

_ENCODING = threading.Lock()
"""An encoder has one buffer for pictures."""


def take_shards(
    layout: Layout, shards: Sequence[Shard], encoder: Encoder, store: Store, *, at_once: int
) -> Iterator[tuple[Shard, bool]]:
    """Take over the embeddings of shards, each by a thread with a decoding process of its own.

    Args:
        layout: where they are.
        shards: of the pool.
        encoder: the recipe's reference, which they should be by.
        store: the root.
        at_once: shards.

    Yields:
        Each shard, and whether it is embedded now. One that could not be read, that ended a decoder, or of which a
        usable pair was not found, is left as it is.

    Raises:
        UserError: they are by another model, or of other pictures; or as `Layout.vectors`.
        InputChangedError: a shard is not the file that was inventoried.
    """
    own = threading.local()
    made: list[Apart] = []
    ended = threading.Event()

    def take(shard: Shard) -> bool:
        if not hasattr(own, "decode"):
            own.decode = Apart({}, method="forkserver")
            made.append(own.decode)
        return store.exists(embedding_name(encoder.spec.sha, shard)) or take_shard(
            layout, shard, encoder, store, own.decode, ended.is_set
        )

    start_server()
    threads = ThreadPoolExecutor(at_once)
    try:
        yield from zip(shards, threads.map(take, shards), strict=True)
    finally:
        ended.set()
        threads.shutdown(cancel_futures=True)
        for decode in made:
            decode.close()


def take_shard(
    layout: Layout,
    shard: Shard,
    encoder: Encoder,
    store: Store,
    decode: Decode,
    ended: Callable[[], bool] = lambda: False,
) -> bool:
    """Write a shard's embedding file, if all of its usable pairs are found; says whether.

    Args:
        layout: where they are.
        shard: of the pool.
        encoder: the recipe's reference.
        store: the root.
        decode: of no crops.
        ended: says whether nobody waits for it any more.

    Raises:
        UserError, InputChangedError: as `take_shards`.
    """
    reading = Reading(views={}, crops={}, wordings={}, tokenizers={})
    whole = Slice(job=0, shard=shard, start=0, stop=shard.rows, rows=None, piece_rows=PIECE_ROWS, encoders=())
    names = {NAME: embedding_name(encoder.spec.sha, shard)}
    job = Job(names=names, pieces=len(whole.numbers), piece_rows=PIECE_ROWS, part_pieces=PART_PIECES)
    taken: list[tuple[int, bytes]] = []
    try:
        for raw in reading.raw(whole):
            piece = reading.piece(raw, decode)
            statuses = piece.table()["status"].to_pylist()
            rows, keys = _usable(raw, statuses)
            found, there = layout.vectors(keys)
            # A decoder may have ended with this process, so that its row is for an embedding run to judge.
            if ended() or not there.all() or not {WORKER_CRASH, DECODE_TIMEOUT}.isdisjoint(statuses):
                return False
            z = normalize(torch.from_numpy(found).float(), dim=-1)
            # All of a shard's vectors are held, for none is written before some were looked at.
            job.add(piece, {NAME: (z[0], z[1])})
            sound = (z.isfinite().all(dim=2) & z.any(dim=2)).all(dim=0)  # others have a status that says so
            taken += [(rows[place], keys[place]) for place in sound.nonzero().flatten().tolist()]
    except ShardDamagedError:
        return False
    if taken:
        _check_vectors(layout, shard, encoder, [taken[place] for place in spread(len(taken), SAMPLED_ROWS)])
    if ended():
        return False
    write_files(store, job, {NAME: encoder}, some=False)
    return True


def _usable(raw: Raw, statuses: Sequence[str]) -> tuple[list[int], list[bytes]]:
    """Numbers and keys of the rows of a piece that are ok."""
    columns = raw.slice.shard.columns
    read = [place for place in range(len(raw.rows)) if place not in raw.filtered]
    pairs = pairs_of(raw.batch.column(str(columns.uid)), raw.batch.column(columns.caption))
    found = [
        (int(raw.rows[place]), pair_key(*pair))
        for place, pair in zip(read, pairs, strict=True)
        if statuses[place] == "ok"
    ]
    return [row for row, _ in found], [key for _, key in found]


def _check_vectors(layout: Layout, shard: Shard, encoder: Encoder, taken: Sequence[tuple[int, bytes]]) -> None:
    """Embed some rows, and hold the vectors that are found for their keys against that."""
    reading = reading_for({NAME: encoder})
    rows, (vectors, _) = np.array([row for row, _ in taken]), layout.vectors([key for _, key in taken])
    some = Slice(job=0, shard=shard, start=0, stop=len(rows), rows=rows, piece_rows=len(rows), encoders=(NAME,))
    (raw,) = reading.raw(some)
    piece = reading.piece(raw, lambda rows: [decode_row(row, reading.crops) for row in rows])
    with _ENCODING:
        ours = encoder.encode(piece.pixels[encoder.view], piece.texts[encoder.wording], piece.of)
    theirs = normalize(torch.from_numpy(vectors).float(), dim=-1)
    cosines = torch.stack([(z.cpu() * other).sum(dim=1) for z, other in zip(ours, theirs, strict=True)])
    if not bool((cosines >= LEAST_COSINE).all()):
        pictures, captions = cosines.min(dim=1).values.tolist()
        raise UserError(
            f"{layout.url}: expected embeddings by the recipe's reference, a cosine of {LEAST_COSINE} at least to what "
            f"it makes of rows {', '.join(map(str, rows.tolist()))} of {shard.path}; found {pictures:.4f} for pictures "
            f"and {captions:.4f} for captions; name the model and the weights that made them in [reference]"
        )
