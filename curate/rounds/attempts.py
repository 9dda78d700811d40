"""Attempts: what is particular to one try at a round, beside its manifest: when, where, how long each step took.

rounds/r000007/attempt-<id>.json    written before the commit, by each attempt that came so far
"""

import contextlib
import datetime
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from curate.rounds.manifest import round_folder
from curate.sealed import seal, unseal
from curate.storage import Store

DIGITS = 3


class Stopwatch:
    """Seconds of each step of an attempt. Steps of different windows run beside each other: a sum may exceed the time.

    Safe to use from threads.
    """

    def __init__(self) -> None:
        self._began = datetime.datetime.now(datetime.UTC)
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add what is done within to a step."""
        start = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - start
            with self._lock:
                self._seconds[step] = self._seconds.get(step, 0.0) + took

    def to_json(self) -> dict[str, Any]:
        """When the attempt began, how long it took so far, and its steps in the order in which they first ended."""
        return {
            "began": self._began.isoformat(timespec="seconds"),
            "wall_s": round(time.monotonic() - self._start, DIGITS),
            "steps": [{"step": step, "seconds": round(took, DIGITS)} for step, took in self._seconds.items()],
        }


def write_attempt(store: Store, number: int, watch: Stopwatch, **resources: float | None) -> None:
    """Leave what an attempt at a round took, and what it had for it."""
    record = watch.to_json() | {"host": socket.gethostname()} | resources
    store.put_bytes(f"{round_folder(number)}/attempt-{uuid.uuid4().hex[:8]}.json", seal(record))


def read_attempts(store: Store, number: int) -> list[dict[str, Any]]:
    """Of a round, the oldest first; as a rule one, none of a round of before they were written."""
    names = [name for name in store.list(round_folder(number)) if "/attempt-" in name]
    return sorted((unseal(store.read_bytes(name), name) for name in names), key=lambda record: str(record["began"]))
