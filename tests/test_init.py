"""`curate init`: the recipe that it writes is one that `check` takes, and says what was found."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.errors import UserError
from curate.jobs.check import check_recipe
from curate.jobs.cli import app
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.init import FILTER_RATIO, batch_for, write_recipe
from curate.recipe_file import load_recipe
from tests.helpers import write_tiny


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "pool"
    draw_pool(folder, rows=1_500, shards=2, seed=0, image_size=32, broken_share=0.01)
    return folder


def test_check_takes_what_init_writes(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    app(["init", str(pool)], standalone_mode=False)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("recipe.toml: a recipe for 1,500 rows in 2 shards; ")
    assert said[1] == "next: look at its [reference], then curate check recipe.toml"
    write_tiny(tmp_path, "tiny.json")
    # All that it cannot know is which models there are.
    recipe = load_recipe("recipe.toml", ["reference={model='tiny.json'}", "learner.model=tiny.json"])
    assert (recipe.pool.path, recipe.pool.image, recipe.pool.uid) == (str(pool), "jpg", "key")
    assert recipe.selection.criterion == "auto"
    # As many super-batches as there is to choose from.
    assert 8 <= 1_500 // recipe.selection.super_batch_size < 16
    told = list(check_recipe(recipe, base=tmp_path, measure=False))
    assert any("probably easy_reference in this round" in line for line in told)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (list(range(200)), "uid"),
        ([str(i) for i in range(200)], "uid"),
        ([i % 7 for i in range(200)], None),
        ([None, *range(199)], None),
        ([float(i) for i in range(200)], None),
    ],
)
def test_a_column_of_ids_is_one_whose_values_differ(
    pool: Path, tmp_path: Path, ids: list[object], found: str | None
) -> None:
    table = pq.read_table(pool / "00000.parquet").slice(0, 200).select(["jpg", "caption"])
    (tmp_path / "ids").mkdir()
    pq.write_table(table.append_column("uid", pa.array(ids)), tmp_path / "ids" / "a.parquet")
    write_recipe(str(tmp_path / "ids"), tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml").pool.uid == found


def test_ids_that_begin_anew_in_each_shard_are_none(pool: Path, tmp_path: Path) -> None:
    table = pq.read_table(pool / "00000.parquet").slice(0, 100).select(["jpg", "caption"])
    (tmp_path / "ids").mkdir()
    for name in ("a", "b"):
        pq.write_table(table.append_column("uid", pa.array(range(100))), tmp_path / "ids" / f"{name}.parquet")
    write_recipe(str(tmp_path / "ids"), tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml").pool.uid is None


def test_names_that_json_would_escape_are_names_in_toml(pool: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'ünï "😀"'
    shutil.copytree(pool, odd)
    write_recipe(str(odd), tmp_path / "recipe.toml", image="jpg", caption="caption")
    assert load_recipe(tmp_path / "recipe.toml").pool.path == str(odd)


@pytest.mark.parametrize(("rows", "b"), [(60, 16), (2_000, 16), (10_000, 64), (100_000_000, 32_768)])
def test_the_batch_leaves_something_to_choose_from(rows: int, b: int) -> None:
    assert batch_for(rows) == b
    assert b in (16, 32_768) or 8 <= rows // round(b / (1 - FILTER_RATIO)) < 16


def test_what_init_does_not_touch_and_what_it_does_not_take(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    with pytest.raises(UserError, match="expected no file, found one; remove it, or name another with --to"):
        write_recipe(str(pool), tmp_path / "recipe.toml")
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    with pytest.raises(UserError, match=r"'': expected a pool, found none \("):
        write_recipe("", tmp_path / "other.toml")
    few = tmp_path / "few"
    few.mkdir()
    pq.write_table(pq.read_table(pool / "00000.parquet").slice(0, 159), few / "a.parquet")
    with pytest.raises(UserError, match="expected 160 rows to choose 16 from, found 159; add some"):
        write_recipe(str(few), tmp_path / "other.toml")
    with pytest.raises(UserError, match="nowhere"):
        write_recipe(str(tmp_path / "nowhere"), tmp_path / "other.toml")
    assert not (tmp_path / "other.toml").exists()
    broken = tmp_path / "broken"
    shutil.copytree(pool, broken)
    table = pq.read_table(broken / "00000.parquet")
    for name in ("00000.parquet", "00001.parquet"):
        pictures = pa.array([b"no picture"] * len(table), pa.binary())
        pq.write_table(table.set_column(table.schema.names.index("jpg"), "jpg", pictures), broken / name)
    with pytest.raises(UserError, match="expected pictures with captions, found that 0 of"):
        write_recipe(str(broken), tmp_path / "other.toml")
