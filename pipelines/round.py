"""One curation round, from the pool to the manifest, on one page."""

import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curate.dedup import Dedup
from curate.errors import UserError
from curate.manifest import Manifest, commit, last_round, read_manifest, round_folder, steps_folder
from curate.plan import Plan, pin_plan
from curate.pool import Pool, load_pool
from curate.recipe import Recipe
from curate.storage import Store
from curate.stream import END_NAME, stream_end
from curate.tally import Tally
from curate.walk import DUPLICATE_EXACT, Walk, WalkRange, next_range
from pipelines.cluster import Devices, connect, footers_bar, remaking, take_devices
from pipelines.dedup import dedup_pool
from pipelines.embed import embed_pool
from pipelines.keys import KeyRange, fixed_sample
from pipelines.quality import measure_round
from pipelines.select import select_round
from pipelines.walk import lay_walk
from pipelines.write import write_round

RECORDED_LIBRARIES = ("curate-clip", "torch", "open_clip_torch", "pyarrow", "ray", "pillow", "numpy")


def run_round(
    recipe: Recipe, *, base: Path, number: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Manifest:
    """Run a round, or finish one that was interrupted, or return one that is committed.

    Args:
        recipe: the whole recipe.
        base: the recipe's folder.
        number: of the round; the next one if None. A committed round is returned as it is.
        say: told what it computes on.

    Raises:
        UserError: in recipe, pool or models; all that are found together.
        CommitConflictError: somebody else committed another round under this number.
    """
    store = Store(recipe.root)
    newest = last_round(store)
    number = newest + 1 if number is None else number
    if number > newest + 1:
        raise UserError(
            f"--round {number}: rounds are contiguous and the newest is {newest}; run round {newest + 1} first"
        )
    if (committed := read_manifest(store, number)) is not None:
        return committed[0]
    if stream_end(store) is not None:
        raise UserError(f"{store.url}: the stream of rounds was ended after round {newest}; delete {END_NAME} to go on")
    store.probe()
    connect(recipe.resources.address)
    devices = take_devices(recipe.resources, say)

    plan = pin_plan(store, recipe, base=base, number=number, device_type=devices.type, progress=footers_bar)
    steps = steps_folder(number, plan.digest)
    made_here = ("embeddings/", "walks/", f"{steps}/", f"{round_folder(number)}/curated-")
    return remaking(
        lambda: _run_planned(store, recipe, plan, devices, number, steps),
        store,
        lambda name: name.startswith(made_here) or (name.startswith("dedup/") and f"/{plan.pool}/" in name),
        say,
    )


def _run_planned(store: Store, recipe: Recipe, plan: Plan, devices: Devices, number: int, steps: str) -> Manifest:
    """A round from its plan to its manifest; what is there of it is found, and not made again."""
    folder = round_folder(number)
    pool = load_pool(store, plan.pool)
    parent = read_manifest(store, number - 1)
    selection = recipe.selection

    embed_all(store, pool, plan, recipe, devices)
    dedup = dedup_all(store, pool, plan, recipe, devices)
    dropped = dedup.folder if dedup else None
    through = _through(plan, recipe, dropped)
    walk, walk_range = place_round(store, pool, plan, recipe, dedup, through, parent[0] if parent else None)
    boundaries = walk.boundaries[walk_range.start : walk_range.stop + 1]
    scope = embed_learner(store, pool, plan, recipe, devices, dropped, walk.epoch, boundaries)
    stats = select_round(
        store,
        pool,
        selection=selection,
        reference=plan.reference,
        learner=plan.learner,
        learner_scope=scope,
        walk_range=walk_range,
        boundaries=boundaries,
        seed=recipe.seed,
        round_number=number,
        steps=steps,
        devices=devices,
        dedup=dropped,
    )
    files = write_round(
        store,
        pool,
        sub_batches=walk_range.super_batches,
        sub_batch_size=selection.sub_batch_size,
        file_rows=recipe.output.file_rows,
        round_number=number,
        folder=folder,
        steps=steps,
    )
    quality = measure_round(
        store,
        pool,
        plan,
        recipe,
        parent=parent[0] if parent else None,
        scope=scope,
        steps=steps,
        sub_batches=walk_range.super_batches,
        through=through,
        epoch=walk_range.epoch,
        dedup=dropped,
    )

    taken = walk_range.super_batches * selection.super_batch_size
    waiting = Tally(
        step="walk",
        rows_in=walk.candidates,
        kept=taken,
        dropped={"other_round": walk.candidates - taken},
    )
    selected = sum((s.tally for s in stats[1:]), stats[0].tally)
    manifest = Manifest(
        round=number,
        parent=parent[1] if parent else None,
        first_batch=parent[0].stop_batch if parent else 0,
        sub_batch_size=selection.sub_batch_size,
        sub_batches=walk_range.super_batches,
        columns=pool.columns.__dict__,
        files=tuple(files),
        pool_rows=pool.rows,
        tallies=(walk.embedded, walk.deduplicated, waiting, selected),
        learnability=tuple(s.learnability for s in stats),
        uniform_learnability=tuple(s.uniform_learnability for s in stats),
        reference_loss=tuple(s.reference_loss for s in stats),
        quality=quality,
        lineage=lineage(plan, pool, walk_range, through, dedup),
    )
    commit(store, manifest)
    return manifest


def embed_all(store: Store, pool: Pool, plan: Plan, recipe: Recipe, devices: Devices) -> None:
    """The reference's embeddings of the whole pool, and the learner's in the same pass where that pays.

    A round over at least half of the pool decodes each picture once for both models and keeps the few learner's
    embeddings that it does not need; a smaller one, or one that is told which rows are no candidates, runs the learner
    on its own candidates alone, later.
    """
    encoders = [plan.reference]
    if plan.learner is not None and _in_one_pass(pool, recipe):
        encoders.append(plan.learner)
    embed_pool(store, pool, encoders, recipe.embed, recipe.resources, devices)


def dedup_all(store: Store, pool: Pool, plan: Plan, recipe: Recipe, devices: Devices) -> Dedup | None:
    """Which rows of the pool are near-duplicates that leave, if the recipe asks."""
    if recipe.dedup is None:
        return None
    evaluation = [load_pool(store, fingerprint) for fingerprint in plan.evaluation]
    for held_out in evaluation:
        embed_pool(store, held_out, [plan.reference], recipe.embed, recipe.resources, devices)
    return dedup_pool(store, pool, plan.reference, recipe.dedup, evaluation, devices=devices)


def embed_learner(
    store: Store,
    pool: Pool,
    plan: Plan,
    recipe: Recipe,
    devices: Devices,
    dropped: str | None,
    epoch: int,
    boundaries: tuple[int, ...],
) -> str:
    """The learner's embeddings of this round's candidates, unless `embed_all` made them; returns their scope."""
    if plan.learner is None or _in_one_pass(pool, recipe):
        return ""
    keys = KeyRange(seed=recipe.seed, epoch=epoch, low=boundaries[0], high=boundaries[-1], dedup=dropped)
    embed_pool(
        store,
        pool,
        [plan.learner],
        recipe.embed,
        recipe.resources,
        devices,
        key_range=keys,
        sample=fixed_sample(pool, recipe.seed),
        reference=plan.reference,
    )
    return keys.scope


def place_round(
    store: Store,
    pool: Pool,
    plan: Plan,
    recipe: Recipe,
    dedup: Dedup | None,
    through: list[Any],
    parent: Manifest | None,
) -> tuple[Walk, WalkRange]:
    """Where this round walks: on from its parent, or into a new epoch.

    Raises:
        UserError: the pool holds too few candidates, or too many of its rows cannot be used.
    """
    selection = recipe.selection
    size = selection.super_batch_size
    previous = WalkRange(**parent.lineage["walk"]["range"]) if parent else None
    same_pool = parent is not None and parent.lineage["walk"]["through"] == through
    epoch = 0 if previous is None else previous.epoch if same_pool else previous.epoch + 1
    while True:
        walk = lay_walk(store, pool, plan.reference, seed=recipe.seed, epoch=epoch, super_batch_size=size, dedup=dedup)
        _check_dropped(walk.embedded, recipe)
        _check_near_duplicates(walk.deduplicated, recipe)
        walk_range = next_range(
            previous,
            candidates=walk.candidates,
            super_batch_size=size,
            super_batches=selection.super_batches,
            same_pool=same_pool,
        )
        if walk_range is None:
            wanted = selection.super_batches or 1
            raise UserError(
                f"selection: a round wants {wanted * size:,} candidates ({wanted} super-batches of {size:,}), the "
                f"pool holds {walk.candidates:,} distinct usable pairs of {walk.embedded.rows_in:,} rows (the others: "
                f"{_reasons(walk.embedded, walk.deduplicated)}); lower sub_batch_size, filter_ratio or super_batches, "
                "or add shards, and delete the round's folder to begin it anew"
            )
        if walk_range.epoch == epoch:
            return walk, walk_range
        epoch = walk_range.epoch


def lineage(plan: Plan, pool: Pool, walk_range: WalkRange, through: list[Any], dedup: Dedup | None) -> dict[str, Any]:
    """All that made this round, from the manifest alone."""
    return {
        "plan": plan.digest,
        "recipe": plan.recipe,
        "recipe_fingerprint": plan.recipe_fingerprint,
        "pool": {"fingerprint": pool.fingerprint, "shards": len(pool.shards), "skipped_shards": list(pool.skipped)},
        "reference": plan.reference.to_json(),
        "learner": plan.learner.to_json() | {"number": plan.learner_number} if plan.learner else None,
        "walk": {
            "range": walk_range.to_json(),
            "through": through,
        },
        "dedup": {"folder": dedup.folder, "evaluation": list(dedup.evaluation)} if dedup else None,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
    }


def _in_one_pass(pool: Pool, recipe: Recipe) -> bool:
    """Whether one pass for both models is cheaper than a second one over this round's candidates."""
    if recipe.dedup is not None:
        return False  # which rows are candidates is known after the reference has seen them
    wanted = recipe.selection.super_batches
    return wanted is None or 2 * wanted * recipe.selection.super_batch_size >= pool.rows


def _through(plan: Plan, recipe: Recipe, dropped: str | None) -> list[Any]:
    """What a walk depends on: a round that differs in it from its parent begins a new epoch."""
    through = [plan.pool, plan.reference.sha, recipe.seed, recipe.selection.super_batch_size]
    return through if dropped is None else [*through, dropped]


def _check_dropped(embedded: Tally, recipe: Recipe) -> None:
    lost = embedded.rows_in - embedded.kept
    if lost > recipe.pool.max_dropped_share * embedded.rows_in:
        raise UserError(
            f"pool: {lost:,} of {embedded.rows_in:,} rows cannot be used ({_reasons(embedded)}), more than the share "
            f"pool.max_dropped_share = {recipe.pool.max_dropped_share} allows; see to the rows, or raise it"
        )


def _check_near_duplicates(deduplicated: Tally, recipe: Recipe) -> None:
    near = sum(rows for reason, rows in deduplicated.dropped.items() if reason != DUPLICATE_EXACT)
    if recipe.dedup is not None and near > recipe.dedup.max_dropped_share * deduplicated.rows_in:
        share = recipe.dedup.max_dropped_share
        raise UserError(
            f"dedup: {near:,} of {deduplicated.rows_in:,} usable rows would leave as near-duplicates, more than the "
            f"share dedup.max_dropped_share = {share} allows: to a weak reference all pictures "
            "look alike; look at curate dedup --sheet FILE and delete the round's folder to begin it with a higher "
            "dedup.threshold or a better reference, or raise the share"
        )


def _reasons(*tallies: Tally) -> str:
    """Why rows left, and how many."""
    return (
        ", ".join(f"{reason} {rows:,}" for tally in tallies for reason, rows in tally.dropped.items() if rows) or "none"
    )
