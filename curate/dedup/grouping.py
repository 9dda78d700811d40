"""Groups of near-duplicates, and which row of a group stays. Arrays alone.

Rows are ranked: rows of evaluation sets, then earlier rows before later ones where earlier decisions stand, then by the
reference's score (cosine of image and caption), then by pixels, both descending, then by uid. No shard order decides,
unless rows are alike in all of these. A pair is (better, worse) by rank. Two rules say which rows of a group go:

    components  all but the best-ranked of those that pairs connect: A ~ B ~ C leaves one, though A and C may differ
    greedy      every row with a better-ranked near-duplicate, as published in SemDeDup's code (arXiv 2303.09540): of
                A ~ B ~ C in the order A, C, B the first two stay
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Nodes = npt.NDArray[np.void]
Pairs = npt.NDArray[np.void]
Rule = Literal["components", "greedy"]

NODE = np.dtype([("id", "<i8"), ("score", "<f4"), ("pixels", "<i8"), ("uid", "<u8"), ("key", "<u8")])
"""A row: its number among all rows, and what it is ranked by. `uid` is a hash; `key` one of shard and row."""

PAIR = np.dtype([("better", "<i8"), ("worse", "<i8"), ("cosine", "<f4"), ("kind", "i1")])
KINDS = ("near_duplicate", "duplicate_image", "duplicate_exact")
"""What the kinds 0, 1 and 2 of a pair are: near by cosine, the same image bytes, the same pair."""
CONTAMINATED = "contaminated"
REASONS = (*KINDS, CONTAMINATED)
"""Why a row leaves."""
ENDS = ("id", "duplicate_of", "representative")
DROPPED = np.dtype([*((end, "<i8") for end in ENDS), ("cosine", "<f4"), ("why", "i1")])
"""A row that leaves; `why` is a position in `REASONS`."""
EVALUATION = -1
"""The tier of rows of evaluation sets: they are better than any row of the pool and are never dropped."""


def in_rank_order(nodes: Nodes, tiers: npt.NDArray[np.integer]) -> Ints:
    """The order that sorts rows from the best to the worst; `tiers` [n] come before all else, the lowest first."""
    return np.lexsort([nodes["key"], nodes["uid"], -nodes["pixels"], -nodes["score"], tiers])


def collapse(contents: npt.NDArray[np.uint64], pictures: npt.NDArray[np.uint64] | None) -> tuple[Ints, Pairs]:
    """Let the best row of each class of equal rows stand for the class.

    Args:
        contents: hashes of pairs [n, 2], the rows from the best to the worst.
        pictures: likewise of image bytes; None if equal pictures with other captions are no duplicates.

    Returns:
        positions of the rows that stay, ascending; and the pairs (by position) that tie the others to them.
    """
    first = _first_of(contents)
    copies = first != np.arange(len(first))
    pairs = [_copies(first, copies, KINDS.index("duplicate_exact"))]
    kept = np.flatnonzero(~copies)
    if pictures is not None:
        first = _first_of(pictures[kept])
        copies = first != np.arange(len(first))
        tied = _copies(first, copies, KINDS.index("duplicate_image"))
        tied["better"], tied["worse"] = kept[tied["better"]], kept[tied["worse"]]
        pairs.append(tied)
        kept = kept[~copies]
    return kept, np.concatenate(pairs)


def _first_of(hashes: npt.NDArray[np.uint64]) -> Ints:
    """For each hash [n, 2] the first position that holds it."""
    order = np.lexsort([np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]])
    begins = np.ones(len(order), bool)
    begins[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first


def _copies(first: Ints, copies: Bools, kind: int) -> Pairs:
    pairs = np.empty(int(copies.sum()), PAIR)
    pairs["better"], pairs["worse"], pairs["cosine"], pairs["kind"] = first[copies], np.flatnonzero(copies), 1, kind
    return pairs


def each_once(pairs: Pairs) -> Pairs:
    """Pairs sorted by both rows, the strongest of equal ones alone: two cells may have found one and the same."""
    order = np.lexsort([-pairs["cosine"], -pairs["kind"], pairs["worse"], pairs["better"]])
    pairs = pairs[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (np.diff(pairs["better"]) != 0) | (np.diff(pairs["worse"]) != 0)
    return pairs[first]


def nodes_once(nodes: Nodes) -> Nodes:
    """Nodes in the order of their ids, each once."""
    return nodes[np.unique(nodes["id"], return_index=True)[1]]


def thin(pairs: Pairs, evaluation: Bools) -> Pairs:
    """Fewer pairs that group the same rows and drop the same ones, at most three per row and all copies.

    Kept are each row's strongest pair with a better one, and with one of an evaluation set, and a spanning forest of
    strongest pairs, which connects at every threshold what all pairs connect.

    Args:
        pairs: each once, by position.
        evaluation: [n] whether a position is one of an evaluation set.
    """
    near = pairs[pairs["kind"] == 0]
    n = len(evaluation)
    weights = coo_array((2 - near["cosine"].astype(np.float64), (near["better"], near["worse"])), shape=(n, n))
    forest = minimum_spanning_tree(weights.tocsr()).tocoo()
    chosen = np.isin(_as_one(near["better"], near["worse"], n), _as_one(forest.row, forest.col, n))
    contaminating = evaluation[near["better"]]
    for some in (np.arange(len(near)), np.flatnonzero(contaminating)):
        chosen[some[_strongest(near["worse"][some], near["better"][some], near[some])]] = True
    return np.concatenate([pairs[pairs["kind"] > 0], near[chosen]])


def _as_one(row: npt.NDArray[np.integer], column: npt.NDArray[np.integer], n: int) -> Ints:
    return row.astype(np.int64) * n + column


def _strongest(rows: Ints, others: Ints, pairs: Pairs) -> Ints:
    """Index of the strongest pair of each of `rows`: copies first, then by cosine, then the best-ranked other."""
    order = np.lexsort([others, -pairs["cosine"], -pairs["kind"], rows])
    return order[np.flatnonzero(np.diff(rows[order], prepend=-1))]


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What becomes of n rows, by position in the order of rank."""

    dropped: Ints
    """[m] positions, ascending."""
    reason: npt.NDArray[np.str_]
    """[m] one of `KINDS`, or `CONTAMINATED`."""
    duplicate_of: Ints
    """[m] a near-duplicate: with `components` the next one on a shortest way to a row that stays, with `greedy` the
    strongest that is better-ranked. Who follows it arrives at the representative."""
    cosine: npt.NDArray[np.float32]
    """[m] of the images of both."""
    representative: Ints
    """[m] the row that stays instead of this one."""
    group: Ints
    """[n] the best-ranked row of those that pairs connect, contaminated rows left out; a row alone is its own."""


