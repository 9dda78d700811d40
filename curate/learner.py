"""Published learners: numbered, immutable, each pointing to a model in the root.

learners/l000008/learner.json     put-if-absent; names models/<sha>/, which is there before it
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import open_clip
import torch

from curate.encoder import load_model, store_encoder, store_model
from curate.errors import UserError
from curate.messages import one_line
from curate.recipe import EncoderSection, Precision
from curate.spec import EncoderSpec
from curate.storage import Store


@dataclass(frozen=True, kw_only=True)
class LearnerCheckpoint:
    """One published learner."""

    number: int
    encoder: EncoderSpec
    step: int
    """Optimiser steps taken since the learner was made."""
    next_batch: int
    """State of the reader: the first batch that this learner has not been trained on."""
    batch_losses: dict[int, float] = field(default_factory=dict)
    """By number of the batch, its loss per example when it was trained on; those since the learner before."""


def learner_name(number: int) -> str:
    """Name of a learner's record within the root."""
    return f"learners/l{number:06d}/learner.json"


def read_learner(store: Store, number: int) -> LearnerCheckpoint:
    """A published learner.

    Raises:
        FileNotFoundError: there is none of this number.
        UserError: not the record of a learner.
    """
    name = learner_name(number)
    data = store.read_bytes(name)
    try:
        record = json.loads(data)
        losses = {int(number): float(loss) for number, loss in record["batch_losses"].items()}
        return LearnerCheckpoint(**record | {"encoder": EncoderSpec(**record["encoder"]), "batch_losses": losses})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: expected a learner, found something else ({error}); restore the file") from error


def newest_learner(store: Store) -> LearnerCheckpoint | None:
    """The published learner with the highest number, or None."""
    numbers = (re.fullmatch(r"learners/l(\d{6,})", name) for name in store.list("learners"))
    for number in sorted((int(match[1]) for match in numbers if match), reverse=True):
        if store.exists(learner_name(number)):
            return read_learner(store, number)
    return None


def publish_learner(
    root: str,
    model: torch.nn.Module,
    model_name: str,
    *,
    step: int,
    next_batch: int,
    number: int | None = None,
    precision: Precision = "fp32",
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
        precision: of the forward pass when the next rounds score with it.
        batch_losses: by `Batch.number`, the loss per example when that batch was trained on, since the learner before;
            lets the next manifest say how learnable the batches still were by then.

    Raises:
        UserError: unknown `model_name`, or a model that it does not describe; nothing is published.
        CommitConflictError: another learner was published under this number meanwhile.
    """
    store = Store(root)
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
    return record_learner(
        store, encoder, step=step, next_batch=next_batch, number=number, batch_losses=batch_losses or {}
    )


def first_learner(store: Store, section: EncoderSection, *, base: Path, seed: int) -> LearnerCheckpoint:
    """The newest learner; where there is none, the recipe's own model is published as number 0.

    Raises:
        UserError: as `store_encoder`; or the root began with another learner than the recipe names.
    """
    newest = newest_learner(store)
    if newest is not None and newest.step:
        return newest
    encoder = store_encoder(store, section, role="learner", base=base, seed=seed)
    if newest is None:
        return record_learner(store, encoder, step=0, next_batch=0, number=0)
    if newest.encoder.sha != encoder.sha:
        raise UserError(
            f"learner.model = {section.model!r}: {learner_name(newest.number)} holds another untrained model "
            f"({newest.encoder.source}); restore the recipe's learner, seed and precision, or choose another root"
        )
    return newest


def record_learner(
    store: Store,
    encoder: EncoderSpec,
    *,
    step: int,
    next_batch: int,
    number: int | None = None,
    batch_losses: Mapping[int, float] = MappingProxyType({}),
) -> LearnerCheckpoint:
    """Publish a model of the root as a learner: the one act of its publication. Doing it twice changes nothing.

    Raises:
        CommitConflictError: another learner was published under this number.
    """
    if number is None:
        newest = newest_learner(store)
        number = newest.number + 1 if newest else 0
    learner = LearnerCheckpoint(
        number=number, encoder=encoder, step=step, next_batch=next_batch, batch_losses=dict(batch_losses)
    )
    record: dict[str, Any] = asdict(learner)
    store.put_if_absent(learner_name(number), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return learner
