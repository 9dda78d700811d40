"""Whether shards are sorted by topic, on drawn captions and on a textbook in its own order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.select.topics import likeness, sample_captions
from tests.helpers import write_pool

BOOK = Path(__file__).parents[2] / "shared" / "data" / "openstax-physics-ml"
COMMON = ["the", "of", "and", "a", "in", "to", "is", "with", "on", "for"]


def shards_of(topics: int, *, mixed: bool, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for topic in np.repeat(np.arange(topics), 40):
        own = [f"w{topic}-{i}".replace("-", "x") for i in rng.integers(0, 30, 4)]
        rows.append(" ".join([*own, *rng.choice(COMMON, 5)]))
    if mixed:
        rows = [rows[i] for i in rng.permutation(len(rows))]
    return [rows[i : i + 40] for i in range(0, len(rows), 40)]


@pytest.mark.parametrize("seed", range(5))
def test_sorted_shards_are_told_from_mixed_ones(seed: int) -> None:
    found, mixed = (likeness(shards_of(12, mixed=mixed, seed=seed)) for mixed in (False, True))
    assert found is not None
    assert mixed is not None
    assert found.is_sorted
    assert not mixed.is_sorted
    assert mixed.within < 1.2 * mixed.across


def test_hardly_anything_says_nothing() -> None:
    assert likeness([]) is None
    assert likeness([["a b"], []]) is None
    assert likeness([["a b"], ["", "  "]]) is None
    same = likeness([["a b"] * 3, ["a b"] * 3])
    assert same is not None
    assert not same.is_sorted


def test_captions_are_taken_from_all_of_a_shard(tmp_path: Path) -> None:
    table = pa.table({"jpg": [b"x"] * 100, "caption": [f"{i}" for i in range(100)]})
    (shard,) = write_pool(tmp_path / "pool", table).shards
    assert sample_captions(shard, rows=4) == ["0", "33", "66", "99"]


@pytest.mark.skipif(not BOOK.exists(), reason="the textbook is not here")
def test_a_textbook_in_its_own_order_is_sorted_by_topic() -> None:
    columns = ["key", "caption"]
    book = pa.concat_tables([pq.read_table(path, columns=columns) for path in sorted(BOOK.glob("*.parquet"))])
    captions = book.sort_by("key")["caption"].to_pylist()
    mixed = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    for rows, is_sorted in ((captions, True), (mixed, False)):
        found = likeness([rows[i : i + 64] for i in range(0, len(rows) - 64, 320)])
        assert found is not None
        assert found.is_sorted is is_sorted
