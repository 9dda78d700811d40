"""Dedup, scaled out: find the pool's near-duplicates, group them, and say which rows leave.

    pairs -> groups -> dropped rows -> account

A pool that grew starts from the largest earlier one whose shards it still holds: its new rows are compared with all.
One task groups: what it holds grows with the near-duplicates, and with nothing else.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.dedup.files import (
    DROPPED_SCHEMA,
    Dedup,
    LargeGroup,
    chain_files,
    count_records,
    dedup_folder,
    pin_parent,
    read_cells,
    read_counts,
    read_dedup,
    read_records,
    write_dropped,
)
from curate.dedup.grouping import (
    EVALUATION,
    NODE,
    PAIR,
    Decisions,
    Ints,
    Nodes,
    Pairs,
    Rule,
    decide,
    each_once,
    in_rank_order,
    nodes_once,
)
from curate.dedup.neighbours import Threshold
from curate.errors import UserError
from curate.messages import gathered
from curate.models.spec import EncoderSpec
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, load_pool
from curate.recipe import DedupSection, Recipe
from curate.rounds.plan import evaluation_sets, store_reference
from curate.storage import Store
from pipelines.cluster import (
    CPUS,
    Devices,
    connect,
    footers_bar,
    remaking,
    run_tasks,
    take_devices,
)
from pipelines.embed import embed_pool
from pipelines.neighbours import Compared, find_pairs, load_images

PAIR_BYTES = 600
"""Of memory that grouping takes for each pair: measured with 1 and with 4 million."""
LARGEST = 20
"""Groups that the account describes,"""
MEASURED = 256
"""by at most so many of their rows."""


def dedup_pool(
    store: Store,
    pool: Pool,
    reference: EncoderSpec,
    section: DedupSection,
    evaluation: Sequence[Pool] = (),
    *,
    devices: Devices = CPUS,
) -> Dedup:
    """Find the pool's near-duplicates and decide which rows leave; or read what was decided before.

    Args:
        store: the root.
        pool: the inventory.
        reference: its embedding files, of the pool and of the evaluation sets, are complete.
        section: what counts as a near-duplicate, and what becomes of it.
        evaluation: inventories of the sets whose images must not be trained on.
        devices: what searches.

    Raises:
        UserError: an embedding file was written by a version that did not hash pictures; or files of an earlier
            deduplication, which this one starts from, are gone.
        FileNotFoundError: embedding files are not complete.
    """
    folder = dedup_folder(section, reference, pool, evaluation)
    if (done := read_dedup(store, folder)) is not None:
        return done
    for seen in (pool, *evaluation):
        store.put_bytes(f"pools/{seen.fingerprint}.json", seen.to_bytes())
    parent = pin_parent(store, folder, pool)
    chain = (*(parent.chain if parent else ()), folder)
    compared = _compare(store, pool, evaluation, parent, stand=section.earlier == "stand")

    threshold = Threshold(image=section.threshold, caption=section.caption_threshold)
    find_pairs(store, folder, reference, threshold, compared, devices)
    grouping = (store, folder, chain, compared, section.groups)
    (found,) = run_tasks(_group, [None], grouping, title="groups", memory=_grouping_bytes(store, chain))
    largest = _measure(store, reference, compared, found.largest)

    counts = read_counts(store, folder)
    dedup = Dedup(
        folder=folder,
        chain=chain,
        evaluation=tuple(seen.fingerprint for seen in evaluation),
        generations=compared.generations[: len(pool.shards)],
        statuses=counts["statuses"],
        evaluation_statuses=counts["evaluation_statuses"],
        unsound=counts["unsound"],
        dropped=found.dropped,
        pairs=found.pairs,
        groups=found.groups,
        cells=found.cells,
        largest_cell=found.largest_cell,
        beyond=found.beyond,
        largest=largest,
    )
    store.put_bytes(f"{folder}/dedup.json", dedup.to_bytes())
    return dedup


def dedup_recipe(
    recipe: Recipe, *, base: Path, say: Callable[[str], None] = lambda line: None
) -> tuple[Store, Pool, Dedup]:
    """Embed the pool of a recipe with its reference, and find its near-duplicates; a round then finds both done.

    Args:
        recipe: the whole recipe.
        base: its folder.
        say: told what it computes on.

    Raises:
        UserError: in recipe, pool or model; all that are found together.
    """
    from curate.models.create import create_model  # noqa: PLC0415 importing open_clip takes seconds

    mistakes: list[str] = []
    if recipe.dedup is None:
        mistakes.append(
            "dedup: must be given; add [dedup], all of whose fields have defaults, or --set dedup.threshold=0.95"
        )
    if recipe.reference is None:
        mistakes.append("reference: must be given to tell images apart; add [reference] with model and pretrained")
    pool = None
    evaluation: list[Pool] = []
    with gathered(mistakes):
        store = Store(recipe.root)
        store.probe()
    with gathered(mistakes):
        pool = take_inventory(recipe.pool, progress=footers_bar)
    with gathered(mistakes):
        evaluation = evaluation_sets(recipe)
    if mistakes and recipe.reference is not None:
        with gathered(mistakes):
            create_model(recipe.reference, role="reference", base=base, seed=recipe.seed)
    if mistakes or pool is None or recipe.dedup is None:
        raise UserError(*mistakes)
    connect(recipe.resources.address)
    devices = take_devices(recipe.resources, say)
    reference = store_reference(store, recipe, base=base, device_type=devices.type)
    section = recipe.dedup

    def run() -> Dedup:
        for seen in (pool, *evaluation):
            embed_pool(store, seen, [reference], recipe.embed, recipe.resources, devices)
        return dedup_pool(store, pool, reference, section, evaluation, devices=devices)

    own = ("embeddings/", dedup_folder(section, reference, pool, evaluation))
    return store, pool, remaking(run, store, lambda name: name.startswith(own), say)


def _compare(store: Store, pool: Pool, evaluation: Sequence[Pool], parent: Dedup | None, *, stand: bool) -> Compared:
    """The rows of the pool and of the evaluation sets, with what the parent says of them."""
    newest = len(parent.chain) if parent else 0
    known = {}
    if parent:
        keys = (shard.key for shard in _pool_of(store, parent.folder).shards)
        known = dict(zip(keys, parent.generations, strict=True))
    held = tuple(shard for seen in evaluation for shard in seen.shards)
    return Compared(
        shards=pool.shards + held,
        generations=(*(known.get(shard.key, newest) for shard in pool.shards), *(EVALUATION for _ in held)),
        newest=newest,
        stand=stand,
    )


def _pool_of(store: Store, folder: str) -> Pool:
    return load_pool(store, folder.rpartition("/")[2])


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A large group: its size, and the ids of the best-ranked of its rows, the best first."""

    size: int
    ids: Ints


