"""Grouping, scaled out: from the pairs of a chain of deduplications to the rows that leave. No task holds all pairs.

some pairs files       one task each    a forest of the rows that their pairs connect
all forests            one task         in which bucket each row is: rows that pairs connect are in one
some pairs files       one task each    their pairs and nodes, a part for each bucket
buckets                one task each    the rows that leave, a part for each run of shards, and what is told of groups
runs of shards         one task each    a file of dropped rows

Where all pairs fit into one bucket its task reads them itself, and the three steps before it are left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain as chained
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.dedup.files import (
    DROPPED_SCHEMA,
    DROPPED_SHARDS,
    chain_files,
    describe_records,
    dropped_files,
    read_records,
    write_dropped,
)
from curate.dedup.forests import Forest, join, plant
from curate.dedup.grouping import (
    DROPPED,
    ENDS,
    EVALUATION,
    NODE,
    PAIR,
    REASONS,
    Ints,
    Nodes,
    Pairs,
    Rule,
    decide,
    dropped_rows,
    each_once,
    in_rank_order,
    nodes_once,
)
from curate.parts import (
    READERS,
    by_destination,
    pack_arrays,
    read_part,
    read_parts,
    remove_parts,
    unpack_arrays,
    write_parts,
)
from curate.pipelines.cluster import groups, run_tasks
from curate.pipelines.neighbours import Compared
from curate.pool.shards import load_pool
from curate.sealed import seal, unseal
from curate.storage import Store

TASK_PAIRS = 2**20
"""Pairs that one task holds. A file of pairs that has more is read whole; a group of rows that has more is decided
whole, by a task that asks for as much memory: a million blank pictures that nothing collapsed are one group."""
DECIDE_BYTES = 700
"""Of memory for each pair that a task decides (509 to 655 measured, with 4 million to 250,000 that share no row),"""
PLANT_BYTES = 200
"""that it makes a forest of (177),"""
SPREAD_BYTES = 350
"""that it sends to the buckets (304 to 320);"""
JOIN_BYTES = 40
"""for each row of a forest while all forests are joined (30), and"""
FOREST_BYTES = 60
"""for each row of the one that is being joined (50). Joining is one task: what it holds are ids of rows that have a
near-duplicate, and no pairs; in several it would take a round of messages for each doubling of the longest chain."""
WRITE_BYTES = 200
"""And for each dropped row of a file (180)."""
LARGEST = 20
"""Groups that the account describes,"""
MEASURED = 256
"""by at most so many of their rows."""


@dataclass(frozen=True, kw_only=True)
class LargestGroup:
    """A large group of those that were found."""

    size: int
    head: list[Any]
    """The fields of a `NODE`: the best-ranked row."""
    ids: list[int]
    """Of the `MEASURED` best-ranked rows, the best first."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What there was to decide."""

    dropped: dict[str, int]
    """Rows by reason."""
    pairs: int
    groups: int
    largest: list[LargestGroup]
    """The largest first, of equal ones the better-ranked."""
    largest_cell: int
    """Of the newest deduplication: rows."""
    beyond: int
    """Rows that may have further near-duplicates, the most in one of the chain."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the task of a bucket tells."""

    dropped: dict[str, int]
    pairs: int
    groups: int
    largest: list[LargestGroup]
    rows: list[int]
    """Dropped ones by run of shards."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of pairs and that of their nodes."""

    link: int
    """Number of its deduplication in the chain."""
    pairs: str
    nodes: str
    rows: int
    """Pairs."""
    beyond: int
    largest_cell: int


@dataclass(frozen=True, kw_only=True)
class _Grouping:
    """What all tasks are given."""

    store: Store
    folder: str
    compared: Compared
    rule: Rule
    most_pairs: int
    """Of a bucket, and of the files that a task reads."""
    sources: tuple[tuple[_File, ...], ...]
    """The files of each task that reads pairs."""
    moves: tuple[tuple[Ints, Ints], ...]
    """For each deduplication of the chain the ids that its shards began with, and those that they begin with now."""
    buckets: int = 1

    @property
    def runs(self) -> int:
        """Runs of shards of the pool."""
        return dropped_files(_pool_shards(self.compared))

    def name(self, kind: str, number: int) -> str:
        """Of a file of parts; those that a killed run of another version cut elsewhere have other names."""
        return f"{self.folder}/grouping-{self.most_pairs}-{kind}-{number:06d}"

    def names(self, kind: str, count: int) -> list[str]:
        """Of all files of a kind."""
        return [self.name(kind, number) for number in range(count)]


