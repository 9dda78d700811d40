"""`curate check`: what a round would do, on what, at what cost; nothing is written into the root."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from curate.encoder import create_model
from curate.errors import UserError
from curate.manifest import last_round
from curate.messages import gathered
from curate.plan import evaluation_sets
from curate.pool import Pool, take_inventory
from curate.recipe import Recipe
from curate.select import needs_learner
from curate.storage import Store


def check_recipe(recipe: Recipe, *, base: Path) -> Iterator[str]:
    """Look at pool, models and root; yield what would run, a line each.

    Raises:
        UserError: every mistake that can be known before a round, together.
    """
    mistakes: list[str] = []
    pool: Pool | None = None
    evaluation: list[Pool] = []
    with gathered(mistakes):
        store = Store(recipe.root)
        store.probe()
        newest = last_round(store)
    with gathered(mistakes):
        pool = take_inventory(
            recipe.pool, progress=lambda footers, total: tqdm(footers, total=total, desc="inventory", disable=None)
        )
    with gathered(mistakes):
        evaluation = evaluation_sets(recipe)
    if recipe.reference is None:
        mistakes.append("reference: must be given for a round; add [reference] with model and pretrained")
    encoders = {"reference": recipe.reference}
    if needs_learner(recipe.selection):
        encoders["learner"] = recipe.learner
    for role, section in encoders.items():
        with gathered(mistakes):
            if section is not None:
                create_model(section, role=role, base=base, seed=recipe.seed)
    selection = recipe.selection
    size = selection.super_batch_size
    least = selection.super_batches or 1
    if pool is not None and pool.rows < least * size:
        mistakes.append(
            f"selection: a round wants {least * size:,} candidates ({least} super-batches of {size:,}), the "
            f"pool holds {pool.rows:,} rows; lower sub_batch_size, filter_ratio or super_batches, or add shards"
        )
    if mistakes or pool is None:
        raise UserError(*mistakes)

    wanted = selection.super_batches or pool.rows // size
    yield f"pool: {pool.rows:,} rows in {len(pool.shards):,} shards, {pool.columns.image} with {pool.columns.caption}"
    if pool.ignored:
        yield f"pool: {len(pool.ignored)} files ignored, such as {pool.ignored[0]}"
    yield from (f"pool: skipped {line}" for line in pool.skipped)
    if recipe.dedup is not None:
        held_out = f"; {sum(seen.rows for seen in evaluation):,} evaluation rows are kept out" if evaluation else ""
        yield f"dedup: {recipe.dedup.groups} of cosine {recipe.dedup.threshold} and above{held_out}"
    yield f"next round: {newest + 1}"
    yield (
        f"selection: {wanted} super-batches of {size:,} at most, {selection.method} {selection.criterion}, "
        f"{wanted * selection.sub_batch_size:,} rows in batches of {selection.sub_batch_size:,}"
    )
    passes = len(encoders) * pool.rows + sum(seen.rows for seen in evaluation)
    yield f"cost: {passes:,} forward passes at most; embeddings that exist are not made again"
