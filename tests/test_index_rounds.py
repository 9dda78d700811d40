"""Rounds that hold no pictures: the same batches, from the pool, in a fraction of the bytes."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curate import CuratedReader
from curate.errors import UserError
from curate.pipelines.round import run_round
from curate.recipe import OutputSection, Recipe
from curate.rounds.manifest import Manifest, read_manifest
from curate.storage import Store
from tests.stand_in import without_ray
from tests.test_export import export, members
from tests.test_wanted import recipe, world

__all__ = ["without_ray", "world"]

pytestmark = pytest.mark.usefixtures("without_ray")


def made(world: Path, root: Path, form: str, mode: str, **pool: Any) -> Recipe:
    return recipe(world, root, form, **pool).model_copy(update={"output": OutputSection(mode=mode)})


def run(world: Path, root: Path, form: str, mode: str, **pool: Any) -> Manifest:
    run_round(made(world, root, form, mode, **pool), base=world, number=0, say=lambda line: None)
    found = read_manifest(Store(str(root)), 0)
    assert found is not None
    return found[0]


@pytest.mark.parametrize(
    "form", ["tar", *(pytest.param(form, marks=pytest.mark.exhaustive) for form in ("parquet", "paths"))]
)
def test_the_reader_fetches_pictures_from_the_pool(world: Path, tmp_path: Path, form: str) -> None:
    whole = run(world, tmp_path / "copy", form, "copy")
    index = run(world, tmp_path / "index", form, "index")
    assert sum(file.size for file in index.files) < 0.8 * sum(file.size for file in whole.files)
    image = str(whole.columns["image"])
    for file in index.files:
        assert image not in pq.read_schema(tmp_path / "index/rounds/r000000" / file.name).names
    for ranks in (1, 2):
        for rank in range(ranks):
            how = {"rank": rank, "world_size": ranks}
            pairs = zip(
                CuratedReader(str(tmp_path / "copy"), **how),
                CuratedReader(str(tmp_path / "index"), **how, workers=ranks - 1),
                strict=True,
            )
            for a, b in pairs:
                assert (a.uids, a.texts) == (b.uids, b.texts)
                assert [one.tobytes() for one in a.images] == [one.tobytes() for one in b.images]
    for root in ("copy", "index"):
        export(tmp_path / root, "--to", "webdataset", tmp_path / f"{root}-tars")
    for path in (tmp_path / "copy-tars").glob("*.tar"):
        found, other = members(path), members(tmp_path / "index-tars" / path.name)
        assert found.keys() == other.keys()
        assert all(other[name] == data for name, data in found.items() if not name.endswith(".json"))


def test_the_mode_is_of_a_round_and_may_change(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "root", "tar", "index")
    run_round(made(world, tmp_path / "root", "tar", "copy"), base=world, number=1, say=lambda line: None)
    assert [len(batch.uids) for batch in CuratedReader(str(tmp_path / "root"))] == [4] * 4
    fields = made(world, tmp_path / "root", "tar", "copy").of_round()["output"]
    assert "mode" not in fields, "rounds that were begun before there was a choice"


def test_a_pool_that_changed_is_one_line(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "tar", tmp_path / "pool")
    run(world, tmp_path / "root", "tar", "index", path=str(tmp_path / "pool"))
    for path in (tmp_path / "pool").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"\.tar: expected the file that the round was chosen from"):
        list(CuratedReader(str(tmp_path / "root")))


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_picture_that_changed_is_one_line(world: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(world / "paths", tmp_path / "pool")
    run(world, tmp_path / "root", "paths", "index", path=str(tmp_path / "pool"))
    pictures = sorted((tmp_path / "pool").glob("*.jpg"))
    other = pictures[0].read_bytes()
    for path in pictures:
        if what == "gone":
            path.unlink()
        else:
            path.write_bytes(other)
    found = "none" if what == "gone" else "another one"
    with pytest.raises(
        UserError, match=rf"expected the picture that the round was chosen with, found {found}; restore"
    ):
        list(CuratedReader(str(tmp_path / "root")))