@dataclass(frozen=True, kw_only=True)
class _Found:
    dropped: dict[str, int]
    pairs: int
    groups: int
    largest: list[_Group]
    cells: int
    largest_cell: int
    beyond: int


def _group(_: None, shared: tuple[Store, str, Sequence[str], Compared, Rule]) -> _Found:
    """Decide which rows leave, by the pairs of the whole chain, and write them."""
    store, folder, chain, compared, rule = shared
    pairs, nodes, largest_cell, beyond = _read_pairs(store, chain, compared)
    tiers = compared.tiers(nodes["id"])
    order = in_rank_order(nodes, tiers)
    ids, tiers = nodes["id"][order], tiers[order]
    rank = np.argsort(order)
    ends = np.stack([rank[np.searchsorted(nodes["id"], pairs[end])] for end in ("better", "worse")])
    pairs["better"], pairs["worse"] = ends.min(axis=0), ends.max(axis=0)
    pairs = each_once(pairs)
    decisions = decide(pairs, tiers, rule)
    _write(store, folder, decisions, ids, compared)
    cells = read_cells(store, folder)
    assert cells is not None, folder
    sizes = np.bincount(decisions.group, minlength=len(ids))
    heads = np.flatnonzero(sizes > 1)
    heads = heads[np.lexsort([heads, -sizes[heads]])][:LARGEST]
    return _Found(
        dropped=dict(sorted(Counter(decisions.reason.tolist()).items())),
        pairs=len(pairs),
        groups=int((sizes > 1).sum()),
        largest=[
            _Group(size=int(sizes[head]), ids=ids[np.flatnonzero(decisions.group == head)[:MEASURED]]) for head in heads
        ],
        cells=len(cells) - 1,
        largest_cell=largest_cell,
        beyond=beyond,
    )


