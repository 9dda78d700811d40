"""Which pairs must be decided together, told without all of them in one place. Arrays alone.

some pairs     -> a forest     their rows, and for each the first row that these pairs connect it with
all forests    -> buckets      rows that pairs connect, by whatever forests, are in one bucket
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from curate.dedup.grouping import Ints, Pairs, best_connected


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Rows that some pairs connect: [n] of them, as stars about the first of each tree."""

    ids: Ints
    """Ascending."""
    head: Ints
    """Position of the first row of each one's tree."""
    pairs: Ints
    """Where a row is the first of its tree, how many pairs the tree was made of; else 0."""


def plant(pairs: Pairs) -> Forest:
    """The forest of some pairs by id."""
    ids = np.unique(np.concatenate([pairs["better"], pairs["worse"]]))
    better, worse = (np.searchsorted(ids, pairs[end]) for end in ("better", "worse"))
    head = best_connected(better, worse, len(ids))
    return Forest(ids=ids, head=head, pairs=np.bincount(head[better], minlength=len(ids)))


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """In which bucket each row of all forests is."""

    pairs: Ints
    """[buckets] of each: a pair counts as often as it was found."""
    number: Ints
    """[groups] of the bucket of each group of rows that pairs connect."""
    first: Ints
    """[groups] position of the first row of each."""
    ids: Ints
    """[rows] ascending, each once."""
    first_of: Ints
    """[rows] position of the first row of each one's group."""

    def of(self, ids: Ints) -> Ints:
        """Numbers of the buckets of some of the rows: [n]."""
        return self.number[np.searchsorted(self.first, self.first_of[np.searchsorted(self.ids, ids)])]


def join(forests: Callable[[], Iterator[Forest]], rows: int, most_pairs: int) -> Buckets:
    """Put all rows that pairs connect into one bucket, with as many other such groups as have `most_pairs` together.

    Groups are taken in the order of their first ids. A bucket has fewer than `most_pairs` pairs, and one group more: a
    group is never cut, and a giant one makes a giant bucket.

    Args:
        forests: reads all of them, one after the other; is called three times, so that one at a time is held.
        rows: of all forests, one at least; one that is in several counts in each.
        most_pairs: of a bucket.
    """
    ids = _all_ids(forests(), rows)
    above = np.arange(len(ids))  # of each row another, never a later one, which pairs connect it with
    for forest in forests():
        at = np.searchsorted(ids, forest.ids)
        roots, number = np.unique(_roots(above, at), return_inverse=True)
        above[roots] = roots[best_connected(number, number[forest.head], len(roots))]
        above[at] = above[roots[number]]
    above = _roots(above, above)

    first = np.flatnonzero(above == np.arange(len(ids)))
    pairs = np.zeros(len(first), np.int64)
    for forest in forests():
        heads = np.flatnonzero(forest.pairs)
        group = np.searchsorted(first, above[np.searchsorted(ids, forest.ids[heads])])
        np.add.at(pairs, group, forest.pairs[heads])
    number = _filled(pairs, most_pairs)
    sizes = np.zeros(number[-1] + 1, np.int64)
    np.add.at(sizes, number, pairs)
    return Buckets(pairs=sizes, number=number, first=first, ids=ids, first_of=above)


def _all_ids(forests: Iterator[Forest], rows: int) -> Ints:
    """The ids of all forests, ascending, each once; `rows` counts each as often as it comes."""
    ids, end = np.empty(rows, np.int64), 0
    for forest in forests:
        ids[end : end + len(forest.ids)] = forest.ids
        end += len(forest.ids)
    ids.sort()
    new = np.ones(rows, bool)
    new[1:] = ids[1:] != ids[:-1]
    return ids[new]


def _filled(pairs: Ints, most_pairs: int) -> Ints:
    """Number of the bucket of each group, by the pairs of each."""
    number = np.cumsum(pairs)
    number -= pairs
    number //= most_pairs
    begins = np.zeros(len(number), bool)
    begins[1:] = number[1:] != number[:-1]  # a giant leaves a gap
    return np.cumsum(begins, out=number)


def _roots(above: Ints, at: Ints) -> Ints:
    """Follow `above` from some rows until it goes no further: [n]."""
    while not np.array_equal(higher := above[at], at):
        at = higher
    return at
