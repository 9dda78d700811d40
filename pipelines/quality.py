"""Round quality, measured each round: see curate/rounds/quality.py for what it means."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from curate.jest import diagonal_losses
from curate.models.learners import read_learner
from curate.pipelines.cluster import run_tasks
from curate.pipelines.records import Placed, Round, Site
from curate.pipelines.standing import Sample, load_sample
from curate.rounds.manifest import Manifest, read_manifest, steps_folder
from curate.rounds.quality import (
    DIGITS,
    SEEN_PAIRS,
    Contents,
    correlate_samples,
    has_sample,
    read_seen,
    trained_rounds,
    write_sample,
    write_seen,
)
from curate.select.draw import measure_standing
from curate.select.files import read_selected, selected_name
from curate.storage import Store

BLOCK_ROWS = 1_000_000
"""Chosen rows whose contents one task reads."""


def measure_round(site: Site, round_: Round, placed: Placed) -> dict[str, Any]:
    """What a round's manifest says about its quality and that of the rounds that its learner was trained on.

    Args:
        site: where it runs.
        round_: what was decided; its selected files are complete.
        placed: where in the pool it is.
    """
    parent = round_.parent[0] if round_.parent else None
    chosen_again, unique = _seen_before(site.store, round_, placed, parent)
    losses = _batch_losses(site.store, round_, parent)
    sample = load_sample(site, round_) if round_.plan.learner else None
    if sample is not None:
        _write_sample(site.store, round_, sample)
    where = round_.standing or (measure_standing(sample.learner, sample.reference) if sample is not None else None)
    return {
        "learner": round_.plan.learner_number,
        "staleness_batches": _staleness(site.store, round_, parent),
        "standing": where and where.to_json(),
        "rank_correlation": _rank_correlation(site.store, round_, parent) if sample is not None else None,
        "trained": trained_rounds(_rounds_with(site.store, parent, losses), losses),
        "chosen_again": chosen_again,
        "unique_examples": unique,
    }


def _seen_before(store: Store, round_: Round, placed: Placed, parent: Manifest | None) -> tuple[float, int]:
    """Which share of the round's pairs an earlier round chose, and how many different ones all have chosen."""
    b, count = round_.recipe.selection.sub_batch_size, placed.taken.super_batches
    per_block = max(1, BLOCK_ROWS // b)
    blocks = [range(i, min(i + per_block, count)) for i in range(0, count, per_block)]
    seen = read_seen(store, steps_folder(parent.round, parent.lineage["plan"]) if parent else None)
    found = run_tasks(_known, blocks, (store, round_.steps, seen), title="chosen before")
    compared = sum(rows for rows, _, _ in found)
    share = sum(known for _, known, _ in found) / max(1, compared)
    for _, _, smallest in found:
        seen = seen.with_more(smallest)
    write_seen(store, round_.steps, seen)
    before = parent.quality["unique_examples"] if parent else 0
    return round(share, DIGITS), before + round((1 - share) * count * b)


def _known(block: range, shared: tuple[Store, str, Any]) -> tuple[int, int, Contents]:
    """Of some sub-batches the rows that can be compared, those known, and the contents that a sketch keeps."""
    store, steps, seen = shared
    found = [read_selected(store, selected_name(steps, i))[0]["content_low"].to_numpy() for i in block]
    chosen = np.unique(np.concatenate(found))
    return *seen.known(chosen), chosen[:SEEN_PAIRS]


def _rounds_with(store: Store, parent: Manifest | None, batches: dict[int, float]) -> Sequence[Manifest]:
    """The rounds that hold some batches, back from the newest: as many as were trained on since the last one."""
    found: list[Manifest] = []
    while batches and parent is not None and parent.stop_batch > min(batches):
        found.insert(0, parent)
        before = read_manifest(store, parent.round - 1)
        parent = before[0] if before else None
    return found


def _staleness(store: Store, round_: Round, parent: Manifest | None) -> int | None:
    """Committed batches that the learner had not been trained on when this round was begun."""
    if round_.plan.learner_number is None:
        return None
    committed = parent.stop_batch if parent else 0
    return committed - read_learner(store, round_.plan.learner_number).next_batch


def _batch_losses(store: Store, round_: Round, parent: Manifest | None) -> dict[int, float]:
    """Losses in training of the batches between the parent's learner and this round's, when first trained on."""
    before = parent.quality["learner"] if parent else None
    losses: dict[int, float] = {}
    if round_.plan.learner_number is not None:
        for number in range(0 if before is None else before + 1, round_.plan.learner_number + 1):
            with contextlib.suppress(FileNotFoundError):  # a trainer may pass over numbers
                losses = read_learner(store, number).batch_losses | losses
    return losses


def _rank_correlation(store: Store, round_: Round, parent: Manifest | None) -> dict[str, Any] | None:
    """Rank correlation of the sample's learnability under this learner and under the parent's."""
    # Under another reference or loss learnability is another thing.
    same = (round_.plan.reference.to_json(), round_.recipe.selection.loss)
    if parent is None or same != (parent.lineage["reference"], parent.lineage["recipe"]["selection"]["loss"]):
        return None
    parent_steps = steps_folder(parent.round, parent.lineage["plan"])
    if not has_sample(store, parent_steps):
        return None
    value, pairs = correlate_samples(store, round_.steps, parent_steps)
    return {"value": value, "pairs": pairs, "learner": parent.quality["learner"]}


def _write_sample(store: Store, round_: Round, sample: Sample) -> None:
    """Leave the learnability of each pair of the sample, by itself, for the next round."""
    own, fixed = (
        diagonal_losses(model, round_.recipe.selection.loss).cpu().numpy()
        for model in (sample.learner, sample.reference)
    )
    write_sample(store, round_.steps, sample.rows["content_low"], (own - fixed).astype(np.float64))
