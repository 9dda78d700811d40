"""Near neighbours, scaled out: rows travel from shards to the cells, which independent tasks search.

    embeddings -> sample -> cells -> each row to its cell and to those that it borders on -> pairs

What a task holds: a group of shards, or k-means' sample, or a group of cells, and nothing that grows with the pool
before its rows are so many that tasks must take more of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from curate.dedup import nodes_name, pairs_name, read_cells, read_counts, write_cells, write_records
from curate.embeddings import check_schema, contents, embedding_name, read_embeddings, vectors
from curate.errors import UserError
from curate.grouping import EVALUATION, NODE, PAIR, Nodes, Pairs, collapse, each_once, in_rank_order, nodes_once, thin
from curate.neighbours import Cells, Places, Threshold, cell_count, near_pairs, sample_share, train_cells, unit_rows
from curate.parquet import open_table
from curate.pool import Shard
from curate.seeds import derive_seed
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.walk import END, walk_keys
from pipelines.cluster import Devices, device, exchange, fetch, groups

ROWS_PER_TASK = 65_536
"""Rows of the cells that one task searches."""
MOST_TASKS = 1024
"""From 67 million rows on each task searches more: every group of shards sends a part to every task."""
MOST_PAIRS = 2**22
"""Pairs that a searching task holds before it thins them: 88 MiB."""
SCORED = 8192
"""Rows that are scored at once."""

R = TypeVar("R")
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Halves = npt.NDArray[np.uint64]
Vectors = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Compared:
    """All rows that are compared: the pool's, then those of evaluation sets, numbered (`id`) shard after shard."""

    shards: tuple[Shard, ...]
    generations: tuple[int, ...]
    """Of each shard: number of the deduplication that saw it first; `EVALUATION` for those of evaluation sets."""
    newest: int
    """Number of this deduplication."""
    stand: bool
    """Whether decisions on earlier generations stand."""

    @cached_property
    def starts(self) -> Ints:
        """Id of each shard's first row, then the number of all rows."""
        return np.array([0, *accumulate(shard.rows for shard in self.shards)])

    def places(self, ids: Ints) -> Ints:
        """Places, in `shards`, of the shards that rows lie in: [n]."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def tiers(self, ids: Ints) -> Ints:
        """Tiers by which rows are ranked before all else: [n]."""
        generations = np.array(self.generations, np.int64)[self.places(ids)]
        return generations if self.stand else np.minimum(generations, 0)

    def fresh(self, ids: Ints) -> Bools:
        """Whether no earlier deduplication compared a row: [n]."""
        generations = np.array(self.generations, np.int64)[self.places(ids)]
        return np.asarray(generations == (self.newest or generations))

    def sources(self) -> list[list[int]]:
        """Places of the shards that each splitting task reads."""
        sizes = [len(group) for group in groups(self.shards)]
        return [list(range(stop - size, stop)) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows with what they are compared by: arrays [n, …]."""

    nodes: Nodes
    content: Halves
    picture: Halves
    zimg: Vectors
    ztxt: Vectors
    """[n, 0] where captions do not matter."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a group of shards sends to a group of cells."""

    rows: Rows
    places: Places
    pairs: Pairs
    """Copies within the shards, by id."""
    nodes: Nodes
    """Of these."""


