"""Publish a model as a learner: what a trainer calls, and how a root gets its first one."""

import math
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch

from curate.errors import CommitConflictError, UserError
from curate.messages import one_line
from curate.models.encoder import load_model, store_encoder, store_model
from curate.models.learners import LearnerCheckpoint, learner_name, newest_learner, read_learner, record_learner
from curate.models.resolution import check_resolution
from curate.recipe import DeviceType, LearnerSection, Precision
from curate.storage import Store


def publish_learner(
    root: str,
    model: torch.nn.Module,
    model_name: str,
    *,
    step: int,
    next_batch: int,
    number: int | None = None,
    precision: Precision | None = None,
    batch_losses: Mapping[int, float] | None = None,
) -> LearnerCheckpoint:
    """Publish an open_clip model as the learner that the next round scores with.

    Args:
        root: the root of the curation.
        model: as `open_clip.create_model(model_name)` makes it, trained; without wrappers such as DDP.
        model_name: open_clip name or `local-dir:FOLDER`; tells configuration and tokenizer.
        step: optimiser steps taken.
        next_batch: `CuratedReader.state_dict()["next_batch"]`.
        number: of the learner; the next free one if None.
        precision: of the forward pass when the next rounds score with it; if None bf16 for a model that is on CUDA, as
            rounds are then likely to be, else fp32. A recipe that names a precision for its learner overrules both.
        batch_losses: by `Batch.number`, the loss per example when that batch was trained on, since the learner before;
            lets the next manifest say how learnable the batches still were by then.

    Raises:
        UserError: unknown `model_name`, a model that it does not describe, or a loss that is not finite; nothing is
            published.
        CommitConflictError: another learner was published under this number meanwhile.
    """
    store = Store(root)
    losses = {int(batch): float(loss) for batch, loss in (batch_losses or {}).items()}
    if broken := [batch for batch, loss in losses.items() if not math.isfinite(loss)]:
        raise UserError(f"batch_losses: batch {broken[0]} has the loss {losses[broken[0]]}; publish a sound model")
    if precision is None:
        precision = "bf16" if next(model.parameters()).is_cuda else "fp32"
    try:
        config = open_clip.get_model_config(model_name)
        if config is None:
            raise UserError(f"model_name = {model_name!r}: not an open_clip model; give the name that made the model")
        tokenizer = open_clip.get_tokenizer(model_name)
        encoder = store_model(store, model, config, tokenizer, source=model_name, precision=precision)
        load_model(store, encoder, torch.device("cpu"))  # as the next round will
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error, 300)
        raise UserError(
            f"model_name = {model_name!r}: does not describe this model ({reason}); give the name that made it, and "
            "the model itself, without wrappers such as DDP"
        ) from error
    return record_learner(store, encoder, step=step, next_batch=next_batch, number=number, batch_losses=losses)


def first_learner(
    store: Store, section: LearnerSection, *, base: Path, seed: int, device_type: DeviceType = "cpu"
) -> LearnerCheckpoint:
    """The newest learner; where there is none, the recipe's own model is published as number 0.

    Raises:
        UserError: as `store_encoder`; or the root began with another learner than the recipe names; or with one that
            cannot be scored at the size that the recipe names.
    """
    newest = newest_learner(store)
    if newest is not None and newest.step:
        if section.scoring_resolution is not None:  # once here, or each worker would find it out
            check_resolution(load_model(store, newest.encoder, torch.device("cpu"))[0], section.scoring_resolution)
        return newest
    encoder = store_encoder(store, section, role="learner", base=base, seed=seed, device_type=device_type)
    if newest is None:
        try:
            return record_learner(store, encoder, step=0, next_batch=0, number=0)
        except CommitConflictError:  # by curation or trainer, the other one: on other devices auto is another precision
            newest = read_learner(store, 0)
    same = newest.encoder.model == encoder.model
    if not same or section.precision not in ("auto", newest.encoder.precision):
        raise UserError(
            f"learner.model = {section.model!r}: {learner_name(newest.number)} holds another untrained model "
            f"({newest.encoder.source}); restore the recipe's learner, seed and precision, or choose another root"
        )
    return newest
