"""Rounds that take a window of a pool of many shards: what they touch, and that nothing else changes."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate import access
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.pool.shards import load_pool
from curate.recipe import Recipe
from curate.rounds.manifest import Manifest
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")

SHARDS, ROWS, B, b = 40, 640, 64, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=ROWS, shards=SHARDS, seed=0, image_size=32, duplicate_share=0.05)
    return folder


@pytest.fixture(scope="module")
def embedded(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that knows the pool: the reference has run and the index is made."""
    root = tmp_path_factory.mktemp("embedded") / "root"
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run_round(recipe(world, root, criterion="easy_reference"), base=world)
    shutil.rmtree(root / "rounds")
    return root


def recipe(world: Path, root: Path, **selection: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "root": str(root),
            "pool": {"path": str(world / "pool"), "uid": "key"},
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            "output": {"file_rows": 2 * b},
            "selection": {"sub_batch_size": b, "n_chunks": 4, "filter_ratio": 0.75, "criterion": "learnability"}
            | selection,
        }
    )


def rounds(world: Path, embedded: Path, root: Path, count: int, **selection: Any) -> list[Manifest]:
    if not root.exists():
        shutil.copytree(embedded, root)
    return [run_round(recipe(world, root, **selection), base=world) for _ in range(count)]


def curated(root: Path, manifest: Manifest) -> pa.Table:
    names = [root / f"rounds/r{manifest.round:06d}" / file.name for file in manifest.files]
    return pa.concat_tables([pq.read_table(name) for name in names])


def test_a_round_touches_the_shards_of_its_window_alone(
    world: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[str] = set()
    whole = access.open_for_arrow

    def noted(path: str) -> Any:
        opened.add(Path(path).name)
        return whole(path)

    monkeypatch.setattr(access, "open_for_arrow", noted)
    read = []
    for _ in range(2):
        opened.clear()
        (manifest,) = rounds(world, embedded, tmp_path / "root", 1, super_batches=3)
        read.append({name for name in opened if (world / "pool" / name).exists()})
        assert manifest.lineage["windows"]["of"] == 2
        sources = {row["source_shard"] for row in curated(tmp_path / "root", manifest)["curate"].to_pylist()}
        assert sources <= read[-1]
    # Footers are read once, by the first round; the sample by which learners are compared lies in 8 shards.
    assert len(read[0]) == SHARDS
    assert 16 <= len(read[1]) <= 16 + 8


def test_windows_of_an_epoch_offer_each_row_once_and_every_row_is_accounted_for(
    world: Path, embedded: Path, tmp_path: Path
) -> None:
    manifests = rounds(world, embedded, tmp_path / "root", 3, super_batches=3)
    taken = [manifest.lineage["windows"]["taken"] for manifest in manifests]
    assert [one["start"] for one in taken[:2]] == [0, 3]
    assert taken[2]["epoch"] == (0 if held_super_batches(manifests[0]) >= 9 else 1)
    chosen = [set(curated(tmp_path / "root", manifest)["key"].to_pylist()) for manifest in manifests[:2]]
    assert not chosen[0] & chosen[1]
    for manifest in manifests:
        assert [tally.step for tally in manifest.tallies] == ["embed", "dedup", "window", "select"]
        window = manifest.tallies[2]
        assert window.kept == 3 * B
        assert 0 < window.dropped["window_end"] < 2 * B  # of two windows
    keys = pq.ParquetDataset(world / "pool").read(columns=["key"])["key"].to_pylist()
    outcomes = [explain_uid(Store(str(tmp_path / "root")), key)[0].get("rounds", []) for key in keys[::16]]
    told = [Counter(rows[i]["outcome"] for rows in outcomes if rows) for i in range(2)]
    assert told[0]["earlier_round"] == 0
    assert told[0]["later_round"] > told[1]["later_round"] > 0
    assert told[1]["earlier_round"] > 0
    for rows in outcomes:  # whose turn was earlier was looked at then, and whose turn came later was looked at now
        if rows and rows[1]["outcome"] == "earlier_round":
            assert rows[0]["outcome"] in ("selected", "not_selected")
        if rows and rows[1]["outcome"] in ("selected", "not_selected"):
            assert rows[0]["outcome"] == "later_round"


def held_super_batches(manifest: Manifest) -> int:
    """Of an epoch."""
    window = manifest.tallies[2]
    return (window.kept + window.dropped["earlier_round"] + window.dropped["later_round"]) // B


def test_a_round_of_several_windows_is_the_same_after_a_kill_and_by_another_cut(
    world: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool as one round, window after window."""
    (manifest,) = rounds(world, embedded, tmp_path / "root", 1, window_rows=192)
    assert manifest.lineage["windows"]["of"] == 2
    assert manifest.sub_batches == held_super_batches(manifest)
    store = Store(str(tmp_path / "root"))
    pool = load_pool(store, manifest.lineage["pool"]["fingerprint"])
    assert pool.rows == ROWS
    # Files end where windows end.
    assert [file.first_sub_batch for file in manifest.files] == sorted(f.first_sub_batch for f in manifest.files)
    assert sum(file.sub_batches for file in manifest.files) == manifest.sub_batches

    import curate.pipelines.select
    import curate.pipelines.write

    monkeypatch.setattr(curate.pipelines.select, "GROUP_BYTES", 4096)
    monkeypatch.setattr(curate.pipelines.write, "GROUP_BYTES", 100_000)
    monkeypatch.setattr(curate.pipelines.write, "BLOCK_ROWS", 20)
    whole = curate.pipelines.write._write_file

    def killed(item: Any, writing: Any) -> None:
        if writing.first:
            raise KeyboardInterrupt
        whole(item, writing)

    with monkeypatch.context() as inner:
        inner.setattr(curate.pipelines.write, "_write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            rounds(world, embedded, tmp_path / "other", 1, window_rows=192)
    rounds(world, embedded, tmp_path / "other", 1, window_rows=192)
    names = ["rounds/r000000/manifest.json", *(f"rounds/r000000/{file.name}" for file in manifest.files)]
    for name in names:
        assert (tmp_path / "root" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
