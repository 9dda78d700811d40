"""Some rows of a pool, decoded: what becomes of them tells of the others before anything is begun."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from curate.embed.files import DAMAGED_SHARD, content_hash, uids_of
from curate.embed.pieces import before_decoding, columns_read
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.pool.images import Dropped, clean_caption, decode_image
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes, read_batches
from curate.pool.wanted import FILTERED, wanted_rows

SAMPLED_SHARDS = 4
SAMPLED_ROWS = 64
"""Of each: read from its first row group, and decoded."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some rows of a pool, decoded."""

    rows: int
    dropped: Counter[str]

    def __str__(self) -> str:
        why = ", ".join(f"{reason} {rows}" for reason, rows in sorted(self.dropped.items()))
        return f"{self.rows - self.dropped.total()} of {self.rows} sampled rows can be used{f' ({why})' if why else ''}"


def sample_pool(pool: Pool) -> Sample:
    """Decode the first rows of a few shards, spread over the pool.

    Raises:
        UserError: one line for each of them that is damaged, unless the policy is to skip them.
    """
    full = [shard for shard in pool.shards if shard.rows]
    shards = full[:: max(1, -(-len(full) // SAMPLED_SHARDS))]
    dropped: Counter[str] = Counter()
    rows = 0
    damaged: list[str] = []
    with ThreadPoolExecutor(SAMPLED_SHARDS) as threads:
        for reasons, damage in threads.map(_reasons, shards):
            dropped.update(reason for reason in reasons if reason is not None)
            rows += len(reasons)
            damaged += [damage] if damage else []
    if damaged and pool.on_bad_shard == "fail":
        raise UserError(*damaged)
    return Sample(rows=rows, dropped=dropped)


def _reasons(shard: Shard) -> tuple[list[str | None], str | None]:
    """Why each of the first rows of a shard cannot be used, None where it can; and what is damaged, if they are."""
    columns = shard.columns
    reasons: list[str | None] = []
    try:
        batch = next(read_batches(shard, [*columns_read(shard), *columns.where_columns], batch_rows=SAMPLED_ROWS))
    except ShardDamagedError as error:
        return [DAMAGED_SHARD] * min(SAMPLED_ROWS, shard.rows), str(error)
    except InputChangedError as error:
        raise UserError(str(error)) from error
    images = image_bytes(batch.column(columns.image)).to_pylist()
    captions = caption_bytes(batch.column(columns.caption)).to_pylist()
    uids = uids_of(batch, columns, map(content_hash, images, captions))
    wanted = wanted_rows(columns, batch, uids)
    for image, caption, known, asked in zip(
        images, captions, before_decoding(batch, columns, images, uids), wanted.tolist(), strict=True
    ):
        if not asked or known.status != "ok":
            reasons.append(known.status if asked else FILTERED)
            continue
        try:
            clean_caption(caption)
            decode_image(image)
            reasons.append(None)
        except Dropped as dropped:
            reasons.append(dropped.reason)
    return reasons, None
