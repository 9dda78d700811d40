"""Rounds over pools in every format, and over the rows that a recipe wants: each row accounted for, the same choice."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embed.files import embedding_name, read_embeddings
from curate.errors import InputChangedError, UserError
from curate.jobs.check import check_recipe
from curate.jobs.drawn_pool import draw_pool
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.pool.shards import load_pool
from curate.pool.wanted import FILTERED, HALVES, Kept, fulfils, halves_of
from curate.recipe import Recipe
from curate.recipe_file import load_recipe
from curate.rounds.manifest import Manifest, read_manifest
from curate.rounds.plan import pin_plan
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")

FORMATS = ["parquet", "tar", "tar beside parquet", "arrow", "paths"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and one pool of two shards in every format."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "parquet", rows=96, shards=2, seed=0, image_size=32, broken_share=0.04, duplicate_share=0.1)
    for path in sorted((folder / "parquet").iterdir()):
        table = pq.read_table(path)
        for name in FORMATS[1:]:
            (folder / name).mkdir(exist_ok=True)
            write_as(name, table, folder / name / path.stem)
    return folder


def write_as(form: str, table: pa.Table, path: Path) -> None:
    match form:
        case "tar":
            members = [
                (f"{row['key']}.{suffix}", data)
                for row in table.to_pylist()
                for suffix, data in (
                    ("jpg", row["jpg"]),
                    ("txt", None if row["caption"] is None else row["caption"].encode()),
                    ("json", json.dumps({name: row[name] for name in ("key", "swapped", "width")}).encode()),
                )
                if data is not None
            ]
            write_tar(path.with_suffix(".tar"), members)
        case "tar beside parquet":
            members = [(f"{row['key']}.jpg", row["jpg"]) for row in table.to_pylist() if row["jpg"] is not None]
            write_tar(path.with_suffix(".tar"), members)
            pq.write_table(table.drop_columns(["jpg"]), path.with_suffix(".parquet"))
        case "arrow":
            with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as writer:
                writer.write_table(table, max_chunksize=10)
        case "paths":
            names = []
            for row in table.to_pylist():
                names.append(None if row["jpg"] is None else f"{row['key']}.jpg")
                if row["jpg"] is not None:
                    (path.parent / names[-1]).write_bytes(row["jpg"])
            made = table.set_column(table.schema.get_field_index("jpg"), "file_name", pa.array(names, pa.string()))
            pq.write_table(made, path.with_suffix(".parquet"))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def recipe(world: Path, root: Path, form: str = "parquet", **pool: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "root": str(root),
            "pool": {"path": str(world / form), "uid": "key"} | pool,
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            "selection": {
                "sub_batch_size": 4,
                "n_chunks": 2,
                "filter_ratio": 0.75,
                "super_batches": 2,
                "criterion": "learnability",
            },
        }
    )


def run(world: Path, root: Path, form: str = "parquet", **pool: Any) -> Manifest:
    run_round(recipe(world, root, form, **pool), base=world, number=0, say=lambda line: None)
    found = read_manifest(Store(str(root)), 0)
    assert found is not None
    return found[0]


def chosen(root: Path, manifest: Manifest) -> pa.Table:
    return pa.concat_tables([pq.read_table(root / "rounds/r000000" / file.name) for file in manifest.files])


@pytest.mark.parametrize(
    "form",
    ["tar beside parquet", "paths", *(pytest.param(form, marks=pytest.mark.exhaustive) for form in ("tar", "arrow"))],
)
def test_a_round_is_the_same_in_every_format(world: Path, tmp_path: Path, form: str) -> None:
    before = run(world, tmp_path / "parquet")
    found = run(world, tmp_path / form, form)
    assert [tally.to_json() for tally in found.tallies] == [tally.to_json() for tally in before.tallies]
    tables = [chosen(tmp_path / name, manifest) for name, manifest in (("parquet", before), (form, found))]
    image = {"tar": "image", "tar beside parquet": "image", "paths": "file_name_bytes"}.get(form, "jpg")
    caption = "txt" if form == "tar" else "caption"
    # The order of rows within a window follows from contents alone, that of windows from the names of shards.
    assert sorted(tables[0]["jpg"].to_pylist()) == sorted(tables[1][image].to_pylist())
    assert sorted(tables[0]["caption"].to_pylist()) == sorted(tables[1][caption].to_pylist())
    assert sorted(tables[0]["key"].to_pylist()) == sorted(tables[1]["key"].to_pylist())
    assert list(check_recipe(recipe(world, tmp_path / form, form), base=world, measure=False))


def test_rows_that_are_not_wanted_are_filtered(world: Path, tmp_path: Path) -> None:
    pool = pq.read_table(world / "parquet")
    where = "NOT swapped AND caption NOT LIKE '%red%'"
    manifest = run(world, tmp_path / "root", where=where)
    out = sum(row["swapped"] or "red" in (row["caption"] or "") for row in pool.to_pylist())
    assert manifest.tallies[0].dropped[FILTERED] >= out - 3  # a caption that is null is not unlike anything
    found = chosen(tmp_path / "root", manifest)
    assert found.num_rows == 8
    assert not any("red" in caption for caption in found["caption"].to_pylist())
    store = Store(str(tmp_path / "root"))
    shards = load_pool(store, manifest.lineage["pool"]["fingerprint"]).shards
    reference = EncoderSpec(**manifest.lineage["reference"]).sha
    for shard in shards:
        rows = read_embeddings(store, embedding_name(reference, shard), ["uid", "status", "content"]).to_pylist()
        for row, own in zip(rows, pq.read_table(shard.path, columns=["key"])["key"].to_pylist(), strict=True):
            assert row["uid"] == own
            assert (row["content"] == bytes(16)) == (row["status"] == FILTERED)
    red = next(row["key"] for row in pool.to_pylist() if "red" in (row["caption"] or ""))
    assert FILTERED in json.dumps(explain_uid(store, red))


@pytest.mark.parametrize(
    ("kind", "uid"), [("texts", "key"), ("halves", None), pytest.param("halves", "key", marks=pytest.mark.exhaustive)]
)
def test_a_list_of_uids_keeps_a_subset(world: Path, tmp_path: Path, kind: str, uid: str | None) -> None:
    pool = pq.read_table(world / "parquet")
    shutil.copytree(world / "parquet", tmp_path / "pool")
    if uid is None:
        whole = run(world, tmp_path / "whole", uid=None)
        store = Store(str(tmp_path / "whole"))
        shards = load_pool(store, whole.lineage["pool"]["fingerprint"]).shards
        sha = EncoderSpec(**whole.lineage["reference"]).sha
        tables = [read_embeddings(store, embedding_name(sha, shard), ["uid"]) for shard in shards]
        uids = [one for table in tables for one in table["uid"].to_pylist()]
    else:
        uids = [f"{row:032x}" for row in range(pool.num_rows)]
        at = 0
        for path in sorted((tmp_path / "pool").iterdir()):
            table = pq.read_table(path)
            own = uids[at : at + len(table)]
            at += len(table)
            pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", pa.array(own)), path)
    kept = uids[::2]
    array = np.array([halves_of(one) for one in kept], HALVES) if kind == "halves" else np.array(kept)
    np.save(tmp_path / "subset.npy", np.sort(array))
    manifest = run(world, tmp_path / "root", uid=uid, path=str(tmp_path / "pool"), keep=str(tmp_path / "subset.npy"))
    assert manifest.tallies[0].dropped[FILTERED] == sum(one not in set(kept) for one in uids)
    found = chosen(tmp_path / "root", manifest)["curate"].combine_chunks().field("uid").to_pylist()
    assert set(found) <= set(kept)
    # The same subset elsewhere changes nothing; another one is another pool.
    np.save(tmp_path / "again.npy", np.sort(array))
    again = recipe(world, tmp_path / "root", uid=uid, path=str(tmp_path / "pool"), keep=str(tmp_path / "again.npy"))
    run_round(again, base=world, number=1, say=lambda line: None)
    folder = tmp_path / "root/embeddings" / EncoderSpec(**manifest.lineage["reference"]).sha
    assert len(list(folder.glob("*.parquet"))) == 2


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("width >", "found that Parser Error"),
        ("random() < 0.5", "expected a condition on columns of the pool, .*, found none of them in it"),
        ("width > 3 OR nothing > 3", "expected a condition in SQL on the columns"),
        ("count(width) > 3", "found one on all of them together"),
        ("key IN (SELECT key FROM read_parquet('/x'))", "expected a condition in SQL"),
        ("caption", "Conversion Error"),
        ("random() < 0.5 AND width > 0", "found random"),
        ("row_number() OVER (PARTITION BY caption) = 1", "found window"),
        ("width > (SELECT avg(width) FROM pool)", "found subquery"),
    ],
)
def test_a_condition_that_means_nothing_is_one_line(world: Path, tmp_path: Path, where: str, found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        run(world, tmp_path / "root", where=where)
    assert all(line.startswith(f"pool.where = {where!r}: ") for line in caught.value.lines)


def test_a_pool_of_which_nothing_is_wanted(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pool: none of its 96 rows is wanted by pool.where = 'width > 99999'"):
        run(world, tmp_path / "root", where="width > 99999")


@pytest.mark.parametrize("what", ["absent", "junk", "two axes", "floats"])
def test_a_list_that_is_none_is_one_line(world: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "subset.npy"
    match what:
        case "junk":
            path.write_bytes(b"x" * 99)
        case "two axes":
            np.save(path, np.zeros((2, 2), np.int64))
        case "floats":
            np.save(path, np.zeros(3))
    with pytest.raises(UserError, match=rf"pool.keep = '{path}': expected (a NumPy file|an array) of uids"):
        run(world, tmp_path / "root", keep=str(path))


def test_conditions_on_nulls_and_on_shards_without_the_column() -> None:
    batch = pa.RecordBatch.from_pydict({"width": [100, None, 300], "tag": pa.nulls(3)})
    assert fulfils("width >= 200", batch).tolist() == [False, False, True]
    assert fulfils("tag = 'x' OR width < 200", batch).tolist() == [True, False, False]
    assert fulfils("width >= 200 -- as DataComp", batch).tolist() == [False, False, True]


@pytest.mark.parametrize("listed", [np.array([3, -1, 7]), np.array(["3", "-1", "7"])])
def test_uids_of_any_kind_are_found(listed: Any) -> None:
    kept = Kept(listed)
    assert kept(["3", "-1", "8", None, "x", ""]).tolist() == [True, True, False, False, False, False]
    assert not Kept(listed[:0])(["3", ""]).any()


def test_uids_of_another_kind_are_in_no_list() -> None:
    assert Kept(np.array(["00001", "00002"]))(["000010", "00001", "x"]).tolist() == [False, True, False]
    assert Kept(np.array([0, 2]))(["abc", "", "2", "9" * 30]).tolist() == [False, False, True, False]
    assert Kept(np.array([1, 2], np.uint8))(["-1", "300", "2"]).tolist() == [False, False, True]
    zero = np.array([(0, 0), (1, 2)], HALVES)
    assert Kept(zero)(["not hexadecimal", "0" * 32, None]).tolist() == [False, True, False]
    uids = [f"{value:032x}" for value in np.random.default_rng(0).integers(0, 2**60, 500).tolist()]
    listed = np.array([halves_of(uid) for uid in uids[::2]], HALVES)
    for order in (listed, np.sort(listed)):
        assert Kept(order)(uids).tolist() == [True, False] * 250


def test_a_list_that_changes_under_a_round_is_told(world: Path, tmp_path: Path) -> None:
    uids = pq.read_table(world / "parquet")["key"].to_pylist()
    np.save(tmp_path / "subset.npy", np.array(uids[::2]))
    made = recipe(world, tmp_path / "root", keep=str(tmp_path / "subset.npy"))
    pin_plan(Store(made.root), made, base=world, number=0)
    np.save(tmp_path / "subset.npy", np.array(uids[1::2]))
    with pytest.raises(InputChangedError, match="the list changed while the round was running"):
        run_round(made, base=world, number=0, say=lambda line: None)


def test_a_recipe_names_a_subset_by_a_path_as_a_shell_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pool = '[pool]\npath = "p"\nkeep = "~/subset.npy"\n'
    text = f'root = "r"\n{pool}[learner]\nmodel = "x"\n[selection]\nsub_batch_size = 16\n'
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path / "recipe.toml").pool.keep == f"{tmp_path}/subset.npy"
