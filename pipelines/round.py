"""One curation round, from the pool to the manifest, on one page."""

import importlib.metadata
import platform
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from curate.dedup.files import Dedup
from curate.embed.files import DAMAGED_SHARD, damage_of
from curate.errors import UserError
from curate.pipelines.cluster import all_cpus, connect, footers_bar, free_cpus, remaking, take_devices
from curate.pipelines.dedup import dedup_pool
from curate.pipelines.embed import embed_pool, embed_some, workers_of
from curate.pipelines.index import index_pool
from curate.pipelines.quality import measure_round
from curate.pipelines.records import Drawn, Placed, Round, Site
from curate.pipelines.select import Selection, select_window
from curate.pipelines.standing import decide
from curate.pipelines.wanted import Wanted, WindowRows, fixed_sample
from curate.pipelines.windows import cut_window
from curate.pipelines.write import Writing, write_window
from curate.pool.shards import load_pool
from curate.pool.wanted import FILTERED
from curate.recipe import Recipe
from curate.rounds.attempts import Stopwatch, write_attempt
from curate.rounds.manifest import CuratedFile, Manifest, commit, last_round, read_manifest
from curate.rounds.plan import pin_plan
from curate.rounds.stream import END_NAME, stream_end
from curate.rounds.write import curated_schema
from curate.select.files import SubBatchStats
from curate.select.index import DUPLICATE_EXACT
from curate.select.windows import (
    EARLIER_ROUND,
    LATER_ROUND,
    WINDOW_END,
    Stretch,
    next_windows,
    stretches,
    windows_through,
)
from curate.storage import Store
from curate.tally import Tally

R = TypeVar("R")

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
    round_ = Round(
        number=number,
        recipe=recipe,
        plan=plan,
        pool=load_pool(store, plan.pool),
        parent=read_manifest(store, number - 1),
    )
    site = Site(store=store, devices=devices, watch=Stopwatch())
    made_here = ("embeddings/", "index/", "windows/", f"{round_.steps}/", f"{round_.folder}/curated-")
    return remaking(
        lambda: _run_planned(site, round_),
        store,
        lambda name: name.startswith(made_here) or (name.startswith("dedup/") and f"/{plan.pool}/" in name),
        say,
    )


def _run_planned(site: Site, round_: Round) -> Manifest:
    """A round from its plan to its manifest; what is there of it is found, and not made again."""
    time = site.watch.time
    with time("embed"):
        embed_all(site, round_)
    with time("decide"):
        round_ = decide(site, round_)
    with time("dedup"):
        dedup = dedup_all(site, round_)
    with time("index"):
        placed = place_round(site, round_, dedup)
    done = draw_windows(site, round_, placed)
    with time("quality"):
        quality = measure_round(site, round_, placed)
    manifest = account(round_, placed, done, quality)
    _log_attempt(site, round_)
    commit(site.store, manifest)
    return manifest


def _log_attempt(site: Site, round_: Round) -> None:
    """What the round took, on what, at what price."""
    resources, gpus = round_.recipe.resources, site.devices.gpus
    write_attempt(
        site.store,
        round_.number,
        site.watch,
        cpus=all_cpus(),
        gpus=gpus,
        workers=workers_of(resources, gpus, free_cpus()),
        price_per_hour=resources.price_per_hour,
    )


def embed_all(site: Site, round_: Round) -> None:
    """The reference's embeddings of the whole pool, and the learner's in the same pass where that pays.

    A round over at least half of the pool decodes each picture once for both models and keeps the few learner's
    embeddings that it does not need; a smaller one, or one that is told which rows are no candidates, runs the learner
    on its own candidates alone, later.
    """
    plan, recipe = round_.plan, round_.recipe
    encoders = [plan.reference]
    if plan.learner is not None and round_.in_one_pass:
        encoders.append(plan.learner)
    embed_pool(site.store, round_.pool, encoders, recipe.embed, recipe.resources, site.devices)


def dedup_all(site: Site, round_: Round) -> Dedup | None:
    """Which rows of the pool are near-duplicates that leave, if the recipe asks."""
    plan, recipe = round_.plan, round_.recipe
    if recipe.dedup is None:
        return None
    evaluation = [load_pool(site.store, fingerprint) for fingerprint in plan.evaluation]
    for held_out in evaluation:
        embed_pool(site.store, held_out, [plan.reference], recipe.embed, recipe.resources, site.devices)
    return dedup_pool(site.store, round_.pool, plan.reference, recipe.dedup, evaluation, devices=site.devices)