def group_pairs(store: Store, chain: Sequence[str], compared: Compared, rule: Rule) -> Found:
    """Decide which rows leave, by the pairs of the whole chain, and write them; `forget_grouping` may follow.

    Args:
        store: the root.
        chain: folders of deduplications, the oldest first; the dropped rows are written into the last.
        compared: the rows.
        rule: which rows of a group go.

    Raises:
        UserError: a file of the chain is gone; or no node has the memory that a task needs.
    """
    files = _files(store, chain)
    grouping = _Grouping(
        store=store,
        folder=chain[-1],
        compared=compared,
        rule=rule,
        most_pairs=TASK_PAIRS,
        sources=tuple(map(tuple, groups(files, TASK_PAIRS))),
        moves=_moves(store, chain, compared),
    )
    if (pairs := sum(file.rows for file in files)) <= TASK_PAIRS:
        told = run_tasks(_decide_all, [0], grouping, title="groups", memory=DECIDE_BYTES * pairs)
    else:
        told = _decide_in_buckets(grouping)
    grouping = replace(grouping, buckets=len(told))
    rows = np.sum([one.rows for one in told], axis=0)
    memory = WRITE_BYTES * int(rows.max(initial=0))
    run_tasks(_write_run, range(grouping.runs), grouping, title="dropped rows", memory=memory)

    beyond = Counter[int]()
    for file in files:
        beyond[file.link] += file.beyond
    dropped = sum((Counter(one.dropped) for one in told), Counter[str]())
    return Found(
        dropped=dict(sorted(dropped.items())),
        pairs=sum(one.pairs for one in told),
        groups=sum(one.groups for one in told),
        largest=_largest([group for one in told for group in one.largest], compared),
        largest_cell=max(file.largest_cell for file in files if file.link == len(chain) - 1),
        beyond=max(beyond.values()),
    )


def forget_grouping(store: Store, folder: str) -> None:
    """Remove what the tasks had for one another: all is written."""
    remove_parts(store, f"{folder}/grouping")


def _decide_in_buckets(grouping: _Grouping) -> list[_Told]:
    sources = range(len(grouping.sources))
    most = max(sum(file.rows for file in some) for some in grouping.sources)
    rows = run_tasks(_plant, sources, grouping, title="forests", memory=PLANT_BYTES * most)
    memory = JOIN_BYTES * sum(rows) + FOREST_BYTES * max(rows)
    (pairs,) = run_tasks(_join, [sum(rows)], grouping, title="forests joined", memory=memory)
    grouping = replace(grouping, buckets=len(pairs))
    run_tasks(_spread, sources, grouping, title="pairs by group", memory=SPREAD_BYTES * most)
    told: dict[int, _Told] = {}
    # Apart, lest all ask for as much memory as the one with a giant group.
    for giant in (False, True):
        some = [bucket for bucket, count in enumerate(pairs) if (count > 2 * grouping.most_pairs) == giant]
        memory = DECIDE_BYTES * max((pairs[bucket] for bucket in some), default=0)
        told |= zip(some, run_tasks(_decide_bucket, some, grouping, title="groups", memory=memory), strict=True)
    return [told[bucket] for bucket in range(len(pairs))]


def _pool_shards(compared: Compared) -> int:
    return sum(generation != EVALUATION for generation in compared.generations)


def _files(store: Store, chain: Sequence[str]) -> list[_File]:
    """All files of pairs, by their footers."""
    found = [
        (link, *names)
        for link, (_, pairs, nodes) in enumerate(chain_files(store, chain))
        for names in zip(pairs, nodes, strict=True)
    ]
    with ThreadPoolExecutor(READERS) as threads:
        said = threads.map(lambda file: describe_records(store, file[1]), found)
        return [
            _File(link=link, pairs=pairs, nodes=nodes, rows=rows, **facts)
            for (link, pairs, nodes), (rows, facts) in zip(found, said, strict=True)
        ]


