"""Decode rows of a shard: in this process, watched; or, after a row killed it, in one that may be killed as well.

Hostile bytes may crash a decoder or keep it busy for ever, which no `except` prevents. Whoever decodes in its own
process is killed by the first kind, and by `watch` in the second; then it takes `Apart`, whose child does the decoding,
so that the row is known by where the child stopped.
"""

import contextlib
import faulthandler
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curate.errors import ClusterError
from curate.models.crop import decode_for
from curate.pool.images import Dropped, clean_caption

WORKER_CRASH = "worker_crash"
DECODE_TIMEOUT = "decode_timeout"
DEADLINE_S = 30.0
"""For one row: the largest picture that is accepted takes a few seconds on a slow CPU."""
SLACK = 0.1
"""Of the deadline: so much later a process may be ended."""
START_S = 120.0
"""For a child to start and import what it needs, on a machine that is busy."""

Crop = Callable[[Any], npt.NDArray[np.uint8]]
"""Of a picture as `decode_for` decodes it: `curate.models.crop.Crop`, or any function of Pillow's pictures."""
Row = tuple[bytes | None, bytes | None]
"""Image and caption."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What became of a row."""

    status: str
    error: str | None = None
    pixels: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """What each kind of encoder sees, [H, W, 3], by `Encoder.view`."""
    caption: str = ""
    size: tuple[int, int] | None = None
    """Width and height, pixels, of a picture that was decoded."""


def decode_row(row: Row, crops: Mapping[str, Crop]) -> Decoded:
    """Decode one row for each kind of encoder."""
    image, raw = row
    try:
        # The caption first: it costs nothing, and a row without one needs no decoding.
        caption = clean_caption(raw)
        picture = decode_for(image, crops.values())
    except Dropped as dropped:
        return Decoded(status=dropped.reason, error=dropped.error)
    pixels = {view: crop(picture) for view, crop in crops.items()}
    size = (picture.shape[1], picture.shape[0]) if isinstance(picture, np.ndarray) else picture.size
    return Decoded(status="ok", pixels=pixels, caption=caption, size=size)


class Watched:
    """Decodes in this process, in as many threads as call it, and ends the process when a row hangs.

    Python cannot interrupt a decoder that hangs; the C thread of `faulthandler` can end the process whatever it does.
    To set its clock anew starts a thread, 30 µs or more, and to stop it joins one: so neither is done for each row, but
    the clock is set where it would otherwise run out before a row that begins now has had its time, and stopped where
    no rows follow.
    """

    def __init__(self, crops: Mapping[str, Crop], *, deadline_s: float = DEADLINE_S) -> None:
        self._crops = crops
        self._deadline_s = deadline_s
        self._busy = 0
        self._set_at = -math.inf
        self._lock = threading.Lock()

    def __call__(self, rows: Sequence[Row]) -> Iterator[Decoded]:
        """Decode rows, in order, each when it is asked for; whoever asks for one soon asks for the next."""
        self._step(1)
        try:
            for row in rows:
                self._step(0)
                yield decode_row(row, self._crops)
        finally:
            self._step(-1)

    def _step(self, change: int) -> None:
        """Rows begin or end: from now on some row has to end within the deadline, unless none is under way."""
        now = time.monotonic()
        with self._lock:
            self._busy += change
            if not self._busy:
                faulthandler.cancel_dump_traceback_later()
                self._set_at = -math.inf
            elif now - self._set_at > SLACK * self._deadline_s:
                faulthandler.dump_traceback_later((1 + SLACK) * self._deadline_s, exit=True, file=_nowhere())
                self._set_at = now


@functools.cache
def _nowhere() -> int:
    """Where a trace goes that nobody is to read; open as long as this process."""
    return os.open(os.devnull, os.O_WRONLY)


class Apart:
    """Decodes in a child process, one row after the other: a row that kills or holds it up costs the child alone.

    Args:
        crops: as `decode_row`.
        deadline_s: for one row.
        method: how the child starts. Not by a fork: of a process with threads, and with CUDA, none is sound.
    """

    def __init__(
        self,
        crops: Mapping[str, Crop],
        *,
        deadline_s: float = DEADLINE_S,
        method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        self._crops = crops
        self._deadline_s = deadline_s
        self._method = method
        self._lock = threading.Lock()
        self._child: tuple[BaseProcess, Connection] | None = None

    def __call__(self, rows: Sequence[Row]) -> list[Decoded]:
        """Decode rows, in order; those that kill the child or hold it up have the status that says so."""
        found: list[Decoded] = []
        with self._lock:
            while len(found) < len(rows):
                found += self._rest(rows[len(found) :])
        return found

    def _rest(self, rows: Sequence[Row]) -> list[Decoded]:
        """Rows up to the last one, or to the first that the child does not survive."""
        process, pipe = self._child = self._child or self._start()
        found: list[Decoded] = []
        try:
            pipe.send(rows)
            for _ in rows:
                if not pipe.poll(self._deadline_s):
                    self.close()
                    error = f"a decoder was still at it after {self._deadline_s:g} s"
                    return [*found, Decoded(status=DECODE_TIMEOUT, error=error)]
                found.append(pipe.recv())
        except (EOFError, OSError):
            process.join()
            error = f"a decoder ended with exit status {process.exitcode}"
            self.close()
            return [*found, Decoded(status=WORKER_CRASH, error=error)]
        return found

    def _start(self) -> tuple[BaseProcess, Connection]:
        context: Any = multiprocessing.get_context(self._method)
        ours, theirs = context.Pipe()
        process = context.Process(target=_decode_for, args=(theirs, self._crops), daemon=True)
        process.start()
        theirs.close()
        if not ours.poll(START_S):
            process.kill()
            raise ClusterError(
                f"a decoding process did not start within {START_S:g} s on a machine that is busy; lower "
                "resources.workers or resources.threads, and run the same command again: what is done stays"
            )
        ours.recv()
        return process, ours

    def close(self) -> None:
        """End the child; another one is started when it is needed."""
        if self._child is not None:
            process, pipe = self._child
            self._child = None
            process.kill()
            process.join()
            pipe.close()


def _decode_for(pipe: Connection, crops: Mapping[str, Crop]) -> None:
    """The child: answers each row of what it is sent, until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for whoever started it, and no fault of the row
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            for row in pipe.recv():
                pipe.send(decode_row(row, crops))
