"""`curate check`: what a round would do, on what, at what cost; what it passes, `round` and `train` run.

Nothing is written. Models are made as both would make them, and a sample of the pool is decoded; what only the whole
pool can tell, such as how many pairs are distinct or whether every page is sound, is left to the round.
"""

import contextlib
import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curate.errors import InputChangedError, UserError
from curate.jobs.changes import changes_since
from curate.jobs.checkpoint import check_kind, checkpoints, load_checkpoint
from curate.jobs.memory import TrainerMemory, stated_ranks, trainer_memory
from curate.jobs.sample import Sample, ask_pool, sample_pool
from curate.jobs.train import check_trainable
from curate.messages import counted, gathered, one_line
from curate.models.create import create_model
from curate.models.encoder import check_storable, load_model
from curate.models.learners import newest_learner, record_learner
from curate.models.publish import first_learner
from curate.models.resolution import check_resolution
from curate.pipelines import progress
from curate.pool.hive import folder_columns
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.pool.wanted import FILTERED
from curate.reader.evaluate import MAX_ROWS, load_held_out
from curate.recipe import (
    DeviceType,
    EncoderSection,
    EvaluateSection,
    PoolSection,
    Recipe,
    ResourcesSection,
    SelectionSection,
)
from curate.rounds.manifest import last_round, read_manifest
from curate.rounds.plan import (
    evaluation_sets,
    foreseen_selection,
    indices_of,
    known_inventory,
    pin_plan,
    plan_name,
)
from curate.rounds.stream import END_NAME, stream_end
from curate.select.draw import needs_learner
from curate.select.topics import likeness, sample_captions
from curate.select.windows import EpochRange, stretches, windows_of
from curate.storage import Store

TOPIC_SHARDS = 16
"""Spread over the pool: captions of a few rows of each tell whether it is sorted by topic."""
SMALL_ROWS = 2048
"""A held-out set up to this size is read whole, as the trainer will."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a sound recipe leads to."""

    pool: Pool
    sample: Sample
    wanted: int
    """Rows of the pool that the recipe wants, at most."""
    evaluation: list[Pool]
    next_round: int
    memory: TrainerMemory | None
    """Of the trainer, on one rank; None if shapes do not tell."""
    selection: SelectionSection
    """As the next round will probably choose."""


def check_recipe(recipe: Recipe, *, base: Path, measure: bool = True, imports_s: float = 0.0) -> Iterator[str]:
    """Look at pool, models and root; yield what would run, a line each.

    With `train.data = "pool"` and no reference the recipe is one of the trainer alone, and no round is asked of it.

    Args:
        recipe: the whole recipe.
        base: its folder.
        measure: whether to embed a few batches and say what the next round costs.
        imports_s: that this process took to import this module, as workers will.

    Raises:
        UserError: every mistake that can be known before a round, together.
    """
    mistakes: list[str] = []
    store, newest = None, -1
    with gathered(mistakes):
        store, newest = _root(recipe)
    # What a round has found out of the pool's files; before the first one nothing is left in the root.
    begun = store if newest >= 0 else None
    indices = None if begun is None else indices_of(begun)
    pool = sample = asked = None
    with gathered(mistakes):
        pool = take_inventory(
            recipe.pool,
            progress=lambda footers, total: progress.over(footers, total, title="inventory", unit="shard"),
            known=None if begun is None else known_inventory(begun),
            indices=indices,
        )
        sample = sample_pool(pool)
        asked = ask_pool(pool)
        mistakes += [] if _of_trainer_alone(recipe) else asked.mistakes  # which asks for no uids
        mistakes += _pool_mistakes(sample, asked.wanted, pool, recipe)
    evaluation: list[Pool] = []
    memory: TrainerMemory | None = None
    with gathered(mistakes):
        evaluation = evaluation_sets(recipe, indices=indices)
    with gathered(mistakes):
        _check_held_out(recipe.evaluate)
    with gathered(mistakes):
        _check_reference(recipe, base)
    with gathered(mistakes):
        memory = _check_learner(recipe, base, store)
    if store is not None and not mistakes:
        with gathered(mistakes):
            _check_next_round(store, recipe, base, newest)
    if mistakes or pool is None or sample is None or asked is None or store is None:
        raise UserError(*mistakes)
    found = _Found(
        pool=pool,
        sample=sample,
        wanted=asked.wanted,
        evaluation=evaluation,
        next_round=newest + 1,
        memory=memory,
        selection=foreseen_selection(store, recipe),
    )
    yield from _described(recipe, found)
    if newest >= 0 and not _of_trainer_alone(recipe) and (last := read_manifest(store, newest)) is not None:
        yield from changes_since(last[0], recipe)
    if measure and not _of_trainer_alone(recipe):
        yield from _cost(store, recipe, found, base, imports_s)


