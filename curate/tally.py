"""Row accounting: every step says how many rows came in, how many it kept, and why the others left."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from curate.errors import RowsLostError


@dataclass(frozen=True, kw_only=True)
class Tally:
    """rows_in = kept + dropped by reason, checked where the record is built.

    >>> a = Tally(step="embed", rows_in=3, kept=2, dropped={"image_empty": 1})
    >>> (a + a).dropped["image_empty"]
    2

    Raises:
        RowsLostError: if the two sides differ.
    """

    step: str
    rows_in: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accounted = self.kept + sum(self.dropped.values())
        if accounted != self.rows_in:
            raise RowsLostError(
                f"step {self.step}: {self.rows_in} rows came in but {accounted} are accounted for "
                f"({self.kept} kept, dropped {dict(self.dropped)}); nothing was committed"
            )

    def __add__(self, other: "Tally") -> "Tally":
        assert self.step == other.step, (self.step, other.step)
        return Tally(
            step=self.step,
            rows_in=self.rows_in + other.rows_in,
            kept=self.kept + other.kept,
            dropped=dict(Counter(self.dropped) + Counter(other.dropped)),
        )

    @classmethod
    def of(cls, step: str, statuses: Iterable[tuple[str, int]]) -> "Tally":
        """The tally of rows counted by status, where `ok` means kept."""
        counts = Counter[str]()
        for status, rows in statuses:
            counts[status] += rows
        kept = counts.pop("ok", 0)
        return cls(step=step, rows_in=kept + counts.total(), kept=kept, dropped=dict(sorted(counts.items())))

    def to_json(self) -> dict[str, Any]:
        """Plain values, reasons in alphabetical order, for the manifest."""
        return {
            "step": self.step,
            "rows_in": self.rows_in,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
        }


def check_chain(tallies: Sequence[Tally], *, rows: int) -> None:
    """Each step must take in exactly what the one before it kept, and the first one all `rows` of the pool.

    Raises:
        RowsLostError: naming the two steps between which rows appeared or vanished.
    """
    before, kept = "inventory", rows
    for tally in tallies:
        if tally.rows_in != kept:
            raise RowsLostError(
                f"step {before} passed on {kept} rows but step {tally.step} took in {tally.rows_in}; "
                "nothing was committed"
            )
        before, kept = tally.step, tally.kept
