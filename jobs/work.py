"""What the next round has to do, from the root and the inventory alone: which embeddings are really missing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curate.dedup.files import dedup_folder, read_dedup
from curate.embed.files import embedding_name
from curate.errors import UserError
from curate.models.create import CONFIG_NAME
from curate.models.encoder import store_encoder
from curate.models.learners import newest_learner
from curate.models.spec import EncoderSpec
from curate.pipelines.embed import missing_shards
from curate.pipelines.records import one_pass_pays
from curate.pipelines.wanted import fixed_sample
from curate.pool.shards import Pool, Shard, row_groups
from curate.recipe import DeviceType, EncoderSection, Recipe
from curate.rounds.manifest import last_round, read_manifest
from curate.rounds.plan import Plan, foreseen_selection, learner_as_scored, plan_name, reference_as_scored
from curate.select.draw import needs_learner
from curate.select.index import Index, index_folder, read_index
from curate.select.windows import Stretch, cut_name, next_windows, read_cut, stretches, window_scope
from curate.storage import Store

REFERENCE, LEARNER = "reference", "learner"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows that are decoded once, and embedded by the same models."""

    roles: tuple[str, ...]
    """`REFERENCE`, `LEARNER` or both."""
    rows: int
    files: int
    """Embedding files of each role."""
    read_bytes: int
    """Of the shards' row groups that hold these rows."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is left to do of the next round."""

    passes: tuple[Pass, ...]
    asked: Mapping[str, int]
    """Rows that a round wants of each role; some may be embedded already."""
    starts: int
    """Times that actors are started."""
    dedup_rows: int
    """That are compared with each other; 0 if that was done, or nobody asks for it."""
    index_entries: int
    """Rows that are indexed, by content and, where the recipe names a column, by uid; 0 if that was done."""
    window_rows: int
    """Of the shards of the round's windows."""
    super_batches: int
    candidates: int
    """Of all of them."""
    chosen: int
    """Rows that are written."""
    chosen_read_bytes: int
    """Of row groups that hold them."""
    new_bytes: int
    """Of models and inventories that the root has not yet."""

    def missing(self, role: str) -> int:
        """Rows that a role has to embed."""
        return sum(one.rows for one in self.passes if role in one.roles)


def encoders_of(
    store: Store, scratch: Store, recipe: Recipe, *, base: Path, number: int, device_type: DeviceType
) -> dict[str, EncoderSpec]:
    """Reference, and learner if a round looks at it, as the round's plan has them, or would: nothing is written.

    Args:
        store: the root.
        scratch: where models are stored that the root has not yet.
        recipe: the whole recipe, with a reference.
        base: its folder.
        number: of the round.
        device_type: what models run on.

    Raises:
        UserError: as `store_encoder`.
    """
    if store.exists(name := plan_name(number)):
        plan = Plan.from_bytes(store.read_bytes(name), name)
        return {REFERENCE: plan.reference} | ({LEARNER: plan.learner} if plan.learner else {})
    assert recipe.reference is not None

    def stored(section: EncoderSection, role: str) -> EncoderSpec:
        return store_encoder(scratch, section, role=role, base=base, seed=recipe.seed, device_type=device_type)

    found = {REFERENCE: reference_as_scored(store, stored(recipe.reference, REFERENCE), recipe)}
    if needs_learner(recipe.selection):
        newest = newest_learner(store)
        learner = stored(recipe.learner, LEARNER) if newest is None else newest.encoder
        found[LEARNER] = learner_as_scored(learner, recipe)
    return found


def work_of(
    store: Store,
    scratch: Store,
    recipe: Recipe,
    pool: Pool,
    evaluation: Sequence[Pool],
    encoders: Mapping[str, EncoderSpec],
    *,
    usable: float,
) -> Work:
    """What the next round has to do.

    Args:
        store: the root.
        scratch: as `encoders_of` had it.
        recipe: the whole recipe.
        pool: its inventory.
        evaluation: those of the sets that are kept out of it.
        encoders: as `encoders_of`.
        usable: share of the rows that are candidates, where no index tells.

    Raises:
        UserError: the pool has too few candidates for a round.
    """
    reference, learner = encoders[REFERENCE], encoders.get(LEARNER)
    looked_at = needs_learner(foreseen_selection(store, recipe))
    shards, selection, B = pool.shards, recipe.selection, recipe.selection.super_batch_size
    dedup = dedup_folder(recipe.dedup, reference, pool, evaluation) if recipe.dedup else None
    folder = index_folder(reference, dedup, pool)
    index = read_index(store, folder)
    candidates = index.candidates if index else [round(usable * shard.rows) for shard in shards]
    parent = read_manifest(store, last_round(store))
    placed = next_windows(
        shards,
        candidates,
        selection,
        seed=recipe.seed,
        index=folder,
        before=parent[0].lineage["windows"] if parent else None,
    )
    if placed is None:
        raise UserError(f"of {pool.rows:,} rows {sum(candidates):,} seem to be candidates, too few for a round")
    windows, taken = placed
    met = stretches(windows, taken, B)
    group_rows = max(max(row_groups(shard), default=0) for shard in shards if shard.rows)

    in_one_pass = learner is not None and one_pass_pays(recipe, pool.rows)
    asked = {REFERENCE: pool.rows + sum(held_out.rows for held_out in evaluation)}
    wanted = {REFERENCE: _lacking(store, (pool, *evaluation), reference)}
    if learner is not None and in_one_pass:
        asked[LEARNER], wanted[LEARNER] = pool.rows, _lacking(store, (pool,), learner)
    passes = _passes(wanted)
    starts = int(bool(passes))
    if learner is not None and not in_one_pass:
        its = met if looked_at else ()
        own = _learner_pass(store, recipe, pool, encoders, index, its, taken.epoch, group_rows)
        asked[LEARNER] = (taken.super_batches * B if looked_at else 0) + own[1]
        passes += [own[0]] if own[0].rows else []
        starts += len(its) + int(selection.is_open) if own[0].rows else 0
    chosen_read = 0.0
    for stretch in met:
        size = sum(shards[i].bytes for i in stretch.window.shards)
        share = stretch.super_batches * selection.sub_batch_size / stretch.window.candidates
        chosen_read += size * touched(share, group_rows)
    return Work(
        passes=tuple(passes),
        asked=asked,
        starts=starts,
        dedup_rows=asked[REFERENCE] if dedup and read_dedup(store, dedup) is None else 0,
        index_entries=0 if index else pool.rows * (2 if pool.columns.uid else 1),
        window_rows=sum(shards[i].rows for stretch in met for i in stretch.window.shards),
        super_batches=taken.super_batches,
        candidates=taken.super_batches * B,
        chosen=taken.super_batches * selection.sub_batch_size,
        chosen_read_bytes=round(chosen_read),
        new_bytes=_new_bytes(store, scratch, (pool, *evaluation), encoders.values()),
    )


