"""A shard whose footer is sound and whose rows cannot be read: told in one line each, or skipped and accounted for."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curate.embed.files import DAMAGED_SHARD
from curate.errors import ShardDamagedError, UserError
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds.explain import describe_round
from curate.rounds.manifest import Manifest, manifest_name
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.helpers import damage_page, write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder)
    draw_pool(folder / "pool", rows=160, shards=4, seed=0, image_size=32)
    for path in (folder / "pool").iterdir():
        pq.write_table(pq.read_table(path), path, row_group_size=10)
    return folder


def damaged(world: Path, tmp_path: Path, places: Sequence[tuple[int, str]]) -> list[Path]:
    """A copy of the pool with these shards damaged, each in a column."""
    shutil.copytree(world / "pool", tmp_path / "pool")
    paths = [tmp_path / "pool" / f"{shard:05d}.parquet" for shard, _ in places]
    for path, (_, column) in zip(paths, places, strict=True):
        damage_page(path, column, 2)
    return paths


def run(world: Path, tmp_path: Path, on_bad_shard: str = "fail", number: int = 0, **selection: Any) -> Manifest:
    fields = {
        "root": str(tmp_path / "root"),
        "pool": {
            "path": str(tmp_path / "pool"),
            "uid": "key",
            "on_bad_shard": on_bad_shard,
            "max_dropped_share": 0.5,
        },
        "reference": {"model": "tiny.json"},
        "learner": {"model": "tiny.json"},
        "selection": {"sub_batch_size": 8, "n_chunks": 4, "filter_ratio": 0.75, "criterion": "learnability"}
        | selection,
    }
    return run_round(Recipe.model_validate(fields), base=world, number=number)


def test_each_damaged_shard_is_one_line(world: Path, tmp_path: Path) -> None:
    paths = damaged(world, tmp_path, [(1, "jpg"), (2, "caption")])
    for _ in range(2):  # and the same when it is run again
        with pytest.raises(UserError) as caught:
            run(world, tmp_path)
        assert len(caught.value.lines) == 2
        for line, path, column in zip(caught.value.lines, paths, ("jpg", "caption"), strict=True):
            assert line.startswith(
                f"{path}: expected 40 readable rows, found a damaged page in column '{column}' after"
            )
            assert "; replace the file, or move it out of the pool" in line
    assert not Store(str(tmp_path / "root")).exists(manifest_name(0))


@pytest.mark.parametrize("super_batches", [None, 1], ids=["one pass", "a pass of the learner's own"])
def test_skipped_rows_are_counted_and_told(world: Path, tmp_path: Path, super_batches: int | None) -> None:
    (path,) = damaged(world, tmp_path, [(1, "jpg")])
    manifest = run(world, tmp_path, "skip", super_batches=super_batches)
    assert manifest.pool_rows == 160
    assert manifest.tallies[0].dropped == {DAMAGED_SHARD: 40}
    store = Store(str(tmp_path / "root"))
    (line,) = describe_round(store, 0)["skipped_shards"]
    assert line.startswith(f"{path}: expected 40 readable rows, found a damaged page in column 'jpg' after row")
    (story,) = explain_uid(store, pq.read_table(path, columns=["key"])["key"][3].as_py())
    assert (story["shard"], story["row"], story["status"]) == (path.name, 3, DAMAGED_SHARD)
    assert story["error"].startswith("a damaged page in column 'jpg' after row")
    for file in manifest.files:
        rows = pq.read_table(tmp_path / "root/rounds/r000000" / file.name)
        assert path.name not in rows["curate"].combine_chunks().field("source_shard").to_pylist()


def test_skipping_too_much_is_an_alarm(world: Path, tmp_path: Path) -> None:
    damaged(world, tmp_path, [(0, "jpg"), (1, "key"), (2, "caption")])
    with pytest.raises(UserError, match=r"120 of 160 rows cannot be used \(damaged_shard 120\), more than the share"):
        run(world, tmp_path, "skip")


@pytest.mark.parametrize("on_bad_shard", ["fail", "skip"])
def test_a_column_that_only_the_writer_reads(world: Path, tmp_path: Path, on_bad_shard: str) -> None:
    """Selected rows of it cannot be copied; which file, and which column, is said."""
    (path,) = damaged(world, tmp_path, [(1, "broken")])
    with pytest.raises(ShardDamagedError) as caught:
        run(world, tmp_path, on_bad_shard)
    assert str(caught.value).startswith(f"{path}: expected 40 readable rows, found a damaged page in column 'broken'")
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_mended_is_read_again(world: Path, tmp_path: Path) -> None:
    (path,) = damaged(world, tmp_path, [(1, "jpg")])
    assert run(world, tmp_path, "skip").tallies[0].dropped == {DAMAGED_SHARD: 40}
    shutil.copyfile(world / "pool" / path.name, path)
    manifest = run(world, tmp_path, "skip", number=1)
    assert manifest.tallies[0].dropped == {}


def test_a_round_that_is_to_fail_at_bad_shards_fails_at_those_that_an_earlier_one_skipped(
    world: Path, tmp_path: Path
) -> None:
    (path,) = damaged(world, tmp_path, [(1, "jpg")])
    run(world, tmp_path, "skip")
    with pytest.raises(UserError) as caught:
        run(world, tmp_path, "fail", number=1)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: expected 40 readable rows, found a damaged page")
