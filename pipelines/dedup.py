"""Dedup, scaled out: find the pool's near-duplicates, group them, and say which rows leave.

    pairs -> groups -> dropped rows -> account

A pool that grew starts from the largest earlier one whose shards it still holds: its new rows are compared with all.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from curate.dedup.files import (
    Dedup,
    LargeGroup,
    dedup_folder,
    pin_parent,
    read_cells,
    read_counts,
    read_dedup,
)
from curate.dedup.grouping import (
    EVALUATION,
)
from curate.dedup.neighbours import Threshold
from curate.errors import UserError
from curate.messages import gathered
from curate.models.spec import EncoderSpec
from curate.pipelines.cluster import (
    CPUS,
    Devices,
    connect,
    footers_bar,
    remaking,
    run_tasks,
    take_devices,
)
from curate.pipelines.embed import embed_pool
from curate.pipelines.grouping import LargestGroup, forget_grouping, group_pairs
from curate.pipelines.neighbours import Compared, find_pairs, load_images
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, load_pool
from curate.recipe import DedupSection, Recipe
from curate.rounds.plan import evaluation_sets, indices_of, store_reference
from curate.storage import Store


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
    found = group_pairs(store, chain, compared, section.groups)
    cells = read_cells(store, folder)
    assert cells is not None, folder
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
        cells=len(cells) - 1,
        largest_cell=found.largest_cell,
        beyond=found.beyond,
        largest=largest,
    )
    forget_grouping(store, folder)  # first: nobody looks for it once the account is there
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
        pool = take_inventory(recipe.pool, progress=footers_bar, indices=indices_of(Store(recipe.root)))
    with gathered(mistakes):
        evaluation = evaluation_sets(recipe, indices=indices_of(Store(recipe.root)))
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


def _measure(
    store: Store, reference: EncoderSpec, compared: Compared, largest: Sequence[LargestGroup]
) -> tuple[LargeGroup, ...]:
    """Cosines within the largest groups: read the rows that are measured, and no others."""
    if not largest:
        return ()
    return run_tasks(_cosines, [largest], (store, reference, compared), title="largest groups")[0]


def _cosines(largest: Sequence[LargestGroup], shared: tuple[Store, EncoderSpec, Compared]) -> tuple[LargeGroup, ...]:
    """One task: there are at most `LARGEST` groups, of which `MEASURED` rows are read."""
    store, reference, compared = shared
    ids = np.unique(np.concatenate([np.array(group.ids) for group in largest]))
    z = load_images(store, reference, compared, ids)
    found = []
    for group in largest:
        own = z[np.searchsorted(ids, group.ids)]
        cosines = own @ own.T
        head = np.array(group.ids[:1])
        found.append(
            LargeGroup(
                size=group.size,
                measured=len(own),
                lowest_cosine=round(float(cosines.min()), 4),
                lowest_to_representative=round(float(cosines[0].min()), 4),
                shard=int(compared.shards_of(head)[0]),
                row=int(head[0] - compared.starts[compared.shards_of(head)[0]]),
            )
        )
    return tuple(found)