def touched(share: float, group_rows: int) -> float:
    """Share of the row groups that hold one at least of the rows that are wanted, which are drawn at random.

    >>> touched(0.5, 2), touched(1, 100)
    (0.75, 1.0)
    """
    return float(1 - (1 - min(1.0, share)) ** group_rows)


def _lacking(store: Store, pools: Sequence[Pool], spec: EncoderSpec) -> dict[str, Shard]:
    """The shards of some pools that lack an embedding file, by the name that it will have."""
    return {
        embedding_name(spec.sha, pool.shards[i]): pool.shards[i]
        for pool in pools
        for i in sorted(missing_shards(store, pool.shards, spec))
    }


def _passes(wanted: Mapping[str, Mapping[str, Shard]]) -> list[Pass]:
    """Whole shards by the roles that lack them."""
    roles: dict[str, tuple[str, ...]] = {}
    shards: dict[str, Shard] = {}
    for role, lacking in wanted.items():
        for shard in lacking.values():
            roles[shard.key] = (*roles.get(shard.key, ()), role)
            shards[shard.key] = shard
    found = []
    for asked in dict.fromkeys(roles.values()):
        own = [shard for key, shard in shards.items() if roles[key] == asked]
        sizes = sum(shard.bytes for shard in own)
        found.append(Pass(roles=asked, rows=sum(shard.rows for shard in own), files=len(own), read_bytes=sizes))
    return found


def _learner_pass(
    store: Store,
    recipe: Recipe,
    pool: Pool,
    encoders: Mapping[str, EncoderSpec],
    index: Index | None,
    met: Sequence[Stretch],
    epoch: int,
    group_rows: int,
) -> tuple[Pass, int]:
    """The learner's pass over a round's candidates and the fixed sample; and how many rows that sample has."""
    reference, learner, B = encoders[REFERENCE], encoders[LEARNER], recipe.selection.super_batch_size
    rows, files, read = 0, 0, 0.0
    for stretch in met:
        own = [pool.shards[i] for i in stretch.window.shards]
        share = stretch.super_batches * B / stretch.window.candidates
        name = index and cut_name(index.folder, own, seed=recipe.seed, epoch=epoch, super_batch_size=B)
        if index and name and (cut := read_cut(store, name)):  # only a round that was begun has one
            low, high = cut[stretch.start], cut[stretch.start + stretch.super_batches]
            scope = window_scope(index.folder, seed=recipe.seed, epoch=epoch, low=low, high=high)
            lacking = missing_shards(store, own, learner, scope)
            held = sum(index.candidates[shard.index] for shard in own if shard.index not in lacking)
            own = [shard for shard in own if shard.index in lacking]
            rows += stretch.super_batches * B - round(share * held)
        else:
            rows += stretch.super_batches * B
        files += len(own)
        read += sum(shard.bytes for shard in own) * touched(share, group_rows)
    sample = fixed_sample(pool, recipe.seed, reference)
    asked = {i: sample.expected(i) for i in sample.shards}
    for i in missing_shards(store, [pool.shards[i] for i in sample.shards], learner, sample.scope):
        shard = pool.shards[i]
        known = store.exists(embedding_name(reference.sha, shard))
        asked[i] = len(sample.rows(store, shard)) if known else asked[i]
        rows, files = rows + asked[i], files + 1
        read += shard.bytes * min(shard.rows, max(asked[i], group_rows)) / max(1, shard.rows)
    return Pass(roles=(LEARNER,), rows=rows, files=files, read_bytes=round(read)), sum(asked.values())


def _new_bytes(store: Store, scratch: Store, pools: Sequence[Pool], specs: Iterable[EncoderSpec]) -> int:
    folders = {spec.folder for spec in specs}
    models = [folder for folder in folders if not store.exists(f"{folder}/{CONFIG_NAME}")]
    inventories = {f"pools/{pool.fingerprint}.json": pool for pool in pools}
    return sum(scratch.size(name) or 0 for folder in models for name in scratch.list(folder)) + sum(
        len(pool.to_bytes()) for name, pool in inventories.items() if not store.exists(name)
    )