def _grouping_bytes(store: Store, chain: Sequence[str]) -> int:
    """What the grouping task holds at its peak."""
    return PAIR_BYTES * sum(count_records(store, name) for _, pairs, _ in chain_files(store, chain) for name in pairs)


def _read_pairs(store: Store, chain: Sequence[str], compared: Compared) -> tuple[Pairs, Nodes, int, int]:
    """Pairs by id, and their nodes, ascending, each once; size of the newest largest cell; rows beyond the borders."""
    pool_shards = sum(generation != EVALUATION for generation in compared.generations)
    starts = {shard.key: int(compared.starts[i]) for i, shard in enumerate(compared.shards[:pool_shards])}
    found_pairs, found_nodes, beyond, largest = [], [], [], 0
    for folder, pairs_files, nodes_files in chain_files(store, chain):
        shards = _pool_of(store, folder).shards
        old = np.cumsum([0, *(shard.rows for shard in shards)])
        # Where each of its shards begins now, and where the evaluation sets do, which follow.
        new = np.array([*(starts[shard.key] for shard in shards), compared.starts[pool_shards]])

        def moved(ids: Ints, old: Ints = old, new: Ints = new) -> Ints:
            at = np.searchsorted(old, ids, side="right") - 1
            return ids - old[at] + new[at]

        facts = []
        for name in pairs_files:
            pairs, said = read_records(store, name, PAIR)
            pairs["better"], pairs["worse"] = moved(pairs["better"]), moved(pairs["worse"])
            found_pairs.append(pairs)
            facts.append(said)
        for name in nodes_files:
            nodes, _ = read_records(store, name, NODE)
            nodes["id"] = moved(nodes["id"])
            found_nodes.append(nodes)
        beyond.append(sum(said["beyond"] for said in facts))
        largest = max(said["largest_cell"] for said in facts)
    return np.concatenate(found_pairs), nodes_once(np.concatenate(found_nodes)), largest, max(beyond)


def _write(store: Store, folder: str, decisions: Decisions, ids: Ints, compared: Compared) -> None:
    """Write the dropped rows in the order of the pool."""
    order = np.argsort(ids[decisions.dropped])
    columns: list[npt.NDArray[np.generic]] = []
    for rows in (decisions.dropped, decisions.duplicate_of, decisions.representative):
        at = ids[rows[order]]
        place = compared.places(at)
        columns += [place.astype(np.int32), at - compared.starts[place]]
    shard, row, *others = columns
    table = [shard, row, decisions.reason[order], *others[:2], decisions.cosine[order], *others[2:]]
    write_dropped(store, folder, pa.Table.from_arrays([pa.array(c) for c in table], schema=DROPPED_SCHEMA))


def _measure(
    store: Store, reference: EncoderSpec, compared: Compared, largest: Sequence[_Group]
) -> tuple[LargeGroup, ...]:
    """Cosines within the largest groups: read the rows that are measured, and no others."""
    if not largest:
        return ()
    return run_tasks(_cosines, [largest], (store, reference, compared), title="largest groups")[0]


def _cosines(largest: Sequence[_Group], shared: tuple[Store, EncoderSpec, Compared]) -> tuple[LargeGroup, ...]:
    """One task: there are at most `LARGEST` groups, of which `MEASURED` rows are read."""
    store, reference, compared = shared
    ids = np.unique(np.concatenate([group.ids for group in largest]))
    z = load_images(store, reference, compared, ids)
    found = []
    for group in largest:
        own = z[np.searchsorted(ids, group.ids)]
        cosines = own @ own.T
        head = group.ids[:1]
        found.append(
            LargeGroup(
                size=group.size,
                measured=len(own),
                lowest_cosine=round(float(cosines.min()), 4),
                lowest_to_representative=round(float(cosines[0].min()), 4),
                shard=int(compared.places(head)[0]),
                row=int(head[0] - compared.starts[compared.places(head)[0]]),
            )
        )
    return tuple(found)