def _moves(store: Store, chain: Sequence[str], compared: Compared) -> tuple[tuple[Ints, Ints], ...]:
    own = compared.shards[: _pool_shards(compared)]
    starts = {shard.key: start for shard, start in zip(own, compared.starts.tolist(), strict=False)}
    moves = []
    for shards in (*(load_pool(store, folder.rpartition("/")[2]).shards for folder in chain[:-1]), own):
        old = np.cumsum([0, *(shard.rows for shard in shards)])
        # Where each of its shards begins now, and where the evaluation sets do, which follow.
        new = np.array([*(starts[shard.key] for shard in shards), compared.starts[len(own)]])
        moves.append((old, new))
    return tuple(moves)


def _moved(grouping: _Grouping, file: _File, ids: Ints) -> Ints:
    old, new = grouping.moves[file.link]
    at = np.searchsorted(old, ids, side="right") - 1
    return ids - old[at] + new[at]


def _read_pairs(grouping: _Grouping, source: int) -> Pairs:
    """The pairs of a task's files, by id."""
    found = [np.empty(0, PAIR)]
    for file in grouping.sources[source]:
        pairs = read_records(grouping.store, file.pairs, PAIR)
        for end in ("better", "worse"):
            pairs[end] = _moved(grouping, file, pairs[end])
        found.append(pairs)
    return np.concatenate(found)


def _read_nodes(grouping: _Grouping, source: int) -> Nodes:
    """The rows of these pairs, by id, each once."""
    found = [np.empty(0, NODE)]
    for file in grouping.sources[source]:
        nodes = read_records(grouping.store, file.nodes, NODE)
        nodes["id"] = _moved(grouping, file, nodes["id"])
        found.append(nodes)
    return nodes_once(np.concatenate(found))


def _plant(source: int, grouping: _Grouping) -> int:
    """Write the forest of some files of pairs; returns the number of its rows."""
    name = grouping.name("forest", source)
    if grouping.store.exists(name):
        return len(_forest(grouping.store, name).ids)
    forest = plant(_read_pairs(grouping, source))
    write_parts(grouping.store, name, [pack_arrays(forest.ids, forest.head, forest.pairs)], count=1)
    return len(forest.ids)


def _forest(store: Store, name: str) -> Forest:
    ids, head, pairs = unpack_arrays(read_part(store, name, 0))
    return Forest(ids=ids, head=head, pairs=pairs)


def _join(rows: int, grouping: _Grouping) -> list[int]:
    """Write for each forest the buckets of its rows; returns how many pairs each bucket has."""
    store, name = grouping.store, grouping.name("buckets", 0)
    count = len(grouping.sources)

    def forests() -> Iterator[Forest]:
        return (_forest(store, name) for name in grouping.names("forest", count))

    if not store.exists(name):
        buckets = join(forests, rows, grouping.most_pairs)
        parts = (pack_arrays(buckets.of(forest.ids)) for forest in forests())
        write_parts(store, name, chained(parts, [pack_arrays(buckets.pairs)]), count=count + 1)
    (pairs,) = unpack_arrays(read_part(store, name, count))
    return list(map(int, pairs))


def _spread(source: int, grouping: _Grouping) -> None:
    """Write the pairs of some files, and their rows, for the buckets."""
    name = grouping.name("spread", source)
    if grouping.store.exists(name):
        return
    nodes, pairs = _read_nodes(grouping, source), _read_pairs(grouping, source)
    (bucket,) = unpack_arrays(read_part(grouping.store, grouping.name("buckets", 0), source))
    of_pairs = bucket[np.searchsorted(nodes["id"], pairs["better"])]
    parts = zip(
        by_destination(of_pairs, grouping.buckets, lambda at: pack_arrays(pairs[at])),
        by_destination(bucket, grouping.buckets, lambda at: pack_arrays(nodes[at])),
        strict=True,
    )
    write_parts(grouping.store, name, (b"".join(both) for both in parts), count=grouping.buckets)


def _decide_bucket(bucket: int, grouping: _Grouping) -> _Told:
    """Decide on the groups of a bucket, unless that was done."""

    def read() -> tuple[Pairs, Nodes]:
        names = grouping.names("spread", len(grouping.sources))
        parts = [unpack_arrays(part) for part in read_parts(grouping.store, names, bucket)]
        pairs, nodes = (np.concatenate(some) for some in zip(*parts, strict=True))
        return pairs, nodes_once(nodes)

    return _decide(bucket, grouping, read)


