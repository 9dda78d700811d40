"""Topics: whether the shards of a pool are sorted by topic, so that a few of them are no fair sample of all."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curate.pool.shards import Shard, caption_bytes, read_rows, spread

ROWS_OF_A_SHARD = 64
PERMUTATIONS = 99


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How alike captions are, by the cosine of their words, rare words counting more (tf-idf)."""

    within: float
    """Mean over pairs of captions of one shard."""
    across: float
    """Mean over pairs of captions of two shards."""
    by_chance: float
    """The largest `within` of so many random allotments of the captions to shards."""

    @property
    def is_sorted(self) -> bool:
        """Whether captions of a shard are alike beyond chance, and by so much that a window would show it."""
        return self.within > self.by_chance and self.within > 1.5 * self.across


def sample_captions(shard: Shard, rows: int = ROWS_OF_A_SHARD) -> list[str]:
    """Captions of some rows, evenly spaced over a shard; of all columns this one alone is read."""
    numbers = spread(shard.rows, rows)
    column = caption_bytes(read_rows(shard, numbers, [shard.columns.caption])[shard.columns.caption].combine_chunks())
    return [(caption or b"").decode(errors="replace") for caption in column.to_pylist()]


def likeness(captions: Sequence[Sequence[str]], *, permutations: int = PERMUTATIONS) -> Likeness | None:
    """How alike captions of one shard are, against those of different shards.

    Args:
        captions: of some rows of each of some shards.
        permutations: random allotments that tell what is chance.

    Returns:
        None if there are fewer than two shards with captions.
    """
    words = [Counter(re.findall(r"\w+", text.lower())) for shard in captions for text in shard]
    shard = np.repeat(np.arange(len(captions)), [len(some) for some in captions])
    found = np.array([bool(some) for some in words], bool)
    words, shard = [some for some in words if some], shard[found]
    if len(np.unique(shard)) < 2:
        return None
    frequency = Counter(word for some in words for word in some)
    column = {word: i for i, word in enumerate(frequency)}
    x = np.zeros((len(words), len(column)), np.float32)
    for row, some in enumerate(words):
        for word in some:
            x[row, column[word]] = np.log((1 + len(words)) / frequency[word])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, 0)

    def means(shard: np.ndarray) -> tuple[float, float]:
        same = shard[:, None] == shard[None]
        pairs = same.sum() - len(shard)
        return float(cosines[same].sum() / max(1, pairs)), float(cosines[~same].mean())

    within, across = means(shard)
    rng = np.random.default_rng(0)
    by_chance = max(means(rng.permutation(shard))[0] for _ in range(permutations))
    return Likeness(within=within, across=across, by_chance=by_chance)
