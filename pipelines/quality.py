"""Round quality, measured each round: see curate/quality.py for what it means."""

import contextlib
from typing import Any

import numpy as np

from curate.jest import diagonal_losses
from curate.learner import read_learner
from curate.manifest import Manifest, read_manifest, steps_folder
from curate.plan import Plan
from curate.pool import Pool
from curate.quality import (
    DIGITS,
    Contents,
    correlate_samples,
    count_known,
    has_sample,
    read_chosen,
    trained_rounds,
    write_chosen,
    write_sample,
)
from curate.recipe import Recipe
from curate.select import Candidates, Scale, embeddings_of
from curate.selected import read_selected, selected_name
from curate.spec import EncoderSpec
from curate.storage import Store
from pipelines.cluster import device
from pipelines.keys import fixed_sample
from pipelines.select import load_candidates


def measure_round(
    store: Store,
    pool: Pool,
    plan: Plan,
    recipe: Recipe,
    *,
    parent: Manifest | None,
    scope: str,
    steps: str,
    sub_batches: int,
    through: list[Any],
    epoch: int,
    dedup: str | None,
) -> dict[str, Any]:
    """What this round's manifest says about its quality and that of the rounds that its learner was trained on.

    Args:
        store: the root.
        pool: the inventory.
        plan: of the round.
        recipe: the whole recipe.
        parent: manifest of the round before.
        scope: of the learner's embedding files.
        steps: folder of the round's steps, selection finished.
        sub_batches: of the round.
        through: what the round's walk depends on.
        epoch: of its walk.
        dedup: folder of the deduplication whose dropped rows are no candidates.
    """
    chosen = write_chosen(store, steps, _contents(store, steps, sub_batches))
    earlier = _rounds_before(store, parent)
    known = count_known(
        chosen,
        # Rounds of one epoch of one walk are disjoint.
        (
            read_chosen(store, steps_folder(manifest.round, manifest.lineage["plan"]))
            for manifest in earlier
            if (manifest.lineage["walk"]["through"], manifest.lineage["walk"]["range"]["epoch"]) != (through, epoch)
        ),
    )
    before = parent.quality["unique_examples"] if parent else 0
    return {
        "learner": plan.learner_number,
        "staleness_batches": _staleness(store, plan, parent),
        "rank_correlation": _rank_correlation(store, pool, plan, recipe, parent, scope, steps, dedup),
        "trained": trained_rounds(earlier, _batch_losses(store, plan, parent)),
        "chosen_again": round(known / len(chosen), DIGITS),
        "unique_examples": before + len(chosen) - known,
    }


def _contents(store: Store, steps: str, sub_batches: int) -> Contents:
    """Contents of the pairs that the round chose."""
    return np.concatenate(
        [read_selected(store, selected_name(steps, i))[0]["content_low"].to_numpy() for i in range(sub_batches)]
    )


def _rounds_before(store: Store, parent: Manifest | None) -> list[Manifest]:
    found = [read_manifest(store, number) for number in range(parent.round + 1 if parent else 0)]
    return [read[0] for read in found if read is not None]


def _staleness(store: Store, plan: Plan, parent: Manifest | None) -> int | None:
    """Committed batches that the learner had not been trained on when this round was begun."""
    if plan.learner_number is None:
        return None
    committed = parent.stop_batch if parent else 0
    return committed - read_learner(store, plan.learner_number).next_batch


def _batch_losses(store: Store, plan: Plan, parent: Manifest | None) -> dict[int, float]:
    """Losses in training of the batches between the parent's learner and this round's, when first trained on."""
    before = parent.quality["learner"] if parent else None
    losses: dict[int, float] = {}
    if plan.learner_number is not None:
        for number in range(0 if before is None else before + 1, plan.learner_number + 1):
            with contextlib.suppress(FileNotFoundError):  # a trainer may pass over numbers
                losses = read_learner(store, number).batch_losses | losses
    return losses


def _rank_correlation(
    store: Store,
    pool: Pool,
    plan: Plan,
    recipe: Recipe,
    parent: Manifest | None,
    scope: str,
    steps: str,
    dedup: str | None,
) -> dict[str, Any] | None:
    """Rank correlation of the sample's learnability under this learner and under the parent's."""
    if plan.learner is None:
        return None
    _write_sample(store, pool, recipe, plan.reference, plan.learner, scope, steps, dedup)
    # Under another reference or loss learnability is another thing.
    same = (plan.reference.to_json(), recipe.selection.loss)
    if parent is None or same != (parent.lineage["reference"], parent.lineage["recipe"]["selection"]["loss"]):
        return None
    parent_steps = steps_folder(parent.round, parent.lineage["plan"])
    if not has_sample(store, parent_steps):
        return None
    value, pairs = correlate_samples(store, steps, parent_steps)
    return {"value": value, "pairs": pairs, "learner": parent.quality["learner"]}


def _write_sample(
    store: Store,
    pool: Pool,
    recipe: Recipe,
    reference: EncoderSpec,
    learner: EncoderSpec,
    scope: str,
    steps: str,
    dedup: str | None,
) -> None:
    """Measure the learnability, each pair by itself, of the fixed sample."""
    sample = fixed_sample(pool, recipe.seed)
    keys = sample.keys
    loaded = Candidates.concatenate(
        [
            load_candidates(
                store,
                pool.shards[index],
                reference,
                learner,
                scope,
                (keys.low, keys.high),
                seed=keys.seed,
                epoch=keys.epoch,
                dedup=dedup,
            )
            for index in sorted(sample.shards)
        ]
    )
    sound = loaded.take(loaded.finite_rows())
    _, first = np.unique(sound.rows["low"], return_index=True)
    sound = sound.take(first)
    losses = []
    for vectors, spec in ((sound.learner, learner), (sound.reference, reference)):
        assert vectors is not None
        scale = Scale(logit_scale=spec.logit_scale, logit_bias=spec.logit_bias)
        losses.append(diagonal_losses(embeddings_of(vectors, scale, device()), recipe.selection.loss).cpu().numpy())
    write_sample(store, steps, sound.rows["low"], (losses[0] - losses[1]).astype(np.float64))
