"""Where a learner stands beside the reference, and what to choose by there: `selection.criterion = "auto"`.

Measured on a sample of the pool, each pair's picture and caption being asked for among those of all. The learner's own
hits say little: its pool may be dirty, and hits on pairs that the reference takes for wrong are learned by heart. So
what counts is which of the reference's hits are the learner's as well.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from curate.criteria import Decided

STARTED = 0.5
"""Share of the reference's hits that a learner past its start has: below it, its losses are noise."""
LEAST_PAIRS = 32
"""Of a sample: with fewer, nothing can be told, and what does not look at the learner is chosen by."""
SPARSE = 0.15
"""Share of all questions that the reference answers, below which most of the pool is nothing that it is for. There a
learner has most to learn about the rest, and learnability goes after it: docs/acceleration.md, "With a cosine"."""
TEACHABLE = 0.005
"""Share of all questions that the reference answers and the learner does not, from which on the reference teaches."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Recall at 1 within a sample of pairs, the mean of both ways."""

    pairs: int
    """Of the sample, each content once."""
    learner: float
    """Share of all questions that the learner answers: two for each pair."""
    reference: float
    """Likewise the reference."""
    shared: float
    """Of the reference's hits, the share that are the learner's as well; 1 where the reference has none."""

    @property
    def lead(self) -> float:
        """Share of all questions that the reference answers and the learner does not."""
        return self.reference * (1 - self.shared)

    @property
    def decided(self) -> Decided:
        """What to choose by.

        Uniform once the reference knows nothing that the learner does not; easy-reference while the learner is at its
        start, or where the reference knows little of the pool; else learnability. Thresholds are those of
        docs/acceleration.md.
        """
        if self.pairs < LEAST_PAIRS:
            return "easy_reference"
        if self.lead < TEACHABLE:
            return "uniform"
        return "easy_reference" if self.reference < SPARSE or self.shared < STARTED else "learnability"

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
