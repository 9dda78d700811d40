"""One sub-batch from one super-batch: a matter of its candidates, the seed and nothing else."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch

from curate.criteria import Criterion, Method
from curate.errors import UserError
from curate.jest import Embeddings, diagonal_losses, jointly_sample_batch, sub_batch_learnability
from curate.recipe import SelectionSection
from curate.seeds import derive_seed
from curate.select.draw import Candidates, Scale, needs_learner, select_sub_batch
from curate.select.files import SELECTED_SCHEMA, SubBatchStats, read_selected, selected_name, write_selected
from curate.select.windows import key_order, keyed_rows
from curate.storage import Store
from tests.helpers import CPU

torch.set_num_threads(1)

SELECTION = SelectionSection(sub_batch_size=32, filter_ratio=0.8, n_chunks=4, criterion="learnability", gain=1.0)
LEARNER, REFERENCE = Scale(logit_scale=10.0, logit_bias=-5.0), Scale(logit_scale=25.0, logit_bias=-8.0)
B, D = 160, 12


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    z = rng.standard_normal(shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float16)


def candidates(count: int = B, *, seed: int = 0, width: int = D, learner_width: int = 8) -> Candidates:
    """Candidates of three shards; the reference knows them better than the learner."""
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 2**64, (count, 2), np.uint64)
    shards = np.sort(rng.integers(0, 3, count))
    rows = np.concatenate(
        [keyed_rows(content[shards == s], s, np.arange((shards == s).sum()), seed=0, epoch=0) for s in range(3)]
    )
    common, other = unit(rng, count, width), unit(rng, count, width)
    ztxt = (0.7 * common + 0.3 * other).astype(np.float32)
    return Candidates(
        rows=rows,
        learner=(unit(rng, count, learner_width), unit(rng, count, learner_width)),
        reference=(common, (ztxt / np.linalg.norm(ztxt, axis=1, keepdims=True)).astype(np.float16)),
    )


def drawn(
    pool: Candidates, selection: SelectionSection = SELECTION, **how: Any
) -> tuple[list[dict[str, Any]], SubBatchStats, pa.Table]:
    how = {"seed": 5, "round_number": 2, "sub_batch": 7, "learner": LEARNER, "reference": REFERENCE} | how
    table, stats = select_sub_batch(pool, selection, device=CPU, **how)
    assert table.schema == SELECTED_SCHEMA
    assert table.num_rows == selection.sub_batch_size
    assert table["position"].to_pylist() == list(range(table.num_rows))
    assert set(table["sub_batch"].to_pylist()) == {how["sub_batch"]}
    return table.to_pylist(), stats, table


def places(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["shard"], row["row"]) for row in rows]


def index_of(pool: Candidates) -> dict[tuple[int, int], int]:
    return {(int(row["shard"]), int(row["row"])): i for i, row in enumerate(pool.rows)}


def embeddings(pair: tuple[np.ndarray, np.ndarray], scale: Scale) -> Embeddings:
    zimg, ztxt = (torch.from_numpy(z).float() for z in pair)
    return Embeddings(zimg, ztxt, scale.logit_scale, scale.logit_bias)


# --- what is drawn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["joint", "independent", "uniform"])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_the_order_of_the_candidates_does_not_matter(method: str, loss: str):
    pool = candidates()
    selection = SELECTION.model_copy(update={"method": method, "loss": loss})
    first, stats, _ = drawn(pool, selection)
    for seed in range(3):
        shuffled = pool.take(np.random.default_rng(seed).permutation(B))
        again, others, _ = drawn(shuffled, selection)
        assert again == first
        assert others == stats
    assert len(set(places(first))) == 32


def test_the_parts_may_come_in_any_order():
    pool = candidates()
    parts = [pool.take(np.flatnonzero(pool.rows["shard"] == s)) for s in range(3)]
    empty = pool.take(np.array([], np.int64))
    assert drawn(Candidates.concatenate([parts[2], empty, parts[0], parts[1]]))[0] == drawn(pool)[0]


def test_seed_round_and_sub_batch_decide_the_draw():
    pool = candidates()
    first = places(drawn(pool)[0])
    for change in ({"seed": 6}, {"round_number": 3}, {"sub_batch": 8}):
        assert places(drawn(pool, **change)[0]) != first
    assert places(drawn(pool)[0]) == first


def test_the_draw_is_that_of_jest_on_the_candidates_in_the_order_of_keys():
    pool = candidates()
    order = key_order(pool.rows)
    assert (np.diff(pool.rows["key"][order].astype(object)) > 0).all()
    ordered = pool.take(order)
    expected = jointly_sample_batch(
        embeddings(ordered.learner, LEARNER),
        embeddings(ordered.reference, REFERENCE),
        sub_batch_size=32,
        n_chunks=4,
        generator=torch.Generator().manual_seed(derive_seed(5, "draw", 2, 7)),
    )
    rows, _, _ = drawn(pool)
    chosen = ordered.rows[expected.positions.numpy()]
    assert places(rows) == [(int(r["shard"]), int(r["row"])) for r in chosen]
    assert [row["chunk"] for row in rows] == expected.chunks.tolist() == [i // 8 for i in range(32)]
    np.testing.assert_allclose([row["score"] for row in rows], expected.scores.numpy(), rtol=1e-6)
    for row in rows:
        own = pool.rows[index_of(pool)[row["shard"], row["row"]]]
        assert (row["content_low"], row["content_high"]) == (int(own["content_low"]), int(own["content_high"]))


def test_the_order_in_which_candidates_come_changes_nothing():
    pool = candidates()
    mixed = pool.take(np.random.default_rng(1).permutation(B))
    assert drawn(mixed)[0] == drawn(pool)[0]


# --- what is recorded --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_recorded_losses_are_those_of_the_pair_alone(loss: str):
    pool = candidates()
    rows, stats, _ = drawn(pool, SELECTION.model_copy(update={"loss": loss}))
    at = [index_of(pool)[place] for place in places(rows)]
    own, ref = embeddings(pool.learner, LEARNER), embeddings(pool.reference, REFERENCE)
    for name, model in (("learner_loss", own), ("reference_loss", ref)):
        expected = diagonal_losses(model, loss)[at]
        np.testing.assert_allclose([row[name] for row in rows], expected.numpy(), rtol=1e-5)
    expected = sub_batch_learnability(own, ref, torch.tensor(at), loss=loss)
    assert stats.learnability == pytest.approx(expected, rel=1e-5)


def test_a_greedy_sub_batch_is_more_learnable_than_a_uniform_one():
    _, stats, _ = drawn(candidates(), SELECTION.model_copy(update={"gain": 100.0}))
    _, uniform, _ = drawn(candidates(), SELECTION.model_copy(update={"method": "uniform"}))
    assert stats.learnability > stats.uniform_learnability + 0.01
    # The yardstick is drawn for itself, and the same whatever the method.
    assert uniform.uniform_learnability == stats.uniform_learnability != uniform.learnability


def test_the_tally_closes():
    _, stats, _ = drawn(candidates())
    assert stats.sub_batch == 7
    assert stats.tally.to_json() == {
        "step": "select",
        "rows_in": 160,
        "kept": 32,
        "dropped": {"not_selected": 128, "embedding_nonfinite": 0},
    }


# --- without a learner -------------------------------------------------------------------------------------------


def test_who_needs_a_learner():
    def needs(criterion: str, method: str) -> bool:
        return needs_learner(SELECTION.model_copy(update={"criterion": criterion, "method": method}))

    found = {(c, m) for c, m in product(get_args(Criterion), get_args(Method)) if needs(c, m)}
    assert len(get_args(Criterion)) * len(get_args(Method)) == 9
    assert found == {(c, m) for c in ("learnability", "hard_learner") for m in ("joint", "independent")}


@pytest.mark.parametrize("change", [{"criterion": "easy_reference"}, {"method": "uniform"}])
def test_a_learner_that_nobody_asks_is_not_needed(change: dict[str, str]):
    selection = SELECTION.model_copy(update=change)
    assert not needs_learner(selection)
    pool = candidates()
    rows, stats, table = drawn(replace(pool, learner=None), selection, learner=None)
    assert stats.learnability is None
    assert stats.uniform_learnability is None
    assert stats.tally.kept == 32
    assert table["learner_loss"].null_count == 32
    assert table["reference_loss"].null_count == 0
    assert places(rows) == places(drawn(pool, selection)[0])  # nor has it a say


def test_hard_learner_looks_at_the_learner_alone():
    pool = candidates()
    selection = SELECTION.model_copy(update={"criterion": "hard_learner"})
    other = replace(pool, reference=pool.reference[::-1])
    assert places(drawn(pool, selection)[0]) == places(drawn(other, selection)[0])


# --- embeddings that are not finite ------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["learnability", "easy_reference", "hard_learner"])
@pytest.mark.parametrize("method", ["joint", "independent", "uniform"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_without_an_embedding_is_never_drawn_and_is_counted(criterion: str, method: str, value: float):
    pool = candidates()
    spoilt = {"learner": np.arange(0, 60), "reference": np.arange(50, 110)}
    pool.learner[0][spoilt["learner"], 3] = value
    pool.reference[1][spoilt["reference"]] = value
    bad = set(range(110))
    rows, stats, _ = drawn(pool, SELECTION.model_copy(update={"criterion": criterion, "method": method}))
    assert bad.isdisjoint(index_of(pool)[place] for place in places(rows))
    assert stats.tally.dropped == {"not_selected": 160 - 110 - 32, "embedding_nonfinite": 110}
    for number in (stats.learnability, stats.uniform_learnability, *(row["score"] for row in rows)):
        assert np.isfinite(number)
    assert all(np.isfinite(row["learner_loss"]) and np.isfinite(row["reference_loss"]) for row in rows)


def test_too_few_rows_with_embeddings():
    pool = candidates()
    pool.learner[1][: B - 31] = np.nan
    with pytest.raises(UserError, match=r"^round 2, sub-batch 7: expected 32 .*, found 31 of 160;") as caught:
        drawn(pool)
    assert len(caught.value.lines) == 1
    pool.learner[1][B - 32] = pool.learner[1][B - 1]
    assert drawn(pool)[1].tally.dropped == {"not_selected": 0, "embedding_nonfinite": 128}
    pool.learner[1][:] = np.nan
    with pytest.raises(UserError, match="found 0 of 160"):
        drawn(pool)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0])
def test_a_learner_whose_scale_is_broken(scale: float):
    with pytest.raises(UserError, match=r"^round 2, sub-batch 7: .*logit_scale must be finite") as caught:
        drawn(candidates(), learner=Scale(logit_scale=scale, logit_bias=0.0))
    assert len(caught.value.lines) == 1


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", [LEARNER, None])
def test_a_selected_file_comes_back(tmp_path: Path, learner: Scale | None):
    pool = candidates()
    selection = SELECTION if learner else SELECTION.model_copy(update={"criterion": "easy_reference"})
    _, stats, table = drawn(pool if learner else replace(pool, learner=None), selection, learner=learner)
    store = Store(str(tmp_path / "root"))
    name = selected_name("rounds/r000002/steps-0a", 7)
    assert name == "rounds/r000002/steps-0a/selected-000007.parquet"
    write_selected(store, name, table, stats)
    first = store.read_bytes(name)
    found, others = read_selected(store, name)
    assert found.replace_schema_metadata(None).equals(table)
    assert others == stats
    write_selected(store, name, table, stats)
    assert store.read_bytes(name) == first