def _described(recipe: Recipe, found: _Found) -> Iterator[str]:
    pool, selection = found.pool, recipe.selection
    rows, shards = counted(pool.rows, "row"), counted(len(pool.shards), "shard")
    yield f"pool: {rows} in {shards}, {pool.columns.image} with {pool.columns.caption}"
    if folders := sorted({name for shard in pool.shards for name in folder_columns(shard.path)}):
        yield f"pool: the names of folders give {', '.join(folders)}, as text, to files without such a column"
    if pool.ignored:
        yield f"pool: {counted(len(pool.ignored), 'file')} ignored, such as {pool.ignored[0]}"
    yield from (f"pool: skipped {line}" for line in pool.skipped)
    yield f"pool: {found.sample}"
    seen = sum(held_out.rows for held_out in found.evaluation)
    if recipe.dedup is not None:
        kept_out = f"; {seen:,} evaluation rows are kept out" if found.evaluation else ""
        yield f"dedup: {recipe.dedup.groups} of cosine {recipe.dedup.threshold} and above{kept_out}"
    encoders = {} if recipe.reference is None else {"reference": recipe.reference}
    if recipe.reference is None or needs_learner(selection):
        encoders["learner"] = recipe.learner
    yield (
        "next round: none without [reference], for curate train alone"
        if _of_trainer_alone(recipe)
        else f"next round: {found.next_round}"
    )
    yield from (
        f"{role}: {section.source}, {_precision(section, recipe.resources)}" for role, section in encoders.items()
    )
    memory = [] if found.memory is None else [f"train: one rank holds about {found.memory}"]
    if _of_trainer_alone(recipe):
        yield from memory
        yield f"train: {recipe.train.steps:,} uniform batches of {selection.sub_batch_size:,}"
        return
    size = selection.super_batch_size
    wanted = selection.super_batches or found.wanted // size
    super_batches = counted(wanted, "super-batch", "super-batches")
    yield (
        f"selection: {super_batches} of {size:,} at most, {selection.method} {selection.criterion}, "
        f"{wanted * selection.sub_batch_size:,} rows in batches of {selection.sub_batch_size:,}"
    )
    likely = found.selection
    if selection.is_open:
        yield (
            f"selection: probably {'uniform' if likely.method == 'uniform' else likely.criterion} in this round, which "
            "decides by its learner's standing beside the reference on a sample of the pool"
        )
    yield from _windows(recipe, pool, wanted)
    learner = f"{wanted * size if needs_learner(likely) else 0:,}"
    if selection.is_open:
        learner = f"a sample, and {wanted * size:,} if it chooses by learnability,"
    yield (
        f"cost: {found.wanted + seen:,} forward passes of the reference at most, once, and {learner} of the learner in "
        "each round; embeddings that exist are not made again"
    )
    yield from memory


