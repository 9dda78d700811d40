"""Groups: what is decided equals a literal reading of the rules, on any graph."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.dedup.grouping import (
    CONTAMINATED,
    EVALUATION,
    KINDS,
    NODE,
    PAIR,
    Decisions,
    Nodes,
    Pairs,
    Rule,
    collapse,
    decide,
    each_once,
    in_rank_order,
    nodes_once,
    thin,
)

Graph = dict[tuple[int, int], tuple[float, int]]
"""Cosine and kind of the pairs (better, worse)."""


def pairs_of(graph: Graph) -> Pairs:
    return np.array([(i, j, cosine, kind) for (i, j), (cosine, kind) in sorted(graph.items())], PAIR)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, list[int]]:
    n = draw(st.integers(1, 9))
    tiers = sorted(draw(st.lists(st.integers(EVALUATION, 2), min_size=n, max_size=n)))
    graph: Graph = {}
    for i, j in combinations(range(n), 2):
        if tiers[j] != EVALUATION and draw(st.integers(0, 3)) == 0:
            graph[i, j] = (draw(st.sampled_from([0.95, 0.96, 0.97, 0.98])), draw(st.sampled_from([0, 0, 0, 1, 2])))
    return graph, tiers


def connected(edges: set[tuple[int, int]], row: int) -> set[int]:
    seen, todo = {row}, [row]
    while todo:
        here = todo.pop()
        for a, b in edges:
            for one, other in ((a, b), (b, a)):
                if one == here and other not in seen:
                    seen.add(other)
                    todo.append(other)
    return seen


def contaminated_rows(graph: Graph, tiers: list[int]) -> set[int]:
    """Rows near a row of an evaluation set, and their copies; no row learns it from a later one."""
    bad = {j for i, j in graph if tiers[i] == EVALUATION}
    while True:
        ends = [pair for pair, (_, kind) in graph.items() if kind and tiers[pair[0]] != EVALUATION]
        more = {b for i, j in ends for a, b in ((i, j), (j, i)) if a in bad and tiers[a] <= tiers[b]} - bad
        if not more:
            return bad
        bad |= more


def literal_kept(graph: Graph, tiers: list[int], rule: Rule) -> list[int]:
    bad = contaminated_rows(graph, tiers)
    pool = [row for row, tier in enumerate(tiers) if tier != EVALUATION and row not in bad]
    edges = {(i, j) for i, j in graph if i in pool and j in pool}
    if rule == "greedy":
        return [row for row in pool if not any(j == row for _, j in edges)]
    kept = []
    for row in pool:
        known = {(i, j) for i, j in edges if tiers[j] <= tiers[row]}  # nobody knows later rows yet
        kept.append(row) if min(connected(known, row)) == row else None
    return kept


def kept_rows(decisions: Decisions, tiers: list[int]) -> list[int]:
    dropped = set(decisions.dropped.tolist())
    return [row for row, tier in enumerate(tiers) if tier != EVALUATION and row not in dropped]


@pytest.mark.parametrize("rule", ["components", "greedy"])
@given(drawn=graphs())
@settings(max_examples=300, deadline=None)
def test_what_stays_is_what_the_rule_says(rule: Rule, drawn: tuple[Graph, list[int]]) -> None:
    graph, tiers = drawn
    decisions = decide(pairs_of(graph), np.array(tiers), rule)
    assert kept_rows(decisions, tiers) == literal_kept(graph, tiers, rule)
    assert {
        row for row, why in zip(decisions.dropped, decisions.reason, strict=True) if why == CONTAMINATED
    } == contaminated_rows(graph, tiers)


@pytest.mark.parametrize("rule", ["components", "greedy"])
@given(drawn=graphs())
@settings(max_examples=300, deadline=None)
def test_every_dropped_row_names_a_pair_and_a_row_that_stays(rule: Rule, drawn: tuple[Graph, list[int]]) -> None:
    graph, tiers = drawn
    decisions = decide(pairs_of(graph), np.array(tiers), rule)
    stays = {*kept_rows(decisions, tiers), *(row for row, tier in enumerate(tiers) if tier == EVALUATION)}
    for row, other, cosine, reason, representative in zip(
        decisions.dropped.tolist(),
        decisions.duplicate_of.tolist(),
        decisions.cosine,
        decisions.reason,
        decisions.representative.tolist(),
        strict=True,
    ):
        known, kind = graph[min(row, other), max(row, other)]
        assert cosine == np.float32(known)
        assert reason in (CONTAMINATED, KINDS[kind])
        assert representative in stays
        assert tiers[other] <= tiers[row]  # nobody knows later rows yet
    # Who follows what a row duplicates arrives at the row that stays.
    following = dict(zip(decisions.dropped.tolist(), decisions.duplicate_of.tolist(), strict=True))
    for row, representative in zip(decisions.dropped.tolist(), decisions.representative.tolist(), strict=True):
        here = row
        for _ in following:
            here = following.get(here, here)
        assert here == representative


@given(drawn=graphs())
@settings(max_examples=200, deadline=None)
def test_earlier_decisions_stand(drawn: tuple[Graph, list[int]]) -> None:
    graph, tiers = drawn
    for rule in ("components", "greedy"):
        all_ = decide(pairs_of(graph), np.array(tiers), rule)
        for last in {tier for tier in tiers if tier >= 0}:
            n = sum(tier <= last for tier in tiers)
            before = {pair: what for pair, what in graph.items() if pair[1] < n}
            then = decide(pairs_of(before), np.array(tiers[:n]), rule)
            for name in ("dropped", "duplicate_of", "cosine", "reason", "representative"):
                assert np.array_equal(getattr(all_, name)[all_.dropped < n], getattr(then, name)), name


@pytest.mark.parametrize("rule", ["components", "greedy"])
@given(drawn=graphs())
@settings(max_examples=300, deadline=None)
def test_thinned_pairs_drop_the_same_rows(rule: Rule, drawn: tuple[Graph, list[int]]) -> None:
    graph, tiers = drawn
    tiers = [min(tier, 0) for tier in tiers]  # pairs of one deduplication
    graph = {pair: (cosine, 0 if tiers[pair[0]] == EVALUATION else kind) for pair, (cosine, kind) in graph.items()}
    # Thinning does not know what other cells find contaminated: with contamination the bridges may be missing.
    if any(tiers[i] == EVALUATION for i, _ in graph):
        graph = {pair: what for pair, what in graph.items() if tiers[pair[0]] == EVALUATION}
    pairs = pairs_of(graph)
    fewer = each_once(thin(pairs, np.array(tiers) == EVALUATION))
    one, other = (decide(some, np.array(tiers), rule) for some in (pairs, fewer))
    assert np.array_equal(one.dropped, other.dropped)
    assert np.array_equal(one.group, other.group)
    assert np.array_equal(one.reason == CONTAMINATED, other.reason == CONTAMINATED)


def test_thinning_leaves_at_most_three_pairs_a_row() -> None:
    n = 300
    graph: Graph = dict.fromkeys(combinations(range(n), 2), (0.96, 0))
    assert len(thin(pairs_of(graph), np.zeros(n, bool))) <= 2 * n


def test_a_chain_is_one_group_or_leaves_its_ends() -> None:
    # A ~ B ~ C, B the worst: both ends have no better neighbour.
    graph: Graph = {(0, 2): (0.97, 0), (1, 2): (0.96, 0)}
    tiers = np.zeros(3, int)
    connected_ = decide(pairs_of(graph), tiers, "components")
    assert connected_.dropped.tolist() == [1, 2]
    assert connected_.representative.tolist() == [0, 0]
    assert connected_.duplicate_of.tolist() == [2, 0]  # C by way of B
    assert decide(pairs_of(graph), tiers, "greedy").dropped.tolist() == [2]


def test_no_pairs_drop_nothing() -> None:
    for rule in ("components", "greedy"):
        decisions = decide(np.empty(0, PAIR), np.zeros(0, int), rule)
        assert not len(decisions.dropped)
        assert not len(decide(np.empty(0, PAIR), np.zeros(3, int), rule).dropped)


def test_rank_is_tier_then_score_then_pixels_then_uid() -> None:
    nodes = np.array(
        [(0, 0.1, 9, 1, 0), (1, 0.2, 1, 1, 0), (2, 0.2, 2, 5, 0), (3, 0.2, 2, 4, 0), (4, 0.0, 1, 1, 0)], NODE
    )
    assert in_rank_order(nodes, np.array([0, 0, 0, 0, -1])).tolist() == [4, 3, 2, 1, 0]


@given(classes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_the_best_of_equal_rows_stands_for_them(classes: list[tuple[int, int]]) -> None:
    pictures = np.array([[7, image] for image, _ in classes], np.uint64).reshape(-1, 2)
    pairs = np.array([[caption, image] for image, caption in classes], np.uint64).reshape(-1, 2)
    kept, tied = collapse(pairs, pictures)
    assert kept.tolist() == [
        row for row, (image, _) in enumerate(classes) if image not in [i for i, _ in classes[:row]]
    ]
    seen = {row: row for row in kept.tolist()}
    for better, worse, cosine, kind in sorted(tied.tolist(), key=lambda pair: pair[1]):
        assert (better < worse, cosine) == (True, 1)
        assert classes[better][0] == classes[worse][0]
        assert (KINDS[kind] == "duplicate_exact") == (classes[worse] in classes[:worse])
        seen[worse] = seen[better]
    assert sorted(seen) == list(range(len(classes)))
    kept, tied = collapse(pairs, None)
    assert kept.tolist() == [row for row, pair in enumerate(classes) if pair not in classes[:row]]
    assert all(classes[better] == classes[worse] for better, worse, _, _ in tied.tolist())


def test_a_pair_found_twice_counts_once_and_a_node_too() -> None:
    pairs = np.array([(0, 1, 0.96, 0), (0, 1, 1.0, 1), (0, 2, 0.97, 0), (0, 1, 0.96, 0)], PAIR)
    assert each_once(pairs).tolist() == [(0, 1, 1.0, 1), (0, 2, pytest.approx(0.97), 0)]
    nodes: Nodes = np.array([(5, 0.1, 9, 1, 0), (2, 0.2, 1, 1, 0), (5, 0.1, 9, 1, 0)], NODE)
    assert nodes_once(nodes)["id"].tolist() == [2, 5]
