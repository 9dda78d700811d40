"""A pool that is shuffled once: each row once, in an order that nothing but the seed decides."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate.pipelines.reshard
from curate.errors import UserError
from curate.pipelines.reshard import shuffle_pool
from curate.recipe import PoolSection
from curate.storage import Store
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")

SHARDS, ROWS = 12, 50


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Sorted by topic; one shard has a column more, another has its captions in another type."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        table = pa.table({"jpg": [b"%d" % i * 20 for i in numbers], "caption": [f"{i}" for i in numbers]})
        if shard == 3:
            table = table.append_column("more", pa.array([1.5] * ROWS))
        if shard == 4:
            table = table.set_column(1, "caption", table["caption"].cast(pa.large_string()))
        pq.write_table(table, folder / f"{shard:03d}.parquet")
    return folder


def shuffled(pool: Path, to: str, **how: Any) -> list[pa.Table]:
    how = {"rows_per_shard": 100, "row_group_bytes": 2**20} | how
    names = shuffle_pool(PoolSection(path=str(pool)), to, **how)
    store = Store(to)
    assert sorted([*names, "shuffle.json"]) == store.list()
    found = []
    for name in names:
        with store.open_input(name) as file:
            found.append(pq.read_table(file))
    return found


def test_each_row_is_there_once_and_topics_are_mixed(pool: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate.pipelines.reshard, "GROUP_BYTES", 3000)  # several groups
    tables = shuffled(pool, root)
    assert len(tables) == 6
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(int(row["caption"]) for row in rows) == list(range(SHARDS * ROWS))
    for row in rows:
        number = int(row["caption"])
        assert row["jpg"] == b"%d" % number * 20
        assert row["more"] == (1.5 if number // ROWS == 3 else None)
    # As many rows of each old shard in each new one as chance gives: chi-square of 11 × 5 degrees of freedom.
    counts = np.array(
        [np.bincount([int(c) // ROWS for c in t["caption"].to_pylist()], minlength=SHARDS) for t in tables]
    )
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    assert 25 < ((counts - expected) ** 2 / expected).sum() < 100
    numbers = np.array([int(row["caption"]) for row in rows])
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.15


def test_the_seed_decides_the_bytes_and_groups_do_not(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shuffled(pool, str(tmp_path / "a"))
    monkeypatch.setattr(curate.pipelines.reshard, "GROUP_BYTES", 3000)
    assert shuffled(pool, str(tmp_path / "b")) == first
    assert shuffled(pool, str(tmp_path / "c"), seed=1) != first
    for path in sorted((tmp_path / "a").glob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_one_that_was_killed_goes_on(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shuffled(pool, str(tmp_path / "a"))
    whole = curate.pipelines.reshard._write_shard

    def killed(number: int, shuffle: Any) -> None:
        if number == 4:
            raise KeyboardInterrupt
        whole(number, shuffle)

    with monkeypatch.context() as patch:
        patch.setattr(curate.pipelines.reshard, "_write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            shuffled(pool, str(tmp_path / "b"))
    assert (tmp_path / "b" / "000003.parquet").exists()
    assert shuffled(pool, str(tmp_path / "b")) == first
    assert shuffled(pool, str(tmp_path / "b")) == first  # and once more changes nothing


def test_a_folder_that_holds_something_else_is_refused(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.parquet").touch()
    with pytest.raises(UserError, match=r"full: expected an empty folder, found mine\.parquet; choose another one"):
        shuffled(pool, str(tmp_path / "full"))
    shuffled(pool, str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"shuffle\.json: the shuffle in this folder was begun with another pool, seed"):
        shuffled(pool, str(tmp_path / "a"), seed=1)