def _windows(recipe: Recipe, pool: Pool, super_batches: int) -> Iterator[str]:
    """How the next epoch is cut, were all rows candidates, and whether a window is a fair sample of the pool."""
    selection, size = recipe.selection, recipe.selection.super_batch_size
    windows = windows_of(
        pool.shards,
        [shard.rows for shard in pool.shards],
        seed=recipe.seed,
        epoch=0,
        window_rows=selection.least_window_rows,
    )
    if len(windows) == 1:
        yield "windows: one, the whole pool, of which every super-batch is a uniform sample"
        return
    met = stretches(windows, EpochRange(epoch=0, start=0, super_batches=super_batches), size)
    read = sum(stretch.window.candidates for stretch in met)
    fewest, most = (of(len(window.shards) for window in windows) for of in (min, max))
    shards = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    yield (
        f"windows: {len(windows)} in an epoch, of {shards} shards each; a round meets {counted(len(met), 'window')}, "
        f"and reads row groups that hold its {super_batches * size:,} candidates among {read:,} rows"
    )
    step = max(1, len(pool.shards) // TOPIC_SHARDS)
    alike = likeness([sample_captions(shard) for shard in pool.shards[::step][:TOPIC_SHARDS] if shard.rows])
    if alike is not None and alike.is_sorted:
        yield (
            f"windows: captions of one shard are {alike.within / max(alike.across, 1e-9):.1f} times as alike as those "
            f"of two: the pool is sorted by topic, and a window of {fewest} shards is no fair sample of it; shuffle "
            f"it once: curate reshard {shlex.quote(_first(recipe.pool.path))} --to FOLDER --shuffle"
        )


def _cost(store: Store, recipe: Recipe, found: _Found, base: Path, imports_s: float) -> Iterator[str]:
    """What the next round costs, or why that is not known."""
    sample = found.sample
    try:
        # Here, because it imports Ray, and only who measures has seconds to spare.
        from curate.jobs.cost import cost_of  # noqa: PLC0415

        yield from cost_of(
            store,
            recipe,
            found.pool,
            found.evaluation,
            base=base,
            number=found.next_round,
            usable=1 - sample.dropped.total() / max(1, sample.rows),
            imports_s=imports_s,
        )
    except Exception as error:  # a device that is full, a disk that is: a round may do all the same
        yield f"measured: nothing: {one_line(error, 300)}"


def _first(path: str | list[str]) -> str:
    return path if isinstance(path, str) else path[0]


def _of_trainer_alone(recipe: Recipe) -> bool:
    return recipe.train.data == "pool" and recipe.reference is None


def _root(recipe: Recipe) -> tuple[Store, int]:
    """The root and its newest round."""
    store = Store(recipe.root)
    newest = last_round(store)  # first: where nobody answers a read is given up on at once, a write after two minutes
    with _leaving_no_folder(store):
        store.probe()
    return store, newest


@contextlib.contextmanager
def _leaving_no_folder(store: Store) -> Iterator[None]:
    """Remove the folders that a local root was given meanwhile, as long as they are empty."""
    hidden = store.local_path(".probe")
    folders = [] if hidden is None else [folder for folder in hidden.parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _pool_mistakes(sample: Sample, wanted: int, pool: Pool, recipe: Recipe) -> Iterator[str]:
    columns, selection = pool.columns, recipe.selection
    filtered = sample.dropped[FILTERED]
    lost = sample.dropped.total() - filtered
    if pool.rows and (not wanted or filtered == pool.rows):
        yield (
            f"pool: none of its {pool.rows:,} rows is wanted by pool.where = {recipe.pool.where!r} and pool.keep = "
            f"{recipe.pool.keep!r}; correct them"
        )
        return
    if lost and lost + filtered == sample.rows:
        yield (
            f"pool: columns {(columns.paths or columns.image)!r} and {columns.caption!r}: expected pictures with "
            f"captions, found that {sample}; mend the files, or name other columns with pool.image and pool.caption"
        )
    elif not _of_trainer_alone(recipe) and lost > recipe.pool.max_dropped_share * pool.rows:  # whatever the others are
        yield (
            f"pool: {sample}, and {lost} of the pool's {pool.rows:,} rows is more than pool.max_dropped_share = "
            f"{recipe.pool.max_dropped_share} allows; see to the rows, or raise it"
        )
    least, size = selection.super_batches or 1, selection.super_batch_size
    holds = f"the pool holds {pool.rows:,} rows" + (f", of which {wanted:,} are wanted" if wanted < pool.rows else "")
    if _of_trainer_alone(recipe):
        if wanted < selection.sub_batch_size:
            yield (
                f"selection: a batch wants {selection.sub_batch_size:,} pairs, {holds}; lower sub_batch_size, or add "
                "shards"
            )
    elif wanted < least * size:
        yield (
            f"selection: a round wants {least * size:,} candidates ({least} super-batches of {size:,}), {holds}; "
            "lower sub_batch_size, filter_ratio or super_batches, or add shards"
        )


def _check_reference(recipe: Recipe, base: Path) -> None:
    section = recipe.reference
    if section is not None:
        model, config, _ = create_model(section, role="reference", base=base, seed=recipe.seed)
        check_storable(model, config, source=section.source)
    elif not _of_trainer_alone(recipe):
        raise UserError("reference: must be given for a round; add [reference] with model and pretrained")


def _check_learner(recipe: Recipe, base: Path, store: Store | None) -> TrainerMemory | None:
    """Check the learner that rounds and trainer will take: the root's once it was trained, before that the recipe's.

    Returns:
        What training it holds in memory.
    """
    newest = newest_learner(store) if store else None
    trained = newest.encoder if newest and newest.step else None
    goes_on = trained if recipe.train.data == "rounds" else None
    if store and (names := checkpoints(store)):
        progress, _ = load_checkpoint(store, names[-1])
        check_kind(progress, recipe, names[-1])
        goes_on = progress.start
    if store and goes_on is not None:
        model, config, _ = load_model(store, goes_on, torch.device("cpu"))
        check_trainable(model, recipe)
        if recipe.learner.scoring_resolution is not None:
            check_resolution(model, recipe.learner.scoring_resolution)
        if trained or not needs_learner(recipe.selection):
            return _memory(model, config, recipe)  # the recipe's is not looked at
    model, config, _ = create_model(recipe.learner, role="learner", base=base, seed=recipe.seed)
    check_trainable(model, recipe)
    check_storable(model, config, source=recipe.learner.source)
    if newest is not None and not newest.step and recipe.train.data == "rounds":
        with tempfile.TemporaryDirectory() as scratch:  # where the recipe's own model may be written, to be named
            copy = Store(scratch)
            record_learner(copy, newest.encoder, step=0, next_batch=0, number=newest.number)
            first_learner(copy, recipe.learner, base=base, seed=recipe.seed)
    return _memory(model, config, recipe)


def _memory(model: torch.nn.Module, config: dict[str, Any], recipe: Recipe) -> TrainerMemory | None:
    b = recipe.selection.sub_batch_size
    device_type: DeviceType = "cuda" if torch.cuda.is_available() else "cpu"  # as the trainer chooses
    rows = b // stated_ranks(b, recipe.train)
    smaller = recipe.learner.scoring_resolution if recipe.train.approximate_share else None
    how = {"rows": rows, "batch": b, "embed_dim": config["embed_dim"], "device_type": device_type}
    with contextlib.suppress(RuntimeError):
        return trainer_memory(model, settings=recipe.train, smaller=smaller, **how)
    return None


def _check_next_round(store: Store, recipe: Recipe, base: Path, newest: int) -> None:
    if _of_trainer_alone(recipe):
        return
    if stream_end(store) is not None:
        raise UserError(f"{store.url}: the stream of rounds was ended after round {newest}; delete {END_NAME} to go on")
    if store.exists(plan_name(newest + 1)):
        pin_plan(store, recipe, base=base, number=newest + 1)  # begun already: this only compares


def _check_held_out(section: EvaluateSection | None) -> None:
    """Check the trainer's held-out set: a small one as it will, of a large one what inventory and a sample tell."""
    if section is None:
        return
    where = PoolSection(path=section.path, image=section.image, caption=section.caption)
    held_out = take_inventory(where, section_name="evaluate")
    if held_out.rows <= SMALL_ROWS or held_out.rows > MAX_ROWS:
        try:
            load_held_out(section.path, image=section.image, caption=section.caption, label=section.label)
        except InputChangedError as error:
            raise UserError(str(error)) from error
    elif section.label is not None and section.label not in held_out.schema.names:
        raise UserError(
            f"evaluate.label = {section.label!r}: expected a column of the set, found "
            f"{', '.join(map(repr, held_out.schema.names[:20]))}; name one of these, or leave evaluate.label out"
        )
    elif (sample := sample_pool(held_out)).dropped.total() == sample.rows:
        raise UserError(f"evaluate.path = {section.path!r}: expected pictures with captions, found that {sample}")


def _precision(section: EncoderSection, resources: ResourcesSection) -> str:
    """What a model will compute in, as far as can be known without joining the cluster."""
    device = resources.device
    if device == "auto" and (os.environ.get("RAY_ADDRESS") or resources.address) == "local":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto":
        return f"{section.precision_on(device)} on {device}"
    if section.precision != "auto":
        return section.precision
    return "bf16 if the cluster has GPUs, else fp32; a model that is in use stays at what it was begun with"
