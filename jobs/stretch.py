"""What the trainer trains on next: a stretch of committed batches, found in the root each time anew."""

from bisect import bisect_right
from dataclasses import dataclass

from curate.errors import UserError
from curate.recipe import TrainSection
from curate.rounds.manifest import Manifest, last_round, read_manifest
from curate.rounds.stream import await_round, stream_end
from curate.storage import Store


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Batches to train on without asking again: from number `start` up to `stop`, within one round."""

    first: int
    """First batch of the round."""
    start: int
    stop: int
    repeats: int = 0
    """How many times this round has been trained on before."""


def committed_stretch(store: Store, *, next_batch: int, repeats: int) -> Stretch | None:
    """The rest of the round that `next_batch` lies in, or None if that is not committed yet.

    Raises:
        UserError: the committed rounds end before `next_batch`.
    """
    _, manifest = _round_at(store, next_batch)
    if manifest is None:
        return None
    first = manifest.first_batch
    return Stretch(
        first=first, start=next_batch, stop=manifest.stop_batch, repeats=0 if next_batch == first else repeats
    )


def starved_stretch(store: Store, settings: TrainSection, *, next_batch: int, repeats: int) -> Stretch | None:
    """What to train on where no round holds `next_batch`: None to stop, as the recipe or the end of the stream says.

    Raises:
        UserError: there is no round at all, and the recipe says not to wait.
        StreamStalledError: no round came within `max_wait_s`.
    """
    number, manifest = _round_at(store, next_batch)
    if manifest is not None:  # committed since somebody looked: it is never passed over
        return _whole(manifest)
    if settings.follow == "stop":
        if number == 0:
            raise UserError(f"{store.url}: expected a committed round, found none; run: curate round RECIPE")
        return None
    if settings.follow == "repeat" and number > 0 and repeats < settings.max_repeats and stream_end(store) is None:
        return _whole(_read(store, number - 1), repeats=repeats + 1)
    found = await_round(store, number, timeout_s=settings.max_wait_s)
    return _whole(found[0]) if found else None


def _round_at(store: Store, next_batch: int) -> tuple[int, Manifest | None]:
    """Number of the round that holds a batch, and its manifest; None if it is the one after the newest.

    Raises:
        UserError: the committed rounds end before `next_batch`.
    """
    newest = last_round(store)
    # Rounds are contiguous, so that the one wanted is found by a few reads however many there are.
    number = bisect_right(range(newest + 1), next_batch, key=lambda n: _read(store, n).first_batch) - 1
    manifest = _read(store, number) if number >= 0 else None
    stop = manifest.stop_batch if manifest else 0
    if next_batch > stop:
        raise UserError(
            f"{store.url}: training stands before batch {next_batch}, but the committed rounds hold only {stop}; "
            "restore the rounds, or choose another root"
        )
    return (number, manifest) if next_batch < stop else (number + 1, None)


def _whole(manifest: Manifest, *, repeats: int = 0) -> Stretch:
    first = manifest.first_batch
    return Stretch(first=first, start=first, stop=manifest.stop_batch, repeats=repeats)


def _read(store: Store, number: int) -> Manifest:
    found = read_manifest(store, number)
    if found is None:
        raise UserError(f"{store.url}: round {number} is missing between others; restore its manifest")
    return found[0]
