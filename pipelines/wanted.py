"""Which rows of the pool a learner is asked for: a round's candidates, and a fixed sample."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from curate.embed.files import embedding_name, read_embeddings
from curate.models.spec import EncoderSpec
from curate.pool.shards import Pool, Shard
from curate.seeds import derive_seed
from curate.select.index import Index, candidate_rows
from curate.select.windows import super_batch_of, window_scope
from curate.storage import Store

Ints = npt.NDArray[np.int64]

SAMPLE_ROWS = 1024
"""About so many rows are in the sample: the correlation of ranks is then known to 0.03."""
SAMPLE_SHARDS = 8
"""From so many shards, a run of each: a run lies in one row group or two."""
SAMPLE_SHARE = 16
"""One of so many rows of these shards at most: a small round must not have a small pool scored whole."""


class Wanted(Protocol):
    """Some rows of some shards."""

    @property
    def scope(self) -> str:
        """Names the folder of the files that hold these rows only."""

    @property
    def shards(self) -> tuple[int, ...]:
        """Indices of the shards that the rows lie in."""

    def expected(self, shard: int) -> int:
        """About how many rows are wanted of a shard."""

    def rows(self, store: Store, shard: Shard) -> Ints:
        """Their numbers in a shard, ascending."""


@dataclass(frozen=True, kw_only=True)
class WindowRows:
    """The candidates of some consecutive super-batches of a window."""

    index: Index
    reference: EncoderSpec
    seed: int
    epoch: int
    shards: tuple[int, ...]
    share: float
    """Of the window's candidates."""
    boundaries: tuple[int, ...]
    """Keys at which the super-batches begin, and at which the last one ends."""

    @property
    def scope(self) -> str:
        """Named by all that decides which rows of a shard these are."""
        low, high = self.boundaries[0], self.boundaries[-1]
        return window_scope(self.index.folder, seed=self.seed, epoch=self.epoch, low=low, high=high)

    def expected(self, shard: int) -> int:
        """The same share of each shard: keys are uniform."""
        return round(self.share * self.index.candidates[shard])

    def rows(self, store: Store, shard: Shard) -> Ints:
        """By the reference's file; no picture is read."""
        rows = candidate_rows(store, shard, self.reference, self.index, seed=self.seed, epoch=self.epoch)
        inside = super_batch_of(rows["key"], (self.boundaries[0], self.boundaries[-1])) >= 0
        return rows["row"][inside].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SampleRows:
    """The pairs on which one round's learner is compared with the next one's: a run of rows of each of some shards."""

    seed: int
    reference: EncoderSpec
    runs: Mapping[int, tuple[int, int]]
    """By shard the first row, and the one after the last."""

    @property
    def scope(self) -> str:
        """Which rows of a shard these are depends on nothing but the shard, the seed and the reference."""
        return f"sample-{self.seed}-{self.reference.sha}"

    @property
    def shards(self) -> tuple[int, ...]:
        """In the order of the pool."""
        return tuple(sorted(self.runs))

    def expected(self, shard: int) -> int:
        """At most."""
        start, stop = self.runs[shard]
        return stop - start

    def rows(self, store: Store, shard: Shard) -> Ints:
        """Those of the run that the reference could use."""
        start, stop = self.runs[shard.index]
        table = read_embeddings(store, embedding_name(self.reference.sha, shard), ["status"])
        return start + np.flatnonzero(pc.equal(table["status"].slice(start, stop - start), "ok").to_numpy())


def fixed_sample(pool: Pool, seed: int, reference: EncoderSpec) -> SampleRows:
    """The same sample in every round, as long as the pool stays; much the same when the pool grows."""
    own = derive_seed(seed, "sample")

    def digest(shard: Shard) -> bytes:
        return hashlib.sha256(f"{own}/{shard.key}".encode()).digest()

    runs = {}
    for shard in sorted(pool.shards, key=digest)[:SAMPLE_SHARDS]:
        length = min(SAMPLE_ROWS // SAMPLE_SHARDS, -(-shard.rows // SAMPLE_SHARE))
        start = int.from_bytes(digest(shard)[:8], "little") % max(1, shard.rows - length)
        runs[shard.index] = (start, start + length)
    return SampleRows(seed=seed, reference=reference, runs=runs)
