"""Published learners: numbered, immutable, each pointing to a model in the root. See publish.py for how one is made.

learners/l000008/learner.json     put-if-absent; names models/<sha>/, which is there before it
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.sealed import seal, unseal
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
        record = unseal(data, name)
        losses = {int(number): float(loss) for number, loss in record.get("batch_losses", {}).items()}
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
    record: dict[str, Any] = asdict(learner) | {"encoder": encoder.to_json()}
    store.put_if_absent(learner_name(number), seal(record))
    return learner
