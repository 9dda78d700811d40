"""Round quality against slow and literal counts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.pipelines.wanted import SAMPLE_ROWS, SAMPLE_SHARDS, fixed_sample
from curate.pool.shards import Pool
from curate.rounds import quality
from curate.rounds.manifest import read_manifest
from curate.rounds.quality import (
    Seen,
    correlate_samples,
    has_sample,
    rank_correlation,
    read_seen,
    trained_rounds,
    write_sample,
    write_seen,
)
from curate.storage import Store
from tests.helpers import commit_rounds, drawn_pool

SPEC = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=4, logit_scale=10.0, logit_bias=0.0)


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


HASHES = st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=60)


@settings(deadline=None)
@given(chosen=HASHES, earlier=st.lists(HASHES, max_size=4), again=st.data(), size=st.sampled_from([8, 10**6]))
def test_examples_that_were_chosen_before(
    chosen: set[int], earlier: list[set[int]], again: st.DataObject, size: int
) -> None:
    """A small sketch is a sample of what was seen, a large one is all of it."""
    everything = sorted(set().union(*earlier))
    if everything:
        chosen |= again.draw(st.sets(st.sampled_from(everything)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "SEEN_PAIRS", size)
        seen = Seen(contents=contents([]))
        for values in earlier:
            seen = seen.with_more(contents(sorted(values)))
        compared, known = seen.known(contents(sorted(chosen)))
    assert seen.contents.tolist() == everything[:size]
    below = {value for value in chosen if len(everything) < size or value <= everything[size - 1]}
    assert (compared, known) == (len(below), len(below & set(everything)))


def test_what_was_seen_comes_back(root: str):
    store = Store(root)
    assert read_seen(store, None).contents.tolist() == []
    write_seen(store, "steps", Seen(contents=contents([3, 5, 9])))
    assert read_seen(store, "steps").contents.tolist() == [3, 5, 9]
    with pytest.raises(UserError, match=r"^other/seen\.parquet: expected .* restore it$"):
        read_seen(store, "other")


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
    sample = fixed_sample(pool, 3, SPEC)
    assert sample == fixed_sample(pool, 3, SPEC) != fixed_sample(pool, 4, SPEC)
    assert len(sample.shards) == SAMPLE_SHARDS
    large = Pool(**pool.__dict__ | {"shards": tuple(replace(shard, rows=10**6) for shard in pool.shards)})
    found = fixed_sample(large, 3, SPEC)
    assert sum(found.expected(index) for index in found.shards) == SAMPLE_ROWS
    # Of small shards a part, in runs that lie within them.
    assert {stop - start for start, stop in sample.runs.values()} == {1}
    assert all(0 <= start < stop <= pool.shards[i].rows for i, (start, stop) in sample.runs.items())
    # A pool that grows keeps most of the shards that it is taken from.
    smaller = Pool(**pool.__dict__ | {"shards": pool.shards[:-1]})
    kept = sample.runs.items() & fixed_sample(smaller, 3, SPEC).runs.items()
    assert len(kept) >= SAMPLE_SHARDS - 1
