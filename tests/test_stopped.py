"""Rounds that stop because too much of the pool would be lost: which step took it is said, and the way out works."""

from pathlib import Path
from typing import Any

import pytest

from curate.errors import UserError
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder)
    draw_pool(folder / "pool", rows=100, shards=1, seed=0, image_size=32, broken_share=0.08, duplicate_share=0.05)
    return folder


def recipe(world: Path, root: Path, *, pool: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    fields: dict[str, Any] = {
        "root": str(root),
        "pool": {"path": str(world / "pool")} | (pool or {}),
        "reference": {"model": "tiny.json"},
        "learner": {"model": "tiny.json"},
        "selection": {"sub_batch_size": 4, "n_chunks": 2, "filter_ratio": 0.5},
    }
    return Recipe.model_validate(fields | sections)


def stopped(made: Recipe, world: Path) -> str:
    with pytest.raises(UserError) as caught:
        run_round(made, base=world)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_reference_to_which_all_pictures_look_alike(world: Path, tmp_path: Path) -> None:
    weak = {"threshold": 0.5}  # a model with random weights
    line = stopped(recipe(world, tmp_path / "root", dedup=weak), world)
    assert line.startswith("dedup: ")
    assert "usable rows would leave as near-duplicates" in line
    assert "dedup.max_dropped_share = 0.5" in line
    raised = recipe(world, tmp_path / "root", dedup=weak | {"max_dropped_share": 1.0})
    # Raised, as the line says: the round goes on from where it stopped, and what is left is too little.
    assert "near_duplicate" in stopped(raised, world)


def test_rows_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    line = stopped(recipe(world, tmp_path / "root", pool={"max_dropped_share": 0.05}), world)
    assert line.startswith("pool: 8 of 100 rows cannot be used (")
    assert run_round(recipe(world, tmp_path / "root"), base=world).round == 0


def test_a_pool_that_is_too_small_says_who_took_its_rows(world: Path, tmp_path: Path) -> None:
    large = {"sub_batch_size": 60, "n_chunks": 2, "filter_ratio": 0.5}
    line = stopped(recipe(world, tmp_path / "root", selection=large), world)
    assert "the pool holds 87 distinct usable pairs of 100 rows (the others: " in line
    assert "duplicate_exact 5" in line
    assert "image_truncated 2" in line