def decide(pairs: Pairs, tiers: npt.NDArray[np.integer], rule: Rule) -> Decisions:
    """Apply a rule to all pairs.

    Args:
        pairs: as `each_once` gives them, by position in the order of rank.
        tiers: [n] of the rows, ascending; rows of a tier are decided without those of later ones.
        rule: which rows of a group go.
    """
    n = len(tiers)
    tied = np.full(n, -1)  # which pair says what a row duplicates
    representative = np.arange(n)
    evaluation = tiers == EVALUATION

    # Rows near an evaluation set, then copies of these: of equal rows one alone was compared.
    contaminated, source = np.zeros(n, bool), evaluation
    exact = np.ones(len(pairs), bool)
    while True:
        found = _neighbours_of(source, ~contaminated & ~evaluation, pairs, exact, tiers)
        if not len(found[0]):
            break
        rows, others, index = found
        tied[rows], representative[rows] = index, representative[others]
        contaminated[rows] = True
        source, exact = contaminated, pairs["kind"] > 0

    left = ~contaminated & ~evaluation
    inside = np.flatnonzero(left[pairs["better"]] & left[pairs["worse"]])
    edges = pairs[inside]
    better, worse = edges["better"], edges["worse"]
    group = best_connected(better, worse, n)
    if rule == "greedy":
        strongest = _strongest(worse, better, edges)
        tied[worse[strongest]] = inside[strongest]
        representative[worse[strongest]] = better[strongest]
    else:
        for tier in np.unique(tiers[left]):
            now = np.flatnonzero(tiers[worse] <= tier)  # the worse row is the later one
            here = left & (tiers == tier)
            stays = here & (best_connected(better[now], worse[now], n) == np.arange(n))
            # Whatever was decided before is: a way ends at the first earlier row, and goes on as that one's does.
            towards = _towards((left & (tiers < tier)) | stays, better[now], worse[now])
            goes = np.flatnonzero(here & ~stays)
            ends = np.minimum(goes, towards[goes]), np.maximum(goes, towards[goes])
            at = np.searchsorted(_as_one(better[now], worse[now], n), _as_one(*ends, n))
            tied[goes] = inside[now[at]]
            representative[goes] = towards[goes]
    while (representative[representative] != representative).any():
        representative = representative[representative]

    dropped = np.flatnonzero(representative != np.arange(n))
    why = pairs[tied[dropped]]
    reasons = np.where(contaminated[dropped], CONTAMINATED, np.array(KINDS)[why["kind"]])
    return Decisions(
        dropped=dropped,
        reason=reasons,
        duplicate_of=np.where(why["worse"] == dropped, why["better"], why["worse"]),
        cosine=why["cosine"],
        representative=representative[dropped],
        group=group,
    )