def place_round(site: Site, round_: Round, dedup: Dedup | None) -> Placed:
    """Where a round is: on from its parent, or in a new epoch.

    Raises:
        UserError: the pool holds too few candidates, too many of its rows cannot be used, or its uids repeat.
    """
    recipe, pool, selection = round_.recipe, round_.pool, round_.recipe.selection
    B, wanted = selection.super_batch_size, selection.super_batches
    index = index_pool(site.store, pool, round_.plan.reference, dedup.folder if dedup else None)
    placed = Placed(index=index, dedup=dedup)
    if recipe.pool.on_bad_shard == "fail" and DAMAGED_SHARD in index.statuses:  # earlier rounds may have skipped them
        raise UserError(*damage_of(site.store, pool.shards, round_.plan.reference.sha))
    _check_dropped(placed.embedded, recipe)
    _check_near_duplicates(placed.deduplicated, recipe)

    found = next_windows(
        pool.shards,
        index.candidates,
        selection,
        seed=recipe.seed,
        index=index.folder,
        before=round_.parent[0].lineage["windows"] if round_.parent else None,
    )
    if found is None:
        raise UserError(
            f"selection: a round wants {(wanted or 1) * B:,} candidates ({wanted or 1} super-batches of {B:,}), "
            f"the pool holds {sum(index.candidates):,} distinct usable pairs of {pool.rows:,} rows (the others: "
            f"{_reasons(placed.embedded, placed.deduplicated)}); lower sub_batch_size, filter_ratio or "
            "super_batches, or add shards, and delete the round's folder to begin it anew"
        )
    windows, taken = found
    through = windows_through(selection, seed=recipe.seed, index=index.folder)
    return replace(placed, windows=tuple(windows), taken=taken, through=through)


def draw_windows(site: Site, round_: Round, placed: Placed) -> Drawn:
    """Embed, select and write, window by window: one is embedded by the learner while that before is drawn."""
    found = stretches(placed.windows, placed.taken, round_.recipe.selection.super_batch_size)
    drawn: list[Future[tuple[list[SubBatchStats], list[CuratedFile]]]] = []
    for stretch in found:
        with site.watch.time("window"):
            rows = cut_stretch(site, round_, placed, stretch)
        with site.watch.time("embed learner"):
            embed_learner(site, round_, rows)
        if drawn:
            drawn[-1].result()
        drawn.append(_beside(partial(draw_stretch, site, round_, rows, stretch)))
    results = [stretch.result() for stretch in drawn]
    return Drawn(
        stats=tuple(stats for found, _ in results for stats in found),
        files=tuple(file for _, found in results for file in found),
    )


def _beside(call: Callable[[], R]) -> "Future[R]":
    """Call something in a thread that nobody waits for when the process is told to stop, as they would for a pool's."""
    future: Future[R] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def cut_stretch(site: Site, round_: Round, placed: Placed, stretch: Stretch) -> WindowRows:
    """Which rows a round looks at in one window, by the keys between which its super-batches lie."""
    selection = round_.recipe.selection
    boundaries = cut_window(
        site.store,
        round_.pool,
        round_.plan.reference,
        placed.index,
        stretch.window,
        seed=round_.recipe.seed,
        epoch=placed.taken.epoch,
        super_batch_size=selection.super_batch_size,
    )
    return WindowRows(
        index=placed.index,
        reference=round_.plan.reference,
        seed=round_.recipe.seed,
        epoch=placed.taken.epoch,
        shards=stretch.window.shards,
        share=stretch.super_batches * selection.super_batch_size / stretch.window.candidates,
        boundaries=boundaries[stretch.start : stretch.start + stretch.super_batches + 1],
    )


def embed_learner(site: Site, round_: Round, rows: WindowRows) -> None:
    """The learner's embeddings of a window's rows and of the fixed sample, unless `embed_all` made them."""
    plan, recipe = round_.plan, round_.recipe
    if round_.scorer is not None and not round_.in_one_pass:
        wanted: list[Wanted] = [rows, fixed_sample(round_.pool, recipe.seed, plan.reference)]
        embed_some(site.store, round_.pool, round_.scorer, wanted, recipe.embed, recipe.resources, site.devices)


