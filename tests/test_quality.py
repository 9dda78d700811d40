"""Round quality against slow and literal counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UserError
from curate.manifest import read_manifest
from curate.pool import Pool
from curate.quality import (
    correlate_samples,
    count_known,
    has_sample,
    rank_correlation,
    read_chosen,
    trained_rounds,
    write_chosen,
    write_sample,
)
from curate.storage import Store
from pipelines.keys import SAMPLE_ROWS, SAMPLE_SHARDS, fixed_sample
from tests.helpers import commit_rounds, drawn_pool


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def contents(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def literal_spearman(a: list[float], b: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / (sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y)) ** 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_shares_ranks_between_equal_values(pairs: list[tuple[int, int]]):
    a, b = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    found = rank_correlation(np.array(a), np.array(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(literal_spearman(a, b), abs=1e-5)


def test_rank_correlation_of_hardly_anything():
    assert rank_correlation(np.array([]), np.array([])) is None
    assert rank_correlation(np.array([1.0]), np.array([2.0])) is None


@settings(deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1), st.lists(st.sets(st.integers(0, 40)), max_size=4))
def test_examples_that_were_chosen_before(chosen: set[int], earlier: list[set[int]]):
    known = count_known(contents(sorted(chosen)), [contents(sorted(values)) for values in earlier])
    assert known == len(chosen & set().union(*earlier))


def test_what_a_round_leaves_comes_back(root: str):
    store = Store(root)
    left = write_chosen(store, "steps", contents([5, 3, 9, 3]))
    assert left.tolist() == [3, 5, 9]
    assert read_chosen(store, "steps").tolist() == left.tolist()
    with pytest.raises(UserError, match=r"^other/chosen\.parquet: expected .* restore it$"):
        read_chosen(store, "other")


def test_samples_meet_on_the_pairs_that_both_hold(store: Store):
    assert not has_sample(store, "a")
    write_sample(store, "a", contents([1, 2, 3, 4]), np.array([0.1, 0.2, 0.3, 9.0]))
    write_sample(store, "b", contents([9, 3, 2, 1]), np.array([5.0, 0.5, 0.7, 0.6]))
    assert has_sample(store, "a")
    assert correlate_samples(store, "b", "a") == (-0.5, 3)


def test_learnability_when_trained_on_against_when_chosen(store: Store, tmp_path: Path):
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=24), rounds=2, sub_batches=3, b=4)
    first, second = (read_manifest(store, number)[0] for number in (0, 1))
    first = replace(first, learnability=(1.0, 2.0, 4.0), reference_loss=(0.5, 0.25, 0.0))
    # Batches 3 to 5 are the second round's; selection there did not look at the learner.
    found = trained_rounds([first, second], {1: 1.25, 2: 1.0, 4: 2.0})
    assert found == [
        {"round": 0, "batches": 2, "realised": 1.0, "chosen": 3.0},
        {"round": 1, "batches": 1, "realised": 1.5, "chosen": None},
    ]
    assert trained_rounds([first, second], {}) == []


def test_the_sample_is_the_same_in_every_round_and_of_bounded_size(tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=60, shards=12)
    sample = fixed_sample(pool, seed=3)
    assert sample == fixed_sample(pool, seed=3) != fixed_sample(pool, seed=4)
    assert len(sample.shards) == SAMPLE_SHARDS
    large = Pool(**pool.__dict__ | {"shards": tuple(replace(shard, rows=10**6) for shard in pool.shards)})
    share = fixed_sample(large, seed=3).keys.high / 2**64
    assert share * 10**6 * SAMPLE_SHARDS == pytest.approx(SAMPLE_ROWS, abs=1)
    # A pool that grows keeps most of the shards that it is taken from.
    smaller = Pool(**pool.__dict__ | {"shards": pool.shards[:-1]})
    assert len(sample.shards & fixed_sample(smaller, seed=3).shards) >= SAMPLE_SHARDS - 1
