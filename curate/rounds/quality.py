"""Round quality: does the learner still see the pool as it did, was a round worth its batches, does it choose anew?

What each round leaves for the next ones to compare with, in its steps' folder:

    sample.parquet    learnability of each pair of a fixed sample under the round's learner
    seen.parquet      the smallest contents of all pairs that this round or one before it chose

After jest.py's paper these are the questions that a round made ahead of its training raises (arXiv 2406.17711 rescores
at every step and need not ask them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.criteria import Decided
from curate.errors import UserError
from curate.parquet import read_table, write_table
from curate.rounds.manifest import Manifest
from curate.select.standing import as_decided
from curate.storage import Store

Contents = npt.NDArray[np.uint64]
"""Half of each content hash: 64 bits tell rows well enough apart to count them."""
SEEN_PAIRS = 2**18
"""Of a sketch, 2 MiB: shares are exact up to so many pairs, and known from a random sample of so many beyond."""
DIGITS = 6
"""To which a manifest rounds correlations and shares."""


def rank_correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    """Spearman's correlation of two samples [n]: that of their ranks, equal values sharing their mean rank.

    None where it is not defined: fewer than two values, or all equal.

    >>> rank_correlation(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 40, 30]))
    0.8
    """
    ranks = [_mean_ranks(values) for values in (a, b)]
    if len(a) < 2 or any(np.ptp(values) == 0 for values in ranks):
        return None
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), DIGITS)


def trained_rounds(rounds: Sequence[Manifest], batch_losses: Mapping[int, float]) -> list[dict[str, Any]]:
    """How learnable the batches of earlier rounds were when they were trained on, against when they were chosen.

    Args:
        rounds: committed ones.
        batch_losses: by number of the batch, the learner's loss per example when it was trained on it.

    Returns:
        For each round with such batches: how many, and the mean learnability per example of these batches then
        (`realised`) and at the time of the choice (`chosen`, None if selection did not look at the learner).
    """
    found = []
    for manifest in rounds:
        numbers = [n for n in range(manifest.first_batch, manifest.stop_batch) if n in batch_losses]
        if not numbers:
            continue
        places = [n - manifest.first_batch for n in numbers]
        realised = [batch_losses[n] - manifest.reference_loss[i] for n, i in zip(numbers, places, strict=True)]
        chosen = [value for i in places if (value := manifest.learnability[i]) is not None]
        found.append(
            {
                "round": manifest.round,
                "batches": len(numbers),
                "realised": round(float(np.mean(realised)), DIGITS),
                "chosen": round(float(np.mean(chosen)), DIGITS) if chosen else None,
            }
        )
    return found


def selection_of(manifest: Manifest) -> dict[str, Any]:
    """`[selection]` of a round's recipe, with what `auto` decided."""
    section: dict[str, Any] = manifest.lineage["recipe"]["selection"]
    if section["criterion"] != "auto":
        return section
    decided: Decided = "uniform" if section["method"] == "uniform" else manifest.quality["standing"]["decided"]
    return section | as_decided(decided)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The pairs that some rounds chose, by a sketch whose size does not grow with them.

    Contents are uniform hashes, so that the smallest are a random sample of all, and the same one whatever the order in
    which they came (k minimum values: Bar-Yossef, Jayram, Kumar, Sivakumar, Trevisan: Counting distinct elements in a
    data stream, 2002).
    """

    contents: Contents
    """The `SEEN_PAIRS` smallest, or all if they are fewer: ascending, each once."""

    @property
    def limit(self) -> int:
        """All contents below it that were chosen are in the sketch."""
        return int(self.contents[-1]) + 1 if len(self.contents) == SEEN_PAIRS else 2**64

    def with_more(self, contents: Contents) -> "Seen":
        """The sketch after a further round."""
        return Seen(contents=np.union1d(self.contents, contents)[:SEEN_PAIRS])

    def known(self, contents: Contents) -> tuple[int, int]:
        """How many of some contents, each once, the sketch can tell of, and how many of these were chosen before."""
        comparable = contents[contents < np.uint64(self.limit)] if self.limit < 2**64 else contents
        return len(comparable), int(np.isin(comparable, self.contents).sum())


def write_seen(store: Store, steps: str, seen: Seen) -> None:
    """Leave the sketch for the next round."""
    _write(store, _seen_name(steps), {"content": seen.contents})


def read_seen(store: Store, steps: str | None) -> Seen:
    """The inverse of `write_seen`; the sketch of no round at all if there is no folder of steps.

    Raises:
        UserError: the file is gone.
    """
    if steps is None:
        return Seen(contents=np.empty(0, np.uint64))
    return Seen(contents=np.asarray(_read(store, _seen_name(steps))["content"].to_numpy()))


def write_sample(store: Store, steps: str, content: Contents, learnability: npt.NDArray[np.float64]) -> None:
    """Leave the sample's learnability [n] for the next round."""
    _write(store, _sample_name(steps), {"content": content, "learnability": learnability})


def correlate_samples(store: Store, steps: str, parent_steps: str) -> tuple[float | None, int]:
    """Rank correlation of the sample's learnability in two rounds, and the pairs that both of them hold."""
    ours, theirs = _read(store, _sample_name(steps)), _read(store, _sample_name(parent_steps))
    _, here, there = np.intersect1d(ours["content"].to_numpy(), theirs["content"].to_numpy(), return_indices=True)
    values = ours["learnability"].to_numpy()[here], theirs["learnability"].to_numpy()[there]
    return rank_correlation(*values), len(here)


def has_sample(store: Store, steps: str) -> bool:
    """Whether a round looked at its learner, and so left a sample."""
    return store.exists(_sample_name(steps))


def _sample_name(steps: str) -> str:
    return f"{steps}/sample.parquet"


def _seen_name(steps: str) -> str:
    return f"{steps}/seen.parquet"


def _mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    first, last = (pc.rank(pa.array(values), tiebreaker=tie).to_numpy() for tie in ("min", "max"))
    return np.asarray((first + last) / 2)


def _write(store: Store, name: str, columns: dict[str, Any]) -> None:
    write_table(store, name, pa.table({key: np.ascontiguousarray(value) for key, value in columns.items()}))


def _read(store: Store, name: str) -> pa.Table:
    try:
        return read_table(store, name)
    except FileNotFoundError:
        raise UserError(f"{name}: expected what the round left for later ones, found nothing; restore it") from None
