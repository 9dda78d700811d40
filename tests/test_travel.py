"""Embeddings out of one root and into another: the same round without a forward pass, and nothing else's vectors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from curate.errors import DamagedError, UserError
from curate.jobs.travel import export_all, import_all
from curate.pipelines.round import run_round
from curate.recipe import EncoderSection
from curate.storage import Store
from tests.helpers import write_tiny
from tests.small_round import published
from tests.stand_in import without_ray
from tests.test_wanted import recipe, run, world

__all__ = ["without_ray", "world"]

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture
def exported(world: Path, tmp_path: Path) -> Path:
    run(world, tmp_path / "first")
    (line,) = export_all(str(tmp_path / "first"), str(tmp_path / "export"))
    assert line.startswith(f"{tmp_path}/export: embeddings of 2 shards")
    return tmp_path / "export"


def elsewhere(world: Path, tmp_path: Path) -> Path:
    """The same pool in another folder, its files of another date."""
    shutil.copytree(world / "parquet", tmp_path / "moved/pool", copy_function=shutil.copyfile)
    return tmp_path / "moved/pool"


def test_a_round_with_imported_embeddings_is_the_same(
    world: Path, tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(world, tmp_path / "second", path=str(elsewhere(world, tmp_path)))
    made = made.model_copy(update={"selection": made.selection.model_copy(update={"criterion": "easy_reference"})})
    lines = list(import_all(made, world, str(exported)))
    assert lines == [f"{tmp_path}/second: embeddings of 2 shards of 2 are in place"]
    assert list(import_all(made, world, str(exported))) == lines  # once more changes nothing
    again = made.model_copy(update={"root": str(tmp_path / "third")})
    run_round(again, base=world, number=0, say=lambda line: None)

    def never(*_: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr("curate.pipelines.embed.EmbedShards.__call__", never)
    run_round(made, base=world, number=0, say=lambda line: None)
    assert published(made.root) == published(again.root)


def test_another_reference_is_refused(world: Path, tmp_path: Path, exported: Path) -> None:
    write_tiny(tmp_path, "other.json", embed_dim=24)
    made = recipe(world, tmp_path / "second", path=str(elsewhere(world, tmp_path)))
    made = made.model_copy(update={"reference": EncoderSection(model=str(tmp_path / "other.json"))})
    with pytest.raises(UserError, match=r"expected embeddings by the recipe's reference, found others \(model"):
        list(import_all(made, world, str(exported)))


def test_other_columns_are_refused(world: Path, tmp_path: Path, exported: Path) -> None:
    made = recipe(world, tmp_path / "second", path=str(elsewhere(world, tmp_path)), where="width > 1")
    with pytest.raises(UserError, match=r"expected columns .*where.*, as the recipe has them, found"):
        list(import_all(made, world, str(exported)))


def test_other_pictures_of_the_same_name_and_size_are_refused(world: Path, tmp_path: Path, exported: Path) -> None:
    pool = elsewhere(world, tmp_path)
    first, second = sorted(pool.iterdir())
    data = bytearray(first.read_bytes())
    at = data.index(b"\xff\xd8\xff")
    data[at + 300 : at + 320] = b"0" * 20
    first.write_bytes(data)
    made = recipe(world, tmp_path / "second", path=str(pool))
    with pytest.raises(UserError, match=r"is not the pair that was embedded|damaged"):
        list(import_all(made, world, str(exported)))
    second.unlink()
    shutil.copyfile(world / "parquet" / first.name, first)
    assert list(import_all(made, world, str(exported))) == [
        f"{tmp_path}/second: embeddings of 1 shard of 1 are in place"
    ]


def test_shards_that_the_export_has_not_are_left_to_the_round(world: Path, tmp_path: Path, exported: Path) -> None:
    pool = elsewhere(world, tmp_path)
    shutil.copyfile(world / "parquet/00000.parquet", pool / "extra.parquet")
    made = recipe(world, tmp_path / "second", path=str(pool))
    lines = list(import_all(made, world, str(exported)))
    assert lines[1] == "1 shard of other names or sizes: the next round embeds these"


def test_a_damaged_export_is_told(world: Path, tmp_path: Path, exported: Path) -> None:
    path = min(exported.rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[100:200] = b"\xff" * 100
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        list(import_all(recipe(world, tmp_path / "second", path=str(elsewhere(world, tmp_path))), world, str(exported)))
    (exported / "embeddings.json").unlink()
    with pytest.raises(UserError, match=r"export: expected embeddings\.json of .*; found none of them"):
        list(import_all(recipe(world, tmp_path / "second", path=str(world / "parquet")), world, str(exported)))


def test_the_verb(world: Path, tmp_path: Path, exported: Path) -> None:
    from curate.jobs.cli import app

    found = CliRunner().invoke(app, ["embeddings", "export", str(tmp_path / "first"), str(tmp_path / "again")])
    assert found.exit_code == 0, found.output
    assert Store(str(tmp_path / "again")).exists("embeddings.json")
