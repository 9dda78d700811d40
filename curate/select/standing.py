"""Where a learner stands beside the reference, and what to choose by there: `selection.criterion = "auto"`.

Measured on a sample of the pool, each pair's picture and caption being asked for among those of all. The learner's own
hits say little: its pool may be dirty, and hits on pairs that the reference takes for wrong are learned by heart. So
what counts is which of the reference's hits are the learner's as well.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from curate.criteria import Decided
from curate.jest import Embeddings

STARTED = 0.5
"""Share of the reference's hits that a learner past its start has: below it, its losses are noise."""
TEACHABLE = 0.005
"""Share of all questions that the reference answers and the learner does not, from which on the reference teaches."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Recall at 1 within a sample of pairs, the mean of both ways."""

    pairs: int
    learner: float
    reference: float
    shared: float
    """Of the reference's hits, the share that are the learner's as well; 1 where the reference has none."""

    @property
    def lead(self) -> float:
        """Share of all questions that the reference answers and the learner does not."""
        return self.reference * (1 - self.shared)

    @property
    def decided(self) -> Decided:
        """What to choose by.

        Easy-reference while the learner is at its start; uniform once the reference knows nothing that the learner does
        not; else learnability. Thresholds are those of the study in docs/acceleration.md.
        """
        if self.lead < TEACHABLE:
            return "uniform"
        return "easy_reference" if self.shared < STARTED else "learnability"

    def to_json(self) -> dict[str, Any]:
        """For the manifest, with what was decided."""
        return asdict(self) | {"lead": self.lead, "decided": self.decided}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Standing":
        """The inverse of `to_json`."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def as_decided(decided: Decided) -> dict[str, str]:
    """The fields of `[selection]` that a decision replaces."""
    if decided == "uniform":
        return {"method": "uniform", "criterion": "easy_reference"}  # neither looks at the learner
    return {"criterion": decided}


def standing(learner: Embeddings, reference: Embeddings) -> Standing:
    """Measure it.

    >>> right, swapped = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    >>> found = standing(Embeddings(right, swapped, 1.0), Embeddings(right, right, 1.0))
    >>> found.reference, found.learner, found.lead, found.decided
    (1.0, 0.5, 0.5, 'learnability')

    Args:
        learner: Embeddings [n, D] of a sample of the pool.
        reference: Of the same pairs.
    """
    own, fixed = (_hits(model) for model in (learner, reference))
    hits = int(fixed.sum())
    return Standing(
        pairs=len(learner),
        learner=float(own.double().mean()),
        reference=float(fixed.double().mean()),
        shared=int((own & fixed).sum()) / hits if hits else 1.0,
    )


def _hits(model: Embeddings) -> torch.Tensor:
    """Bool [2 n]: whether each picture's caption, and each caption's picture, is nearer than all others."""
    cosines = model.zimg.float() @ model.ztxt.float().T
    own = cosines.diagonal().clone()
    cosines.fill_diagonal_(-torch.inf)
    return torch.cat([own > cosines.amax(1), own > cosines.amax(0)])
