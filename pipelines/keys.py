"""Which rows of the pool a learner is asked for: ranges of keys, and a fixed sample."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from curate.embeddings import range_scope
from curate.pool import Pool
from curate.seeds import derive_seed
from curate.walk import END, walk_keys

SAMPLE_ROWS = 1024
"""About so many rows are in the sample: the correlation of ranks is then known to 0.03."""
SAMPLE_SHARDS = 8
"""From so many shards: their embedding files are read whole."""
SAMPLE_SHARE = 1 / 16
"""Of the rows of these shards at most: a small round must not have a small pool scored whole."""


@dataclass(frozen=True, kw_only=True)
class KeyRange:
    """Rows whose key in this epoch's walk is at least `low` and below `high`."""

    seed: int
    epoch: int
    low: int
    high: int
    dedup: str | None = None
    """Folder of the deduplication whose dropped rows are not asked for."""

    @property
    def scope(self) -> str:
        """Names the folder of files that score these rows only."""
        return range_scope(seed=self.seed, epoch=self.epoch, low=self.low, high=self.high, dedup=self.dedup)

    def wanted(self, content: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Whether each content [n, 2] is in the range: [n]."""
        keys = walk_keys(content, seed=self.seed, epoch=self.epoch)
        below = np.ones(len(keys), bool) if self.high == END else keys < np.uint64(self.high)
        return np.asarray((keys >= np.uint64(self.low)) & below)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The pairs on which one round's learner is compared with the next one's."""

    keys: KeyRange
    shards: frozenset[int]
    """Indices of the shards that it is taken from."""


def fixed_sample(pool: Pool, seed: int) -> Sample:
    """The same sample in every round, as long as the pool stays; much the same when the pool grows."""
    own = derive_seed(seed, "sample")
    ranked = sorted(pool.shards, key=lambda shard: hashlib.sha256(f"{own}/{shard.key}".encode()).digest())
    shards = ranked[:SAMPLE_SHARDS]
    rows = sum(shard.rows for shard in shards)
    high = int(END * min(SAMPLE_SHARE, SAMPLE_ROWS / max(1, rows)))
    return Sample(keys=KeyRange(seed=own, epoch=0, low=0, high=high), shards=frozenset(shard.index for shard in shards))
