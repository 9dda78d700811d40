"""Forests and buckets: whatever the pairs are cut into, the same rows leave, and no group is cut."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.dedup import files
from curate.dedup.files import made_with, nodes_name, pairs_name, read_dropped, write_records
from curate.dedup.forests import join, plant
from curate.dedup.grouping import EVALUATION, NODE, PAIR, Nodes, Pairs, Rule, in_rank_order
from curate.errors import DamagedError, UserError
from curate.pipelines import grouping
from curate.pipelines.grouping import forget_grouping, group_pairs
from curate.pipelines.neighbours import Compared
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.sealed import seal
from curate.storage import Store
from tests.stand_in import without_ray
from tests.test_grouping import Graph, connected, literal_kept

__all__ = ["without_ray"]

COLUMNS = Columns(image="jpg", caption="caption", uid=None)
OLD = {"b": 30, "d": 20}
POOL = {"a": 10, "b": 30, "c": 25, "d": 20}
HELD_OUT = {"test": 15}
"""Rows by name of shard: of an earlier pool, of the pool, of an evaluation set."""


def pairs_of(edges: list[tuple[int, int]]) -> Pairs:
    return np.array([(*edge, 0.97, 0) for edge in edges], PAIR)


@given(
    files=st.lists(st.lists(st.sampled_from(list(combinations(range(3, 40, 4), 2))), min_size=1), min_size=1),
    most=st.integers(1, 9),
)
def test_rows_that_pairs_connect_share_a_bucket(files: list[list[tuple[int, int]]], most: int) -> None:
    forests = [plant(pairs_of(edges)) for edges in files]
    for forest, edges in zip(forests, files, strict=True):
        for row, head in zip(forest.ids.tolist(), forest.ids[forest.head].tolist(), strict=True):
            assert head == min(connected(set(edges), row))
        assert forest.pairs.sum() == len(edges)
    buckets = join(lambda: iter(forests), sum(len(forest.ids) for forest in forests), most)
    edges = {edge for some in files for edge in some}
    rows = sorted({row for edge in edges for row in edge})
    number = dict(zip(rows, buckets.of(np.array(rows)).tolist(), strict=True))
    groups = {row: min(connected(edges, row)) for row in rows}
    assert all(number[row] == number[head] for row, head in groups.items())
    assert sorted(set(number.values())) == list(range(len(buckets.pairs)))
    held = [sum(number[a] == bucket for some in files for a, _ in some) for bucket in range(len(buckets.pairs))]
    assert held == buckets.pairs.tolist()
    # A bucket is no larger than it must be: without its last group it has fewer pairs than it may have.
    for bucket in range(len(buckets.pairs)):
        last = max(head for row, head in groups.items() if number[row] == bucket)
        assert held[bucket] - sum(groups[a] == last for some in files for a, _ in some) < most


def pool_of(rows: dict[str, int]) -> Pool:
    shards = [
        Shard(index=index, name=name, path=name, size=1, version="1", rows=count, columns=COLUMNS)
        for index, (name, count) in enumerate(rows.items())
    ]
    return Pool(shards=tuple(shards), columns=COLUMNS, schema=pa.schema([]), ignored=(), skipped=())


@dataclass(frozen=True, kw_only=True)
class World:
    """Pairs of an earlier pool and of a grown one, in three files each, some of them twice."""

    chain: list[str]
    compared: Compared
    nodes: Nodes
    """Of all rows; by id."""
    pairs: Pairs
    """By id, as they lie in some file."""


def two_deduplications(store: Store, seed: int, *, stand: bool = True) -> World:
    """Draw a world at random."""
    rng = np.random.default_rng(seed)
    pools = [pool_of(OLD), pool_of(POOL)]
    chain = [f"dedup/s/{pool.fingerprint}" for pool in pools]
    names = [(name, row) for name, count in (POOL | HELD_OUT).items() for row in range(count)]
    nodes = np.zeros(len(names), NODE)
    nodes["id"] = np.arange(len(names))
    nodes["score"], nodes["pixels"] = rng.integers(3, size=len(names)), rng.integers(2, size=len(names))
    nodes["uid"], nodes["key"] = rng.integers(2**63, size=(2, len(names)), dtype=np.uint64) * 2
    edges = [(int(a), int(b)) for a, b in rng.integers(len(names), size=(55, 2)) if a != b]
    edges = [(a, b) for a, b in edges if {names[a][0], names[b][0]} != {"test"}]
    old = [{names[end][0] for end in edge} <= {*OLD, *HELD_OUT} for edge in edges]
    near = np.zeros(len(edges), PAIR)
    near["better"], near["worse"] = np.array(edges).T
    near["kind"] = rng.choice([0, 0, 0, 1, 2], len(edges))
    near["cosine"] = np.where(near["kind"] > 0, 1, rng.choice([0.96, 0.97], len(edges)))
    found = []
    for link, (pool, rows) in enumerate(((pools[0], OLD), (pools[1], POOL))):
        store.put_bytes(f"pools/{pool.fingerprint}.json", pool.to_bytes())
        store.put_bytes(f"{chain[link]}/counts.json", seal({"tasks": 3}))
        here = [(name, row) for name, count in (rows | HELD_OUT).items() for row in range(count)]
        mine = np.flatnonzero(np.array(old) == (link == 0))
        for task in range(3):
            some = mine[rng.random(len(mine)) < (0.5 if task else 0.9)]
            pairs = near[some]
            found.append(pairs.copy())
            ends = np.array([edges[i] for i in some], np.int64).reshape(-1, 2)
            pairs["better"], pairs["worse"] = ([here.index(names[i]) for i in end] for end in ends.T)
            own = nodes[np.unique(ends)]
            own["id"] = [here.index(names[i]) for i in np.unique(ends)]
            write_records(store, nodes_name(chain[link], task), own[np.argsort(own["id"])])
            facts = {"largest_cell": 10 * link + task, "beyond": task}
            write_records(store, pairs_name(chain[link], task), pairs, **facts)
    generations = (*(0 if name in OLD else 1 for name in POOL), *(EVALUATION for _ in HELD_OUT))
    shards = pools[1].shards + pool_of(HELD_OUT).shards
    compared = Compared(shards=shards, generations=generations, newest=1, stand=stand)
    return World(chain=chain, compared=compared, nodes=nodes, pairs=np.concatenate(found))


def literally_dropped(world: World, rule: Rule) -> set[tuple[str, int]]:
    """By the oracle of tests/test_grouping.py, from all pairs at once."""
    tiers = world.compared.tiers(world.nodes["id"])
    order = in_rank_order(world.nodes, tiers)
    rank = np.argsort(order)
    graph: Graph = {}
    for better, worse, cosine, kind in world.pairs.tolist():
        ends = sorted((int(rank[better]), int(rank[worse])))
        graph[ends[0], ends[1]] = (cosine, max(kind, graph.get((ends[0], ends[1]), (0, 0))[1]))
    ranked = tiers[order].tolist()
    gone = {row for row, tier in enumerate(ranked) if tier != EVALUATION} - set(literal_kept(graph, ranked, rule))
    places = [(shard.name, row) for shard in world.compared.shards for row in range(shard.rows)]
    return {places[int(order[row])] for row in gone}


def dropped_files(store: Store, folder: str) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.list(folder) if "/dropped-" in name}


@pytest.fixture
def two_shards_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, grouping):
        monkeypatch.setattr(module, "DROPPED_SHARDS", 2)


@pytest.mark.usefixtures("without_ray", "two_shards_a_file")
@pytest.mark.parametrize("stand", [True, False])
@pytest.mark.parametrize("rule", ["components", "greedy"])
@pytest.mark.parametrize("seed", range(6))
def test_any_number_of_buckets_drops_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule, seed: int, stand: bool
) -> None:
    store = Store(str(tmp_path))
    world = two_deduplications(store, seed, stand=stand)
    chain, compared = world.chain, world.compared
    told, dropped, buckets = [], [], []
    for most in (1000, 60, 20, 7, 1):
        monkeypatch.setattr(grouping, "TASK_PAIRS", most)
        told.append(group_pairs(store, chain, compared, rule))
        dropped.append(dropped_files(store, chain[-1]))
        buckets.append(len([name for name in store.list(chain[-1]) if "-decided-" in name]))
        forget_grouping(store, chain[-1])
        assert not [name for name in store.list(chain[-1]) if "grouping" in name]
    assert buckets[0] == 1
    assert buckets[1:] == sorted(buckets[1:])
    assert buckets[-1] > 10
    assert [found == told[0] for found in told] == [True] * 5
    assert [files == dropped[0] for files in dropped] == [True] * 5
    assert len(dropped[0]) == 2
    assert (told[0].largest_cell, told[0].beyond) == (12, 3)
    rows = [row for shard in compared.shards[:4] for row in read_dropped(store, chain[-1], shard).to_pylist()]
    assert len(rows) == sum(told[0].dropped.values()) > 10
    assert {(compared.shards[row["shard"]].name, row["row"]) for row in rows} == literally_dropped(world, rule)
    assert [(row["shard"], row["row"]) for row in rows] == sorted((row["shard"], row["row"]) for row in rows)


class KilledError(Exception):
    """The process ended here."""


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("most", [1000, 7])
def test_a_killed_grouping_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(grouping, "TASK_PAIRS", most)
    store = Store(str(tmp_path))
    world = two_deduplications(store, 0)
    folder = world.chain[-1]
    written: list[str] = []
    left = 10**6
    real = Store.put_file

    def put_file(self: Store, path: Any, name: str) -> None:
        if len(written) == left:
            raise KilledError
        real(self, path, name)
        written.append(name)

    monkeypatch.setattr(Store, "put_file", put_file)
    found = group_pairs(store, world.chain, world.compared, "components")
    whole, dropped = list(written), dropped_files(store, folder)
    forget_grouping(store, folder)
    for end in range(len(whole)):
        left = end
        for name in dropped:
            store.delete(name)
        written.clear()
        with pytest.raises(KilledError):
            group_pairs(store, world.chain, world.compared, "components")
        first = list(written)
        left = 10**6
        written.clear()
        assert group_pairs(store, world.chain, world.compared, "components") == found
        assert [*first, *written] == whole  # nothing is done twice
        assert dropped_files(store, folder) == dropped
        forget_grouping(store, folder)


@pytest.mark.usefixtures("without_ray")
def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "TASK_PAIRS", 7)
    store = Store(str(tmp_path))
    world = two_deduplications(store, 0)
    found = group_pairs(store, world.chain, world.compared, "components")
    dropped = dropped_files(store, world.chain[-1])
    for kind in ("forest", "buckets", "spread", "decided"):
        again = [name for name in store.list(world.chain[-1]) if "-decided-" in name and kind != "decided"]
        for name in [*again, *dropped]:
            store.delete(name)
        name = next(name for name in store.list(world.chain[-1]) if f"-{kind}-" in name)
        data = store.read_bytes(name)
        store.put_bytes(name, data[:-1] + bytes([data[-1] ^ 1]))
        if kind in ("forest", "buckets"):  # read by whoever has not written yet
            for other in store.list(world.chain[-1]):
                if "-spread-" in other or (kind == "forest" and "-buckets-" in other):
                    store.delete(other)
        with pytest.raises(DamagedError) as told:
            group_pairs(store, world.chain, world.compared, "components")
        assert told.value.name == name
        for gone in made_with(store, name):
            store.delete(gone)
        assert group_pairs(store, world.chain, world.compared, "components") == found
        assert dropped_files(store, world.chain[-1]) == dropped


def test_what_goes_with_a_damaged_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    own = ("cells.npy", "counts.json", "dedup.json", "dropped-000000.parquet", "grouping-7-spread-000000")
    for name in (*own, "nodes-000000.parquet", "pairs-000000.parquet"):
        store.put_bytes(f"dedup/s/p/{name}", b"")

    def gone(name: str) -> list[str]:
        return [found.rpartition("/")[2] for found in made_with(store, f"dedup/s/p/{name}")]

    assert gone("dropped-000000.parquet") == ["dedup.json", "dropped-000000.parquet"]
    assert gone("grouping-7-spread-000000") == ["dedup.json", "grouping-7-spread-000000"]
    # What was found anew may differ on another device: nothing that was grouped by the old one is left.
    grouped = ["dedup.json", "grouping-7-spread-000000"]
    assert gone("pairs-000000.parquet") == [*grouped, "pairs-000000.parquet"]
    assert gone("nodes-000000.parquet") == [*grouped, "pairs-000000.parquet", "nodes-000000.parquet"]
    pairs = ["nodes-000000.parquet", "pairs-000000.parquet"]
    assert gone("counts.json") == [*grouped, *pairs, "cells.npy", "counts.json"]


def test_dropped_rows_that_are_gone_are_told(tmp_path: Path) -> None:
    store, shard = Store(str(tmp_path)), pool_of(POOL).shards[0]
    store.put_bytes("dedup/s/p/dropped.parquet", b"of version 1")
    with pytest.raises(UserError, match=r"dropped-000000\.parquet: expected the rows .*, found no such file; restore"):
        read_dropped(store, "dedup/s/p", shard)