def draw_stretch(
    site: Site, round_: Round, rows: WindowRows, stretch: Stretch
) -> tuple[list[SubBatchStats], list[CuratedFile]]:
    """Draw the sub-batches of one window, and write them."""
    plan, recipe = round_.plan, round_.recipe
    shards = [round_.pool.shards[i] for i in stretch.window.shards]
    selection = Selection(
        store=site.store,
        section=round_.selection,
        reference=plan.reference,
        learner=round_.scorer,
        scope="" if round_.in_one_pass else rows.scope,
        index=rows.index,
        seed=rows.seed,
        epoch=rows.epoch,
        round=round_.number,
        steps=round_.steps,
        first=stretch.first,
        boundaries=rows.boundaries,
    )
    with site.watch.time("select"):
        stats = select_window(selection, shards, site.devices)
    writing = Writing(
        store=site.store,
        columns=round_.pool.columns,
        schema=curated_schema(round_.pool, pictures=recipe.output.mode == "copy"),
        round=round_.number,
        folder=round_.folder,
        steps=round_.steps,
        first=stretch.first,
        sub_batches=stretch.super_batches,
        sub_batch_size=recipe.selection.sub_batch_size,
        per_file=max(1, recipe.output.file_rows // recipe.selection.sub_batch_size),
    )
    with site.watch.time("write"):
        return stats, write_window(writing, shards)


def account(round_: Round, placed: Placed, drawn: Drawn, quality: dict[str, Any]) -> Manifest:
    """The manifest: what a round holds, where every row of the pool went, and all that made it."""
    selection = round_.recipe.selection
    B, candidates = selection.super_batch_size, sum(placed.index.candidates)
    held = sum(window.candidates // B for window in placed.windows)
    taken = placed.taken.super_batches
    waiting = Tally(
        step="window",
        rows_in=candidates,
        kept=taken * B,
        dropped={
            EARLIER_ROUND: placed.taken.start * B,
            LATER_ROUND: (held - placed.taken.stop) * B,
            WINDOW_END: candidates - held * B,
        },
    )
    parent, parent_sha256 = round_.parent or (None, None)
    return Manifest(
        round=round_.number,
        parent=parent_sha256,
        first_batch=parent.stop_batch if parent else 0,
        sub_batch_size=selection.sub_batch_size,
        sub_batches=taken,
        columns=_columns(round_),
        files=drawn.files,
        pool_rows=round_.pool.rows,
        tallies=(
            placed.embedded,
            placed.deduplicated,
            waiting,
            sum((s.tally for s in drawn.stats[1:]), drawn.stats[0].tally),
        ),
        learnability=tuple(s.learnability for s in drawn.stats),
        uniform_learnability=tuple(s.uniform_learnability for s in drawn.stats),
        reference_loss=tuple(s.reference_loss for s in drawn.stats),
        quality=quality,
        lineage=lineage(round_, placed),
    )


def _columns(round_: Round) -> dict[str, Any]:
    """Which columns hold what; and whose shards hold the pictures, if the round's own files do not."""
    indexed = round_.recipe.output.mode == "index"
    return round_.pool.columns.to_json() | ({"pool": round_.pool.fingerprint} if indexed else {})


def lineage(round_: Round, placed: Placed) -> dict[str, Any]:
    """All that made this round, from the manifest alone."""
    plan, pool, dedup = round_.plan, round_.pool, placed.dedup
    return {
        "plan": plan.digest,
        "recipe": plan.recipe,
        "recipe_fingerprint": plan.recipe_fingerprint,
        "pool": {"fingerprint": pool.fingerprint, "shards": len(pool.shards), "skipped_shards": list(pool.skipped)},
        "reference": plan.reference.to_json(),
        "learner": plan.learner.to_json() | {"number": plan.learner_number} if plan.learner else None,
        "windows": {"taken": placed.taken.to_json(), "through": placed.through, "of": len(placed.windows)},
        "index": placed.index.folder,
        "dedup": {"folder": dedup.folder, "evaluation": list(dedup.evaluation)} if dedup else None,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in RECORDED_LIBRARIES},
    }


def _check_dropped(embedded: Tally, recipe: Recipe) -> None:
    asked = embedded.rows_in - embedded.dropped.get(FILTERED, 0)
    lost = asked - embedded.kept
    if not asked:
        raise UserError(
            f"pool: none of its {embedded.rows_in:,} rows is wanted by pool.where = {recipe.pool.where!r} and "
            f"pool.keep = {recipe.pool.keep!r}; correct them, and delete the round's folder to begin it anew"
        )
    if lost > recipe.pool.max_dropped_share * asked:
        raise UserError(
            f"pool: {lost:,} of {asked:,} rows cannot be used ({_reasons(embedded)}), more than the share "
            f"pool.max_dropped_share = {recipe.pool.max_dropped_share} allows; raise it, or see to the rows "
            "and delete the round's folder to begin it anew"
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
