"""What a pool is like before anything is begun: some rows decoded, and what its columns say of all, if it is small."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from curate.embed.files import DAMAGED_SHARD, content_hash, uid_texts, uids_of
from curate.embed.pieces import FILTER_ROWS, before_decoding, columns_read
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.pipelines import progress
from curate.pool.images import Dropped, clean_caption, decode_image
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes, read_batches
from curate.pool.wanted import FILTERED, wanted_rows

SAMPLED_SHARDS = 4
SAMPLED_ROWS = 64
"""Of each: read from its first row group, and decoded."""
ASKED_ROWS = 1_000_000
"""Of a pool up to this size each row is asked whether it is wanted, and for its uid: seconds, of columns."""


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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the columns of a pool say of its rows."""

    wanted: int
    """Rows that `pool.where` and `pool.keep` leave; at most, where the pool is large or has no uids."""
    mistakes: tuple[str, ...] = ()
    """What is wrong with the uids."""


def ask_pool(pool: Pool) -> Asked:
    """Ask the rows of a pool, unless they are too many, what a round will ask them once all are embedded.

    Raises:
        UserError: a shard is damaged, unless the policy is to skip those; or as `wanted_rows`.
    """
    columns = pool.columns
    if pool.rows > ASKED_ROWS or (columns.uid is None and columns.where is None):
        return Asked(wanted=pool.rows)
    with ThreadPoolExecutor(SAMPLED_SHARDS) as threads:
        answers = threads.map(partial(_ask, skip=pool.on_bad_shard == "skip"), pool.shards)
        found = list(progress.over(answers, len(pool.shards), title="uids and pool.where", unit="shard"))
    wanted = sum(mask for mask, _ in found)
    return Asked(wanted=wanted, mistakes=tuple(_mistaken(pool, [uids for _, uids in found])))


def _ask(shard: Shard, *, skip: bool) -> tuple[int, npt.NDArray[np.int64]]:
    """How many rows of a shard are wanted, and a hash of the uid of each; 0 where there is none."""
    columns = shard.columns
    names = [*columns.where_columns, *([columns.uid] if columns.uid else [])]
    wanted, hashes = 0, [np.empty(0, np.int64)]
    try:
        for batch in read_batches(shard, names, batch_rows=FILTER_ROWS):
            uids = uid_texts(batch.column(columns.uid)) if columns.uid else None
            wanted += int(wanted_rows(columns, batch, uids).sum())
            hashes.append(np.array([0 if uid is None else hash(uid) or 1 for uid in uids or ()], np.int64))
    except ShardDamagedError as error:
        if not skip:
            raise UserError(str(error)) from error
    except InputChangedError as error:
        raise UserError(str(error)) from error
    return wanted, np.concatenate(hashes)


def _mistaken(pool: Pool, uids: Sequence[npt.NDArray[np.int64]]) -> Iterator[str]:
    """What is wrong with the hashes of uids, by shard."""
    every, begins = np.concatenate([np.empty(0, np.int64), *uids]), np.cumsum([0, *map(len, uids)])

    def place(at: int) -> tuple[int, str]:
        shard = int(np.searchsorted(begins, at, side="right")) - 1
        return at - int(begins[shard]), pool.shards[shard].path

    where = f"pool.uid = {pool.columns.uid!r}"
    if len(none := np.flatnonzero(every == 0)) > 1:  # one alone is told from all others
        row, path = place(int(none[0]))
        yield (
            f"{where}: {len(none):,} rows have none, the first row {row} of {path}; name a column that every row has a "
            "value in, or none"
        )
    order = np.argsort(every, kind="stable")
    again = np.flatnonzero((every[order[1:]] == every[order[:-1]]) & (every[order[1:]] != 0))
    if len(again):
        earliest = again[np.argmin(order[again + 1])]  # hashes differ from process to process, and their order too
        (row, path), (first, other) = place(int(order[earliest + 1])), place(int(order[earliest]))
        yield (
            f"{where}: {len(again):,} rows repeat a uid, such as row {row} of {path} that of row {first} of {other}; "
            "name a column that tells pairs apart, or none"
        )
