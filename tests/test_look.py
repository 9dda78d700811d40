"""What is looked at of a round: nothing that it did not do, and, where all of it is looked at, all that it did."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import normalize

from curate.dedup.files import read_dropped
from curate.embed.files import embedding_name, read_embeddings
from curate.errors import UserError
from curate.jest import Embeddings, diagonal_losses, sub_batch_loss
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds import look as looking
from curate.rounds.committed import Committed, newest_round, open_rounds
from curate.rounds.look import Look, look_at, pair_losses
from curate.select.files import read_selected, selected_name
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

ROWS, SHARDS = 320, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    drawn: dict[str, Any] = {"image_size": 32, "broken_share": 0.05, "duplicate_share": 0.1}
    draw_pool(folder / "pool", rows=ROWS, shards=SHARDS, seed=0, **drawn)
    return folder


def committed(world: Path, root: Path, **selection: Any) -> Committed:
    fields = {
        "root": str(root),
        "pool": {"path": str(world / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "dedup": {"threshold": 0.9999},
        "selection": {
            "sub_batch_size": 8,
            "n_chunks": 4,
            "filter_ratio": 0.75,
            "criterion": "learnability",
            "super_batches": 5,
        }
        | selection,
    }
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run_round(Recipe.model_validate(fields), base=world)
    store = Store(str(root))
    return open_rounds(store, [newest_round(store)])[0]


@pytest.fixture(scope="module")
def joint(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Committed:
    return committed(world, tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def look(joint: Committed) -> Look:
    return look_at(joint)


def selected(found: Committed) -> pa.Table:
    """What the round selected, as its steps left it."""
    numbers = range(found.manifest.sub_batches)
    return pa.concat_tables([read_selected(found.store, selected_name(found.steps, i))[0] for i in numbers])


def places(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True))


def test_of_a_small_round_everything_is_looked_at(joint: Committed, look: Look) -> None:
    table = look.candidates
    B = joint.super_batch_size
    assert (look.sub_batches, look.rows, look.read) == (5, ROWS, tuple(range(SHARDS)))
    assert np.bincount(table["sub_batch"].to_numpy()).tolist() == [B] * 5
    assert len(set(places(table))) == 5 * B


def test_chosen_are_those_that_were_chosen_with_what_was_known_at_the_pick(joint: Committed, look: Look) -> None:
    expected = dict(zip(places(selected(joint)), selected(joint).to_pylist(), strict=True))
    chosen = look.candidates.filter(look.candidates["chosen"])
    assert set(places(chosen)) == set(expected)
    for row in chosen.to_pylist():
        was = expected[row["shard"], row["row"]]
        for name in ("sub_batch", "position", "chunk", "score"):
            assert row[name] == was[name]
        for name in ("learner_loss", "reference_loss"):
            assert row[name] == pytest.approx(was[name], abs=1e-5)
    left = look.candidates.filter(pa.compute.invert(look.candidates["chosen"]))
    assert left["position"].null_count == len(left)


def test_uids_and_sizes_are_those_of_the_rows(joint: Committed, look: Look) -> None:
    for shard in joint.pool.shards:
        facts = read_embeddings(joint.store, embedding_name(joint.reference.sha, shard), ["uid", "width", "height"])
        for row in look.candidates.filter(pa.compute.field("shard") == shard.index).to_pylist():
            assert facts.slice(row["row"], 1).to_pylist() == [{name: row[name] for name in facts.column_names}]


def test_the_other_method_is_an_independent_round(world: Path, tmp_path: Path, look: Look) -> None:
    alone = committed(world, tmp_path / "alone", method="independent")
    table = look.candidates
    assert set(places(table.filter(table["independent"]))) == set(places(selected(alone)))
    assert set(places(table.filter(table["independent"]))) != set(places(table.filter(table["chosen"])))


def test_unusable_rows_and_duplicates_are_all_there_each_once(joint: Committed, look: Look) -> None:
    bad, dropped = {}, set()
    for shard in joint.pool.shards:
        facts = read_embeddings(joint.store, embedding_name(joint.reference.sha, shard), ["status", "error"])
        for row, fact in enumerate(facts.to_pylist()):
            if fact["status"] != "ok":
                bad[shard.index, row] = (fact["status"], fact["error"])
        assert joint.index.dedup is not None
        rows = read_dropped(joint.store, joint.index.dedup, shard)["row"].to_pylist()
        dropped |= {(shard.index, row) for row in rows}
    assert {(one.shard, one.row): (one.reason, one.error) for one in look.unusable} == bad
    assert len(bad) > 5
    repeats = [(one.shard, one.row) for group in look.groups for one in group.repeats]
    assert len(repeats) == len(set(repeats))
    assert set(repeats) == dropped
    assert len(dropped) > 5
    assert not {(group.shard, group.row) for group in look.groups} & dropped
    sizes = [len(group.repeats) for group in look.groups]
    assert sizes == sorted(sizes, reverse=True)


def test_of_a_large_round_a_part_is_looked_at(joint: Committed, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "MOST_ROWS", ROWS // SHARDS)
    monkeypatch.setattr(looking, "MOST_SUB_BATCHES", 2)
    some = look_at(joint)
    assert (some.sub_batches, len(some.read)) == (2, 1)
    assert 0 < len(some.candidates) < 2 * joint.super_batch_size
    known = dict(zip(places(look.candidates), look.candidates.to_pylist(), strict=True))
    for row in some.candidates.drop_columns(["independent"]).to_pylist():
        assert row == {name: known[row["shard"], row["row"]][name] for name in row}
    monkeypatch.setattr(looking, "MOST_CANDIDATES", 5)
    assert (look_at(joint).sub_batches, len(look_at(joint).candidates)) == (1, 5)


def test_without_the_learners_embeddings_its_loss_is_known_of_the_chosen(world: Path, tmp_path: Path) -> None:
    found = committed(world, tmp_path / "root")
    assert found.learner is not None
    for folder in found.store.list(f"embeddings/{found.learner.sha}"):
        for name in found.store.list(folder) or [folder]:
            found.store.delete(name)
    table = look_at(found).candidates
    known = pa.compute.is_valid(table["learner_loss"])
    assert known.to_pylist() == table["chosen"].to_pylist()
    assert table["independent"].null_count == len(table)


def test_what_is_gone_is_named(world: Path, tmp_path: Path) -> None:
    found = committed(world, tmp_path / "root")
    found.store.delete(selected_name(found.steps, 0))
    with pytest.raises(UserError, match=r"selected-000000.parquet: expected what the round selected, found nothing"):
        look_at(found)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_pair_losses_are_those_of_the_product(loss: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    zimg, ztxt = (normalize(torch.randn(9, 4, generator=draw), dim=1) for _ in range(2))
    model = Embeddings(zimg, ztxt, logit_scale=7.0, logit_bias=-3.0)
    found = pair_losses(model, loss)
    if loss == "sigmoid":
        assert found.diagonal().tolist() == pytest.approx(diagonal_losses(model, loss).tolist(), abs=1e-5)
        assert float(found.sum()) / 9 == pytest.approx(sub_batch_loss(model, torch.arange(9), loss=loss), abs=1e-5)
        return
    for i, j in ((0, 1), (4, 7)):
        two = torch.tensor([float(7 * zimg[i] @ ztxt[i]), float(7 * zimg[i] @ ztxt[j])])
        assert float(found[i, j]) == pytest.approx(float(-torch.log_softmax(two, 0)[0]), abs=1e-5)
    assert found.diagonal().tolist() == [0.0] * 9


def test_matrices_are_of_one_super_batch_chosen_rows_in_the_order_drawn(look: Look) -> None:
    assert look.before is not None
    assert look.after is not None
    before, after = (look.candidates.take(pa.array(one.rows)) for one in (look.before, look.after))
    assert len(set(before["sub_batch"].to_pylist() + after["sub_batch"].to_pylist())) == 1
    assert after["position"].to_pylist() == list(range(8))
    assert look.after.learner is not None
    assert look.after.learner.diagonal().tolist() == pytest.approx(after["learner_loss"].to_pylist(), abs=1e-5)
    assert look.after.reference.diagonal().tolist() == pytest.approx(after["reference_loss"].to_pylist(), abs=1e-5)