def _neighbours_of(
    source: Bools, wanted: Bools, pairs: Pairs, usable: Bools, tiers: npt.NDArray[np.integer]
) -> tuple[Ints, Ints, Ints]:
    """Wanted rows that usable pairs tie to `source`: rows, their strongest such neighbours, indices of the pairs."""
    ends = (pairs["worse"], pairs["better"])
    found = [
        (row, other, np.flatnonzero(usable & wanted[row] & source[other] & (tiers[other] <= tiers[row])))
        for row, other in (ends, ends[::-1])
    ]
    rows = np.concatenate([row[index] for row, _, index in found])
    others = np.concatenate([other[index] for _, other, index in found])
    indices = np.concatenate([index for _, _, index in found])
    strongest = _strongest(rows, others, pairs[indices])
    return rows[strongest], others[strongest], indices[strongest]


def dropped_rows(decisions: Decisions, ids: Ints) -> npt.NDArray[np.void]:
    """The rows that leave, by id: [m] of `DROPPED`; `ids` [n] are in the order of rank."""
    rows = np.zeros(len(decisions.dropped), DROPPED)
    for end, at in zip(ENDS, (decisions.dropped, decisions.duplicate_of, decisions.representative), strict=True):
        rows[end] = ids[at]
    rows["cosine"] = decisions.cosine
    for number, reason in enumerate(REASONS):
        rows["why"][decisions.reason == reason] = number
    return rows[np.argsort(rows["id"])]


def best_connected(better: Ints, worse: Ints, n: int) -> Ints:
    """For each of n rows the first of those that pairs connect it with."""
    graph = coo_array((np.ones(len(better), np.int8), (better, worse)), shape=(n, n))
    count, label = connected_components(graph, directed=False)
    first = np.full(count, n)
    np.minimum.at(first, label, np.arange(n))
    return np.asarray(first[label], np.int64)


def _towards(heads: Bools, better: Ints, worse: Ints) -> Ints:
    """For each of n rows the next one on a shortest way, over pairs, to a row of `heads` [n]."""
    n = len(heads)
    below = np.flatnonzero(heads)  # one root, which is row n, above them all
    ends = np.concatenate([better, np.full(len(below), n)]), np.concatenate([worse, below])
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(n + 1, n + 1)).tocsr()
    _, towards = breadth_first_order(graph, n, directed=False)
    return np.asarray(towards[:n], np.int64)