def find_pairs(
    store: Store, folder: str, reference: EncoderSpec, threshold: Threshold, compared: Compared, devices: Devices
) -> None:
    """Write every pairs file of a deduplication that is missing, and before them its cells.

    Args:
        store: the root.
        folder: of the deduplication.
        reference: its embedding files are complete.
        threshold: of near-duplicates.
        compared: the rows.
        devices: what searches.

    Raises:
        UserError: an embedding file was written by a version that did not hash pictures.
    """
    rows = int(compared.starts[-1])
    if read_cells(store, folder) is None:
        _make_cells(store, folder, reference, compared, cell_count(rows), devices)
    count = len(_cells(store, folder).centroids)
    tasks = read_counts(store, folder)["tasks"]
    there = set(store.list(folder))
    todo = [task for task in range(tasks) if pairs_name(folder, task) not in there]
    captions = threshold.caption is not None

    def split(places: list[int]) -> Iterator[_Part]:
        rows = concatenate([_load(store, reference, compared, place, captions=captions) for place in places])
        order = in_rank_order(rows.nodes, compared.tiers(rows.nodes["id"]))
        kept, copies = collapse(rows.content[order], None if captions else rows.picture[order])
        pairs, nodes = _by_id(copies, rows.nodes[order], compared)
        rows = take(rows, order[kept])
        places_of = _cells(store, folder).place(rows.zimg, threshold.image, device())
        near = np.column_stack([places_of.home, places_of.border])
        for task in todo:
            meant = ((near % tasks == task) & (near >= 0)).any(axis=1)
            mine = pairs[pairs["better"] % tasks == task]
            used = np.isin(nodes["id"], np.concatenate([mine["better"], mine["worse"]]))
            yield _Part(rows=take(rows, meant), places=take(places_of, meant), pairs=mine, nodes=nodes[used])

    def join(task: int, parts: Sequence[_Part]) -> None:
        rows, places_of = (concatenate([getattr(part, name) for part in parts]) for name in ("rows", "places"))
        mine = range(task, count, tasks)
        pairs, nodes = _by_id(*search_cells(rows, places_of, mine, threshold, compared), compared)
        at_home = np.isin(places_of.home, mine)
        write_records(store, nodes_name(folder, task), nodes_once(np.concatenate([nodes, *(p.nodes for p in parts)])))
        # Last, for it says that the task is done.
        write_records(
            store,
            pairs_name(folder, task),
            each_once(np.concatenate([pairs, *(part.pairs for part in parts)])),
            largest_cell=int(np.bincount(places_of.home[at_home], minlength=1).max()),
            beyond=int(places_of.beyond[at_home].sum()),
        )

    fetch(
        exchange(
            compared.sources(),
            lambda places: list(split(places)),
            todo,
            join,
            title="near-duplicates",
            devices=devices,
            # Vectors as they come, all of them, and those of a cell in float32; home rows and about half as many that
            # border on them. And the pairs, before and after they are thinned.
            join_memory=(3 * rows // (2 * tasks)) * reference.embed_dim * 2 * 4 + 3 * MOST_PAIRS * PAIR.itemsize,
        )
    )


def take(record: R, rows: Any) -> R:
    """Some rows of a record of arrays."""
    return type(record)(**{field.name: getattr(record, field.name)[rows] for field in fields(record)})  # type: ignore[arg-type]


def concatenate(records: Sequence[R]) -> R:
    """The rows of all records of arrays."""
    names = [field.name for field in fields(records[0])]  # type: ignore[arg-type]
    return type(records[0])(**{name: np.concatenate([getattr(r, name) for r in records]) for name in names})


def load_images(store: Store, reference: EncoderSpec, compared: Compared, ids: Ints) -> npt.NDArray[np.float32]:
    """Unit rows [n, D] of the images with these ids, ascending, all of which have one."""
    found = []
    for place in np.unique(compared.places(ids)).tolist():
        rows = ids[compared.places(ids) == place] - compared.starts[place]
        table = read_embeddings(store, embedding_name(reference.sha, compared.shards[place]), ["zimg"])
        column = table["zimg"].take(pa.array(rows))
        found.append(unit_rows(vectors(column, reference.embed_dim)))
    return np.concatenate(found)


def _cells(store: Store, folder: str) -> Cells:
    array = read_cells(store, folder)
    assert array is not None, folder
    return Cells.from_array(array)


def _make_cells(
    store: Store, folder: str, reference: EncoderSpec, compared: Compared, cells: int, devices: Devices
) -> None:
    """Train the cells on a sample that depends on nothing but the contents of the rows; count the rows on the way."""
    seed = derive_seed(0, "cells")
    share = sample_share(int(compared.starts[-1]), cells)
    high = int(END * share)

    def split(places: list[int]) -> list[tuple[Halves, Vectors, Counter[str], Counter[str], int]]:
        sampled, statuses, held_out, unsound = [], Counter[str](), Counter[str](), 0
        for place in places:
            table, zimg, _, found, bad = _read_sound(store, reference, compared.shards[place])
            if compared.generations[place] == EVALUATION:
                held_out += found
            else:
                statuses += found
                unsound += bad
            content = contents(table["content"])
            keys = walk_keys(content, seed=seed, epoch=0)
            chosen = keys < np.uint64(high) if high < END else np.ones(len(keys), bool)
            sampled.append((content[chosen], zimg[chosen]))
        return [(*_distinct(sampled), statuses, held_out, unsound)]

    def join(_: None, parts: Sequence[tuple[Halves, Vectors, Counter[str], Counter[str], int]]) -> None:
        trained = train_cells(unit_rows(_distinct([part[:2] for part in parts])[1]), cells, device())
        statuses, held_out = (sum((part[i] for part in parts), Counter[str]()) for i in (2, 3))
        tasks = max(1, min(len(trained.centroids), MOST_TASKS, int(compared.starts[-1]) // ROWS_PER_TASK))
        counts = {
            "statuses": statuses,
            "evaluation_statuses": held_out,
            "unsound": sum(part[4] for part in parts),
            "tasks": tasks,
        }
        write_cells(store, folder, trained.to_array(), counts)

    # The sample in float16 twice, and in float32, which k-means copies.
    sample_bytes = int(share * compared.starts[-1]) * reference.embed_dim * (2 * 2 + 2 * 4)
    fetch(exchange(compared.sources(), split, [None], join, title="cells", devices=devices, join_memory=sample_bytes))


def _distinct(parts: Sequence[tuple[Halves, Vectors]]) -> tuple[Halves, Vectors]:
    """Contents and images of several parts in the order of the contents, equal ones once: copies are drawn together."""
    content, zimg = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort(content.T)
    first = np.ones(len(order), bool)
    first[1:] = (content[order[1:]] != content[order[:-1]]).any(axis=1)
    return content[order[first]], zimg[order[first]]


def _read_sound(
    store: Store, reference: EncoderSpec, shard: Shard
) -> tuple[pa.Table, Vectors, Vectors, Counter[str], int]:
    """The usable rows of a shard: their columns with one more, `row`; images, captions.

    And all its rows counted by status; and the number of those whose vectors are unsound though their status is ok.
    """
    name = embedding_name(reference.sha, shard)
    with open_table(store, name) as parquet:
        if "picture" not in parquet.schema_arrow.names:
            raise UserError(
                f"{name}: expected a column picture, found a file of an older version, which had none; delete the "
                f"folder embeddings/{reference.sha} and run again"
            )
        check_schema(name, parquet.schema_arrow)
        table = parquet.read(["uid", "status", "content", "picture", "width", "height", "zimg", "ztxt"])
    status = table["status"].to_pylist()
    zimg, ztxt = (vectors(table[name], reference.embed_dim) for name in ("zimg", "ztxt"))
    ok = np.array([text == "ok" for text in status], bool)
    sound = ok & np.logical_and.reduce([np.isfinite(z).all(axis=1) & z.any(axis=1) for z in (zimg, ztxt)])
    row = np.flatnonzero(sound)
    table = table.drop_columns(["zimg", "ztxt"]).take(pa.array(row)).append_column("row", pa.array(row))
    return table, zimg[row], ztxt[row], Counter(status), int(ok.sum() - sound.sum())


def _load(store: Store, reference: EncoderSpec, compared: Compared, place: int, *, captions: bool) -> Rows:
    """The usable rows of a shard, with what ranks them."""
    shard = compared.shards[place]
    table, zimg, ztxt, _, _ = _read_sound(store, reference, shard)
    row = table["row"].to_numpy()
    nodes = np.empty(len(row), NODE)
    nodes["id"] = compared.starts[place] + row
    nodes["score"] = _scores(zimg, ztxt)
    nodes["pixels"] = np.multiply(*(table[side].to_numpy().astype(np.int64) for side in ("width", "height")))
    nodes["uid"] = [_hash(uid or "") for uid in table["uid"].to_pylist()]
    nodes["place"] = walk_keys(
        np.column_stack([np.full(len(row), _hash(shard.key), np.uint64), row.astype(np.uint64)]), seed=0, epoch=0
    )
    return Rows(
        nodes=nodes,
        content=contents(table["content"]),
        picture=contents(table["picture"]),
        zimg=zimg,
        ztxt=ztxt if captions else ztxt[:, :0],
    )


def _scores(zimg: Vectors, ztxt: Vectors) -> npt.NDArray[np.float32]:
    """Cosine of each image and its caption [n]."""
    scores = np.empty(len(zimg), np.float32)
    for start in range(0, len(zimg), SCORED):
        at = slice(start, start + SCORED)
        scores[at] = (unit_rows(zimg[at]) * unit_rows(ztxt[at])).sum(axis=1)
    return scores


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _by_id(pairs: Pairs, nodes: Nodes, compared: Compared) -> tuple[Pairs, Nodes]:
    """Pairs by position in `nodes` as pairs by id, and their nodes; without pairs that say nothing new."""
    ids = nodes["id"]
    evaluation = compared.tiers(ids) == EVALUATION
    fresh = compared.fresh(ids)
    better, worse = pairs["better"], pairs["worse"]
    pairs = pairs[(fresh[better] | fresh[worse]) & ~evaluation[worse]]
    named = pairs.copy()
    named["better"], named["worse"] = ids[pairs["better"]], ids[pairs["worse"]]
    return named, nodes[np.unique(np.concatenate([pairs["better"], pairs["worse"]]))]


def search_cells(
    rows: Rows, places: Places, cells: Sequence[int], threshold: Threshold, compared: Compared
) -> tuple[Pairs, Nodes]:
    """Near-duplicates of some cells: of home rows with one another, and with those that border on the cell.

    Returns:
        Pairs by position, each once, and the nodes in these positions, which are those of the rows from the best to
        the worst.
    """
    order = in_rank_order(rows.nodes, compared.tiers(rows.nodes["id"]))
    rank = np.argsort(order)
    fresh = compared.fresh(rows.nodes["id"])
    evaluation = compared.tiers(rows.nodes["id"]) == EVALUATION
    captions = rows.ztxt.shape[1] > 0
    where = device()
    found = [np.empty(0, PAIR)]
    for cell in cells:
        home = places.home == cell
        here = np.flatnonzero(home | (places.border == cell).any(axis=1))
        here = here[np.argsort(rank[here])]
        kept, copies = collapse(rows.content[here], None if captions else rows.picture[here])
        copies["better"], copies["worse"] = rank[here[copies["better"]]], rank[here[copies["worse"]]]
        found.append(copies)
        here = here[kept]
        here = here[np.lexsort([~fresh[here], ~home[here]])]
        pairs = near_pairs(
            torch.from_numpy(unit_rows(rows.zimg[here])).to(where),
            torch.from_numpy(unit_rows(rows.ztxt[here])).to(where) if captions else None,
            threshold,
            inner=int(home[here].sum()),
            fresh=torch.from_numpy(fresh[here]).to(where),
            images_alone=torch.from_numpy(evaluation[here]).to(where),
        )
        for i, j, cosine in pairs:
            near = np.zeros(len(i), PAIR)
            one, other = rank[here[i]], rank[here[j]]
            near["better"], near["worse"], near["cosine"] = np.minimum(one, other), np.maximum(one, other), cosine
            found.append(near)
            if sum(map(len, found)) > MOST_PAIRS:
                found = [thin(each_once(np.concatenate(found)), evaluation[order])]
    return each_once(np.concatenate(found)), rows.nodes[order]
