"""Near neighbours, scaled out: rows travel from shards to the cells, which independent tasks search.

    embeddings -> sample -> cells -> each row to its cell and to those that it borders on -> pairs

What a task holds: a group of shards, or k-means' sample, or a group of cells, and nothing that grows with the pool
before its rows are so many that tasks must take more of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from curate.dedup.files import nodes_name, pairs_name, read_cells, read_counts, write_cells, write_records
from curate.dedup.grouping import (
    EVALUATION,
    NODE,
    PAIR,
    Nodes,
    Pairs,
    collapse,
    each_once,
    in_rank_order,
    nodes_once,
    thin,
)
from curate.dedup.neighbours import (
    Assignment,
    Cells,
    Threshold,
    cell_count,
    near_pairs,
    normalized,
    sample_share,
    train_cells,
    unit_rows,
)
from curate.embed.files import check_schema, contents, embedding_name, read_embeddings, vectors
from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.parquet import open_table
from curate.parts import pack_arrays, read_parts, remove_parts, unpack_arrays, write_parts
from curate.pipelines.cluster import Devices, device, groups, run_tasks
from curate.pool.shards import Shard
from curate.seeds import derive_seed
from curate.select.windows import END, row_keys
from curate.storage import Store

GROUP_ROWS = 65_536
"""Rows of the shards that one task reads."""
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

    def shards_of(self, ids: Ints) -> Ints:
        """Assignment, in `shards`, of the shards that rows lie in: [n]."""
        return np.searchsorted(self.starts, ids, side="right") - 1

    def tiers(self, ids: Ints) -> Ints:
        """Tiers by which rows are ranked before all else: [n]."""
        generations = np.array(self.generations, np.int64)[self.shards_of(ids)]
        return generations if self.stand else np.minimum(generations, 0)

    def fresh(self, ids: Ints) -> Bools:
        """Whether no earlier deduplication compared a row: [n]."""
        generations = np.array(self.generations, np.int64)[self.shards_of(ids)]
        return np.asarray(generations == (self.newest or generations))

    def sources(self) -> list[list[int]]:
        """Assignment of the shards that each splitting task reads."""
        sizes = [len(group) for group in groups(self.shards, GROUP_ROWS)]
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
class _Search:
    """What all tasks are given."""

    store: Store
    folder: str
    reference: EncoderSpec
    threshold: Threshold
    compared: Compared
    tasks: int
    """That search cells: at most so many before there are cells."""
    cells: int = 0
    sample: float = 0.0
    """Share of the rows that cells are trained on."""

    @property
    def captions(self) -> bool:
        """Whether captions matter."""
        return self.threshold.caption is not None

    @property
    def sources(self) -> int:
        """Groups of shards."""
        return len(self.compared.sources())

    def part_names(self, kind: str) -> list[str]:
        """Of the files of parts, by group of shards."""
        return [f"{self.folder}/{kind}-{number:06d}" for number in range(self.sources)]


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
    search = _Search(
        store=store,
        folder=folder,
        reference=reference,
        threshold=threshold,
        compared=compared,
        tasks=max(1, min(MOST_TASKS, rows // ROWS_PER_TASK)),
    )
    sources = list(enumerate(compared.sources()))
    if read_cells(store, folder) is None:
        cells = cell_count(rows)
        search = replace(search, cells=cells, sample=sample_share(rows, cells))
        found = run_tasks(_sample, sources, search, title="sample")
        # The sample in float16 twice, and in float32, which k-means copies.
        memory = int(search.sample * rows) * reference.embed_dim * (2 * 2 + 2 * 4)
        run_tasks(_train, [_summed(found)], search, title="cells", memory=memory, devices=devices)
    remove_parts(store, f"{folder}/sample")
    search = replace(search, tasks=read_counts(store, folder)["tasks"])
    there = set(store.list(folder))
    if todo := [task for task in range(search.tasks) if pairs_name(folder, task) not in there]:
        run_tasks(_assign, sources, search, title="cells of rows")
        # Vectors as they come, all of them, and those of a cell in float32; home rows and about half as many that
        # border on them. And the pairs, before and after they are thinned.
        memory = (3 * rows // (2 * search.tasks)) * reference.embed_dim * 2 * 4 + 3 * MOST_PAIRS * PAIR.itemsize
        run_tasks(_search, todo, search, title="near-duplicates", memory=memory, devices=devices)
    remove_parts(store, f"{folder}/assigned")


def _assign(item: tuple[int, Sequence[int]], search: _Search) -> None:
    """Write the rows of a group of shards for the tasks that search the cells which they lie in or border on."""
    number, positions = item
    name, compared = search.part_names("assigned")[number], search.compared
    if search.store.exists(name):
        return
    loaded = [_load(search.store, search.reference, compared, at, captions=search.captions) for at in positions]
    rows = concatenate(loaded)
    order = in_rank_order(rows.nodes, compared.tiers(rows.nodes["id"]))
    kept, copies = collapse(rows.content[order], None if search.captions else rows.picture[order])
    pairs, nodes = _by_id(copies, rows.nodes[order], compared)  # copies within the shards
    rows = take(rows, order[kept])
    assigned = _cells(search.store, search.folder).assign(rows.zimg, search.threshold.image, device())
    near = np.column_stack([assigned.home, assigned.border])

    def parts() -> Iterator[bytes]:
        for task in range(search.tasks):
            meant = ((near % search.tasks == task) & (near >= 0)).any(axis=1)
            mine = pairs[pairs["better"] % search.tasks == task]
            used = np.isin(nodes["id"], np.concatenate([mine["better"], mine["worse"]]))
            sent = (take(rows, meant), take(assigned, meant))
            yield pack_arrays(*(array for record in sent for array in arrays_of(record)), mine, nodes[used])

    write_parts(search.store, name, parts(), count=search.tasks)


def _search(task: int, search: _Search) -> None:
    """Write the pairs of the cells that one task searches."""
    parts = [unpack_arrays(part) for part in read_parts(search.store, search.part_names("assigned"), task)]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    width = len(fields(Rows))
    rows, assigned = record_of(Rows, columns[:width]), record_of(Assignment, columns[width:-2])
    mine = range(task, len(_cells(search.store, search.folder).centroids), search.tasks)
    pairs, nodes = _by_id(*search_cells(rows, assigned, mine, search.threshold, search.compared), search.compared)
    at_home = np.isin(assigned.home, mine)
    write_records(search.store, nodes_name(search.folder, task), nodes_once(np.concatenate([nodes, columns[-1]])))
    # Last, for it says that the task is done.
    write_records(
        search.store,
        pairs_name(search.folder, task),
        each_once(np.concatenate([pairs, columns[-2]])),
        largest_cell=int(np.bincount(assigned.home[at_home], minlength=1).max()),
        beyond=int(assigned.beyond[at_home].sum()),
    )


def record_of(kind: type[R], arrays: Sequence[npt.NDArray[Any]]) -> R:
    """The inverse of `arrays_of`."""
    return kind(**{field.name: array for field, array in zip(fields(kind), arrays, strict=True)})  # type: ignore[arg-type]


def arrays_of(record: Any) -> list[npt.NDArray[np.generic]]:
    """The arrays of a record, in the order of its fields."""
    return [getattr(record, field.name) for field in fields(record)]


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
    for at in np.unique(compared.shards_of(ids)).tolist():
        rows = ids[compared.shards_of(ids) == at] - compared.starts[at]
        table = read_embeddings(store, embedding_name(reference.sha, compared.shards[at]), ["zimg"])
        column = table["zimg"].take(pa.array(rows))
        found.append(unit_rows(vectors(column, reference.embed_dim)))
    return np.concatenate(found)


def _cells(store: Store, folder: str) -> Cells:
    array = read_cells(store, folder)
    assert array is not None, folder
    return Cells.from_array(array)


def _sample(item: tuple[int, Sequence[int]], search: _Search) -> tuple[Counter[str], Counter[str], int]:
    """Write a group's rows of the sample, which depends on nothing but their contents; returns all rows counted.

    Returns:
        Rows of the pool and of evaluation sets by status, and rows of the pool whose vectors are unsound.
    """
    number, positions = item
    seed, high = derive_seed(0, "cells"), int(END * search.sample)
    sampled, statuses, held_out, unsound = [], Counter[str](), Counter[str](), 0
    for at in positions:
        table, zimg, _, found, bad = _read_sound(search.store, search.reference, search.compared.shards[at])
        if search.compared.generations[at] == EVALUATION:
            held_out += found
        else:
            statuses += found
            unsound += bad
        content = contents(table["content"])
        keys = row_keys(content, seed=seed, epoch=0)
        chosen = keys < np.uint64(high) if high < END else np.ones(len(keys), bool)
        sampled.append((content[chosen], zimg[chosen]))
    write_parts(search.store, search.part_names("sample")[number], [pack_arrays(*_distinct(sampled))], count=1)
    return statuses, held_out, unsound


def _summed(found: Sequence[tuple[Counter[str], Counter[str], int]]) -> tuple[Counter[str], Counter[str], int]:
    statuses = sum((one[0] for one in found), Counter[str]())
    held_out = sum((one[1] for one in found), Counter[str]())
    return statuses, held_out, sum(one[2] for one in found)


def _train(counted: tuple[Counter[str], Counter[str], int], search: _Search) -> None:
    """Train the cells on the sample, and pin them."""
    parts = [unpack_arrays(part) for part in read_parts(search.store, search.part_names("sample"), 0)]
    sample = _distinct([(content, zimg) for content, zimg in parts])[1]
    trained = train_cells(unit_rows(sample), search.cells, device())
    statuses, held_out, unsound = counted
    counts = {
        "statuses": statuses,
        "evaluation_statuses": held_out,
        "unsound": unsound,
        "tasks": max(1, min(len(trained.centroids), search.tasks)),
    }
    write_cells(search.store, search.folder, trained.to_array(), counts)


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


def _load(store: Store, reference: EncoderSpec, compared: Compared, at: int, *, captions: bool) -> Rows:
    """The usable rows of a shard, with what ranks them."""
    shard = compared.shards[at]
    table, zimg, ztxt, _, _ = _read_sound(store, reference, shard)
    row = table["row"].to_numpy()
    nodes = np.empty(len(row), NODE)
    nodes["id"] = compared.starts[at] + row
    nodes["score"] = _scores(zimg, ztxt)
    nodes["pixels"] = np.multiply(*(table[side].to_numpy().astype(np.int64) for side in ("width", "height")))
    nodes["uid"] = [_hash(uid or "") for uid in table["uid"].to_pylist()]
    nodes["key"] = row_keys(
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
    rows: Rows, assigned: Assignment, cells: Sequence[int], threshold: Threshold, compared: Compared
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
    zimg, ztxt = torch.from_numpy(rows.zimg).to(where), torch.from_numpy(rows.ztxt).to(where)
    found = [np.empty(0, PAIR)]
    for cell in cells:
        home = assigned.home == cell
        here = np.flatnonzero(home | (assigned.border == cell).any(axis=1))
        here = here[np.argsort(rank[here])]
        kept, copies = collapse(rows.content[here], None if captions else rows.picture[here])
        copies["better"], copies["worse"] = rank[here[copies["better"]]], rank[here[copies["worse"]]]
        found.append(copies)
        here = here[kept]
        here = here[np.lexsort([~fresh[here], ~home[here]])]
        at = torch.from_numpy(here).to(where)
        pairs = near_pairs(
            normalized(zimg[at]),
            normalized(ztxt[at]) if captions else None,
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