def _decide_all(bucket: int, grouping: _Grouping) -> _Told:
    """Decide on all groups, unless that was done: so few pairs have one source."""
    return _decide(bucket, grouping, lambda: (_read_pairs(grouping, 0), _read_nodes(grouping, 0)))


def _decide(bucket: int, grouping: _Grouping, read: Callable[[], tuple[Pairs, Nodes]]) -> _Told:
    """Write what leaves, a part for each run of shards, and what is told of it."""
    store, name, runs = grouping.store, grouping.name("decided", bucket), grouping.runs
    if not store.exists(name):
        rows, told = _decided(*read(), grouping)
        run = grouping.compared.shards_of(rows["id"]) // DROPPED_SHARDS
        told |= {"rows": np.bincount(run, minlength=runs).tolist()}
        parts = by_destination(run, runs, lambda at: pack_arrays(rows[at]))
        write_parts(store, name, chained(parts, [seal(told)]), count=runs + 1)
    told = unseal(read_part(store, name, runs), name)
    return _Told(**told | {"largest": [LargestGroup(**group) for group in told["largest"]]})


def _decided(pairs: Pairs, nodes: Nodes, grouping: _Grouping) -> tuple[npt.NDArray[np.void], dict[str, Any]]:
    """The rows that leave, of `DROPPED`, and what is told of them."""
    tiers = grouping.compared.tiers(nodes["id"])
    order = in_rank_order(nodes, tiers)
    rank = np.argsort(order)
    ends = np.stack([rank[np.searchsorted(nodes["id"], pairs[end])] for end in ("better", "worse")])
    pairs["better"], pairs["worse"] = ends.min(axis=0), ends.max(axis=0)
    nodes, tiers = nodes[order], tiers[order]
    del ends, rank, order
    pairs = each_once(pairs)
    decisions = decide(pairs, tiers, grouping.rule)
    rows = dropped_rows(decisions, nodes["id"])
    sizes = np.bincount(decisions.group, minlength=len(nodes))
    heads = np.flatnonzero(sizes > 1)
    heads = heads[np.lexsort([heads, -sizes[heads]])][:LARGEST]
    return rows, {
        "dropped": Counter(decisions.reason.tolist()),
        "pairs": len(pairs),
        "groups": int((sizes > 1).sum()),
        "largest": [
            {
                "size": int(sizes[head]),
                "head": nodes[head].tolist(),
                "ids": nodes["id"][np.flatnonzero(decisions.group == head)[:MEASURED]].tolist(),
            }
            for head in heads
        ],
    }


def _largest(found: Sequence[LargestGroup], compared: Compared) -> list[LargestGroup]:
    """The largest of all buckets."""
    heads = np.array([tuple(group.head) for group in found], NODE)
    rank = np.argsort(in_rank_order(heads, compared.tiers(heads["id"])))
    return [found[i] for i in np.lexsort([rank, -np.array([group.size for group in found])])[:LARGEST]]


def _write_run(run: int, grouping: _Grouping) -> None:
    """Write what leaves of a run of shards, in the order of the pool."""
    names = grouping.names("decided", grouping.buckets)
    parts = read_parts(grouping.store, names, run)
    rows = np.concatenate([np.empty(0, DROPPED), *(unpack_arrays(part)[0] for part in parts)])
    rows = rows[np.argsort(rows["id"])]
    columns: list[npt.NDArray[np.generic]] = []
    for end in ENDS:
        shard = grouping.compared.shards_of(rows[end])
        columns += [shard.astype(np.int32), rows[end] - grouping.compared.starts[shard]]
    shard, row, *others = map(pa.array, columns)
    reason = pa.array(REASONS).take(pa.array(rows["why"].astype(np.int64)))
    table = [shard, row, reason, *others[:2], pa.array(np.ascontiguousarray(rows["cosine"])), *others[2:]]
    write_dropped(grouping.store, grouping.folder, run, pa.Table.from_arrays(table, schema=DROPPED_SCHEMA))
