"""Uniform batches straight from a pool: what a learner is trained on without curation."""

import itertools
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curate.embed.files import content_hash, uids_of
from curate.errors import ShardDamagedError, UserError
from curate.models.crop import Preprocess, decode_for, pixels_of
from curate.pool.images import Dropped, clean_caption
from curate.pool.shards import Pool, caption_bytes, image_bytes, read_batches
from curate.pool.wanted import wanted_rows
from curate.reader.pieces import PIECE_ROWS, Joined
from curate.seeds import derive_seed

SHUFFLED_ROWS = 65_536
"""Encoded rows that are held and mixed: a pool below this size is shuffled perfectly, a larger one in stretches."""
READ_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class UniformBatch:
    """Pairs drawn without regard to what they are."""

    number: int
    """Of the batch, counted from the first of epoch 0."""
    images: Tensor
    """[b/W, 3, H, W], or uint8 [b/W, H, W, 3] of a `Crop`."""
    texts: Tensor
    """[b/W, L]"""


def uniform_batches(
    pool: Pool,
    batch_size: int,
    *,
    seed: int,
    preprocess: Preprocess,
    tokenize: Callable[[list[str]], Tensor],
    threads: int = 1,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Generator[UniformBatch]:
    """Endless batches, epoch after epoch in new orders; rows that cannot be used are passed over.

    Args:
        pool: the inventory.
        batch_size: b.
        seed: of the recipe.
        preprocess: open_clip's transform, or a `Crop`.
        tokenize: open_clip's tokenizer.
        threads: that decode.
        rank: whose slice of each batch is given; b divides by `world_size`.
        world_size: number of ranks, each of which decodes all, because a row's place depends on those before it.
        pin_memory: hold tensors in pinned memory, from which a GPU copies without blocking.
        check: called every few hundred rows; what it raises ends the iteration.

    Raises:
        UserError: a whole epoch holds fewer than b usable rows, or b does not divide by `world_size`.
        InputChangedError: a shard is not the file that was inventoried, or is damaged and not to be skipped.
    """
    if batch_size % world_size:
        raise UserError(f"{batch_size} pairs per batch do not divide over {world_size} ranks; use a divisor")
    share = batch_size // world_size
    filled = number = 0
    images, texts = (Joined(share, pin_memory=pin_memory) for _ in range(2))
    with ThreadPoolExecutor(threads) as executor:
        for epoch in range(2**31):
            found = 0
            for rows in _shuffled(pool, np.random.default_rng(derive_seed(seed, "uniform", epoch))):
                for start in range(0, len(rows), PIECE_ROWS):
                    check()
                    decoded = executor.map(
                        lambda row: _usable(row[0], row[1], preprocess), rows[start : start + PIECE_ROWS]
                    )
                    usable = [pair for pair in decoded if pair is not None]
                    found += len(usable)
                    while usable:
                        taken, usable = usable[: batch_size - filled], usable[batch_size - filled :]
                        mine = taken[max(0, rank * share - filled) : max(0, (rank + 1) * share - filled)]
                        filled += len(taken)
                        if mine:
                            images.add(torch.stack([image for image, _ in mine]))
                            texts.add(tokenize([caption for _, caption in mine]))
                        if filled == batch_size:
                            yield UniformBatch(number=number, images=images.whole, texts=texts.whole)
                            images, texts = (Joined(share, pin_memory=pin_memory) for _ in range(2))
                            filled, number = 0, number + 1
            if found < batch_size:
                raise UserError(f"pool: {found} of {pool.rows} rows can be used, a batch wants {batch_size}")


def _shuffled(pool: Pool, rng: np.random.Generator) -> Iterator[list[tuple[bytes | None, bytes | None]]]:
    """Stretches of at most `SHUFFLED_ROWS` encoded rows, shards in random order, rows mixed within a stretch.

    Of a damaged shard, where bad ones are skipped, those before the damage.
    """
    held: list[tuple[bytes | None, bytes | None]] = []
    columns = pool.columns
    names = [columns.image, columns.caption, *columns.where_columns, *([columns.uid] if columns.uid else [])]
    for index in rng.permutation(len(pool.shards)):
        try:
            for batch in read_batches(pool.shards[index], list(dict.fromkeys(names)), batch_rows=READ_ROWS):
                images = image_bytes(batch.column(columns.image)).to_pylist()
                pairs = list(zip(images, caption_bytes(batch.column(columns.caption)).to_pylist(), strict=True))
                asked = columns.keep is not None  # else nothing need be hashed
                uids = uids_of(batch, columns, (content_hash(*pair) for pair in pairs)) if asked else None
                held += itertools.compress(pairs, wanted_rows(columns, batch, uids))
                if len(held) >= SHUFFLED_ROWS:
                    yield [held[i] for i in rng.permutation(len(held))]
                    held = []
        except ShardDamagedError:
            if pool.on_bad_shard == "fail":
                raise
    yield [held[i] for i in rng.permutation(len(held))]


def _usable(data: bytes | None, raw: bytes | None, preprocess: Preprocess) -> tuple[Tensor, str] | None:
    try:
        caption = clean_caption(raw)
        return pixels_of(decode_for(data, [preprocess]), preprocess), caption
    except Dropped:
        return None
