"""Search: the nearest pairs of the pool, as a plain product over all of it finds them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from curate.embed.files import embedding_name, read_embeddings, vectors
from curate.errors import UserError
from curate.jobs.cli import app
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds import search as searching
from curate.rounds.search import Near, Searched, open_pool
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

ROWS, SHARDS = 160, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "model.json")
    draw_pool(folder / "pool", rows=ROWS, shards=SHARDS, seed=0, image_size=32, broken_share=0.05, duplicate_share=0.1)
    recipe = Recipe.model_validate(
        {
            "root": str(folder / "root"),
            "pool": {"path": str(folder / "pool"), "uid": "key"},
            "reference": {"model": "model.json"},
            "learner": {"model": "model.json"},
            "selection": {"sub_batch_size": 16, "filter_ratio": 0.75},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run_round(recipe, base=folder)
    return folder / "root"


def by_one_product(searched: Searched, query: torch.Tensor, tower: str) -> list[Near]:
    found = []
    for shard in searched.pool.shards:
        table = read_embeddings(searched.store, embedding_name(searched.reference.sha, shard), ["uid", tower])
        z = vectors(table[tower], searched.reference.embed_dim).astype(np.float32)
        cosines = z @ query.numpy()
        found += [
            Near(cosine=float(cosines[i]), uid=table["uid"][i].as_py(), shard=shard.index, row=i)
            for i in range(len(z))
            if np.isfinite(z[i]).all()
        ]
    return sorted(found, key=lambda near: (-near.cosine, near.shard, near.row))


@pytest.mark.parametrize("tower", ["zimg", "ztxt"])
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("block", [7, 65_536])
def test_the_nearest_are_those_of_one_product(
    root: Path, monkeypatch: pytest.MonkeyPatch, tower: str, k: int, block: int
) -> None:
    monkeypatch.setattr(searching, "BLOCK_ROWS", block)
    searched = open_pool(Store(str(root)))
    query = normalize(torch.randn(searched.reference.embed_dim, generator=torch.Generator().manual_seed(k)), dim=0)
    expected = by_one_product(searched, query, tower)
    assert len(expected) < ROWS  # broken rows are nowhere near
    found = searched.nearest(query, tower=tower, k=k)
    assert [near.cosine for near in found] == pytest.approx([near.cosine for near in expected[:k]], abs=1e-6)
    # Where cosines of two products differ by rounding alone, either may be first.
    gaps = np.abs(np.subtract.outer(*[[near.cosine for near in expected]] * 2)) + np.eye(len(expected))
    apart = np.flatnonzero(gaps.min(1)[:k] > 1e-5).tolist()
    assert apart
    places = [[(near.uid, near.shard, near.row) for near in some] for some in (found, expected)]
    assert [places[0][i] for i in apart] == [places[1][i] for i in apart]


def test_of_equal_pairs_the_first_in_the_pool_come_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.ones(4, 8, dtype=torch.float16).numpy() / 8**0.5
    monkeypatch.setattr(searching, "vectors", lambda column, width: np.tile(same, (len(column), 1))[: len(column)])
    searched = open_pool(Store(str(root)))
    found = searched.nearest(torch.ones(8) / 8**0.5, tower="zimg", k=ROWS // SHARDS + 5)
    rows = [(0, row) for row in range(ROWS // SHARDS)] + [(1, row) for row in range(5)]
    assert [(near.shard, near.row) for near in found] == rows


def test_a_pool_that_changed_since_its_round_is_told(root: Path, tmp_path: Path) -> None:
    world = tmp_path / "world"
    shutil.copytree(root.parent, world)
    moved = root.parent / "pool"
    hidden = moved.rename(moved.with_name("hidden"))
    try:
        with pytest.raises(UserError, match="search: expected the pool of round 0, found that shards were changed or"):
            app(["search", str(world / "root"), "words"], standalone_mode=False)
    finally:
        hidden.rename(moved)


def test_a_pair_finds_itself_by_picture_by_caption_and_by_uid(root: Path) -> None:
    searched = open_pool(Store(str(root)))
    pool = pq.read_table(root.parent / "pool").to_pylist()
    wanted = next(row for row in pool[20:] if row["caption"] and row["duplicate_of"] is None)
    by_picture = searched.nearest(searched.embed_picture(wanted["jpg"], "it"), tower="zimg", k=3)
    by_words = searched.nearest(searched.embed_words(wanted["caption"]), tower="ztxt", k=8)
    by_uid = searched.nearest(searched.embedding_of(wanted["key"], "zimg"), tower="zimg", k=3)
    for near in (by_picture, by_words, by_uid):
        assert near[0].cosine == pytest.approx(1.0, abs=2e-3)
        assert wanted["key"] in {one.uid for one in near if one.cosine > 0.998}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    app(["search", *arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_verb_shows_pairs_and_writes_a_sheet(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(said(capsys, str(root), "a red circle", "-k", "5", "--json"))
    assert [set(one) for one in found] == [{"cosine", "uid", "shard", "row", "caption"}] * 5
    assert sorted((one["cosine"] for one in found), reverse=True) == [one["cosine"] for one in found]
    sheet = tmp_path / "near.html"
    table = said(capsys, str(root), "--uid", found[0]["uid"], "--captions", "--sheet", str(sheet))
    assert found[0]["caption"].split()[0] in table
    page = sheet.read_text()
    assert page.count("<img ") == 10
    assert 'src="data:image/jpeg;base64,' in page
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(pq.read_table(root.parent / "pool")["jpg"][30].as_py())
    assert json.loads(said(capsys, str(root), "--image", str(picture), "-k", "1", "--json"))[0]["cosine"] > 0.998


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], 'search: expected one of "words", --image FILE and --uid U, found none or several; give one'),
        (["words", "--uid", "1"], 'search: expected one of "words", --image FILE and --uid U, found none or several'),
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: expected a picture, found none (No such file or directory)"),
        (["--uid", "nobody"], "uid nobody: none of the 160 rows of the pool has it"),
        (["  "], "'  ': expected words, found caption_empty; write some"),
        (["words", "--sheet", "no/where.html"], "--sheet no/where.html: expected it in a folder"),
    ],
)
def test_what_cannot_be_looked_for_is_told(root: Path, arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as mistake:
        app(["search", str(root), *arguments], standalone_mode=False)
    assert str(mistake.value).startswith(line)


def test_pictures_that_do_not_decode_and_roots_without_rounds_are_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"words.jpg: expected a picture, found image_undecodable"):
        app(["search", str(root), "--image", str(tmp_path / "words.jpg")], standalone_mode=False)
    with pytest.raises(UserError, match="expected a committed round, found none; run curate round first"):
        app(["search", str(tmp_path), "words"], standalone_mode=False)


def test_a_pair_that_was_left_out_has_no_embedding(root: Path) -> None:
    searched = open_pool(Store(str(root)))
    for shard in searched.pool.shards:
        table = read_embeddings(searched.store, embedding_name(searched.reference.sha, shard), ["uid", "status"])
        for row in table.to_pylist():
            if row["status"] != "ok":
                with pytest.raises(UserError, match=f"uid {row['uid']}: {row['status']}, so that it has no embedding"):
                    searched.embedding_of(row["uid"], "zimg")
                return
    pytest.fail("all rows are sound")
