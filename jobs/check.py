"""`curate check`: what a round would do, on what, at what cost; nothing is written into the root."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from curate.encoder import create_model
from curate.errors import UserError
from curate.manifest import last_round
from curate.messages import counted, gathered
from curate.plan import evaluation_sets
from curate.pool import Pool, take_inventory
from curate.recipe import EncoderSection, Recipe, ResourcesSection
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
    rows, shards = counted(pool.rows, "row"), counted(len(pool.shards), "shard")
    yield f"pool: {rows} in {shards}, {pool.columns.image} with {pool.columns.caption}"
    if pool.ignored:
        yield f"pool: {counted(len(pool.ignored), 'file')} ignored, such as {pool.ignored[0]}"
    yield from (f"pool: skipped {line}" for line in pool.skipped)
    if recipe.dedup is not None:
        held_out = f"; {sum(seen.rows for seen in evaluation):,} evaluation rows are kept out" if evaluation else ""
        yield f"dedup: {recipe.dedup.groups} of cosine {recipe.dedup.threshold} and above{held_out}"
    yield f"next round: {newest + 1}"
    for role, section in encoders.items():
        if section is not None:
            yield f"{role}: {section.source}, {_precision(section, recipe.resources)}"
    super_batches = counted(wanted, "super-batch", "super-batches")
    yield (
        f"selection: {super_batches} of {size:,} at most, {selection.method} {selection.criterion}, "
        f"{wanted * selection.sub_batch_size:,} rows in batches of {selection.sub_batch_size:,}"
    )
    passes = len(encoders) * pool.rows + sum(seen.rows for seen in evaluation)
    yield f"cost: {passes:,} forward passes at most; embeddings that exist are not made again"


def _precision(section: EncoderSection, resources: ResourcesSection) -> str:
    """What a model will compute in, as far as can be known without joining the cluster."""
    device = resources.device
    if device == "auto" and resources.address == "local" and "RAY_ADDRESS" not in os.environ:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto":
        return f"{section.precision_on(device)} on {device}"
    if section.precision != "auto":
        return section.precision
    return "bf16 if the cluster has GPUs, else fp32; a model that is in use stays at what it was begun with"
