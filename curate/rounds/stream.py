"""The stream of rounds: wait for the next one, and know an end when there is one.

Followers ask for a round by its name and never list. `rounds/end.json`, published once, says that no more will come:
without it a reader could not tell a finished curation from one that is slow.
"""

import time

from curate.errors import StreamStalledError, UserError
from curate.rounds.manifest import Manifest, last_round, read_manifest
from curate.sealed import seal, unseal
from curate.storage import Store

END_NAME = "rounds/end.json"
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0


def end_stream(store: Store) -> int:
    """Say that no round will follow those that are committed; returns their number. Doing it twice changes nothing.

    Raises:
        CommitConflictError: somebody else ended the stream after another round.
    """
    rounds = last_round(store) + 1
    store.put_if_absent(END_NAME, seal({"rounds": rounds}))
    return rounds


def stream_end(store: Store) -> int | None:
    """How many rounds there are in all, or None while more may come.

    Raises:
        UserError: the record is not one.
    """
    try:
        data = store.read_bytes(END_NAME)
    except FileNotFoundError:
        return None
    try:
        return int(unseal(data, END_NAME)["rounds"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{END_NAME}: expected {{"rounds": N}}, found something else; restore or delete it') from error


def await_round(store: Store, number: int, *, timeout_s: float | None = None) -> tuple[Manifest, str] | None:
    """A round's manifest and its sha256 as soon as it is committed; None if the stream ends before it.

    Args:
        store: the root.
        number: of the round.
        timeout_s: how long to wait; for ever if None.

    Raises:
        StreamStalledError: neither round nor end came in time.
    """
    wait = FIRST_WAIT_S
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while (found := read_manifest(store, number)) is None:
        end = stream_end(store)
        if end is not None and end <= number:
            return None
        left = LONGEST_WAIT_S if until is None else until - time.monotonic()
        if left <= 0:
            raise StreamStalledError(
                f"{store.url}: round {number} did not come within {timeout_s:g} s and the stream was not ended; see "
                "to the curation, or wait longer"
            )
        time.sleep(min(wait, left))
        wait = min(2 * wait, LONGEST_WAIT_S)
    return found
