"""Decoding on other nodes: actors without a device read, decode and crop as a loader's processes do, and ship pixels.

The actor of a device asks them slice by slice. What they make comes back as streams of Ray's, through its object store,
and waits there where the device is slower; docs/performance.md says when that pays. A row that kills or holds up an
actor is met again by the one that Ray starts in its place, which decodes in a child that may die.
"""

import threading
from collections.abc import Iterator

import ray
import torch

from curate.embed.decode import Apart, Watched
from curate.embed.loader import Queued, put, take
from curate.embed.pieces import Failed, Piece, Reading, Slice
from curate.pipelines.cluster import CPU_SHARE, RETRIES, restarted

AHEAD = 2
"""Finished pieces of each actor that wait in the object store."""
TRIES, WAIT_S = 24, 5.0
"""Failures of an actor in a row, and the pause after each: a node that is lost is missed, and replaced, in minutes."""


class Cropper:
    """The actor: as many of them decode as the recipe says."""

    def __init__(self, reading: Reading) -> None:
        torch.set_num_threads(1)
        self._reading = reading
        self._decode = Apart(reading.crops) if restarted() else Watched(reading.crops)

    def pieces(self, some: Slice) -> Iterator[Piece | Failed]:
        """The pieces of a slice, in order, and what went wrong, if anything did."""
        try:
            for raw in self._reading.raw(some):
                yield self._reading.piece(raw, self._decode)
        except Exception as error:  # whoever asked decides what it means
            yield Failed(job=some.job, error=error)


class Croppers(Queued):
    """A `Loader` whose pieces such actors make; they end with the process that started them.

    Args:
        reading: how.
        actors: how many, spread over the cluster's nodes; whoever calls sees to it that there is room.
        pin: whether the pieces' tensors are moved to pinned memory, for a GPU.
    """

    def __init__(self, reading: Reading, actors: int, *, pin: bool) -> None:
        super().__init__(actors)
        self._pin = pin
        start = ray.remote(Cropper).options(num_cpus=CPU_SHARE, scheduling_strategy="SPREAD", **RETRIES).remote
        # Held, for an actor that is started again is told again.
        self._reading = ray.put(reading)
        self._actors = [start(self._reading) for _ in range(actors)]
        self._threads = [
            threading.Thread(target=self._drive, args=(actor,), daemon=True, name="embed_crops")
            for actor in self._actors
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """As `Loader` has it."""
        super().close()
        for actor in self._actors:
            ray.kill(actor)
        for thread in self._threads:
            thread.join(WAIT_S)  # Ray may be shut down next, and what a thread asks of it then is an error

    def _drive(self, actor: "ray.actor.ActorHandle[Cropper]") -> None:
        """Give slices to an actor, one by one, and take what comes; what does not come is anybody's to make."""
        streamed = actor.pieces.options(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
        failures = 0
        while (some := take(self._slices, self._closed.is_set)) is not None:
            try:
                for ref in streamed.remote(some):
                    found = ray.get(ref)
                    del ref  # or it would keep its place in the object store until the next one is there
                    failures = 0
                    if isinstance(found, Piece):
                        some = some.part(found.number + 1, some.numbers.stop)
                        found = found.pin_memory() if self._pin else found
                    if not put(self._found, found, self._closed.is_set):
                        return
            except ray.exceptions.RayError as error:  # its node is gone, or not to be reached
                failures += 1
                if failures > TRIES:
                    put(self._found, Failed(job=some.job, error=error), self._closed.is_set)
                elif some.start < some.stop:
                    self._slices.put(some)
                    self._closed.wait(WAIT_S)
