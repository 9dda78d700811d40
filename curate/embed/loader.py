"""Slices in, pieces out, in any order: by the thread that asks, by others, or by processes of a `DataLoader`.

`pipelines/crops.py` has one way more, by processes on other machines.

Threads are for machines whose few cores the model needs as well: a process of its own would have to import torch, and
would have nobody's core to run on; and where the model has the only core, a thread neither. Beside a GPU one process
decodes on each core, for threads would share one lock.
"""

import contextlib
import multiprocessing
import os
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from curate.embed.decode import DEADLINE_S, Apart, Watched
from curate.embed.pieces import Decode, Failed, Piece, Raw, Reading, Slice
from curate.embed.room import Room, Rooms
from curate.errors import ClusterError, CurateError

T = TypeVar("T")

POLL_S = 0.2
"""Between looks whether there is still something to wait for."""
TRIES = 3
"""Starts of the processes in a row that yield nothing, after which the reason is no row."""
AT_WORK = 2
"""Pieces of each process beside those that wait: the one that is being made, and the one that is being used."""
SHARED_MEMORY = "/dev/shm"


class Loader(Protocol):
    """What is given slices and yields their pieces: of one slice in order, of several as they come."""

    def submit(self, some: Slice) -> None:
        """Ask for the pieces of a slice; from any thread, at any time."""

    def next(self) -> Piece | Failed | None:
        """Wait for a piece, or for the news that a slice failed; None once it is closed. From one thread."""

    def close(self) -> None:
        """End whatever works; from any thread."""


class Asked:
    """What is asked of a `Loader`: slices wait in a queue until it is closed."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._slices: queue.Queue[Slice] = queue.Queue()

    def submit(self, some: Slice) -> None:
        """As `Loader` has it."""
        self._slices.put(some)

    def close(self) -> None:
        """As `Loader` has it."""
        self._closed.set()


class Queued(Asked):
    """A `Loader` between two queues, as far as they make it: what came of the slices waits in the other.

    Args:
        ahead: what may wait of what was found.
    """

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self._found: queue.Queue[Piece | Failed] = queue.Queue(ahead)

    def next(self) -> Piece | Failed | None:
        """As `Loader` has it."""
        return take(self._found, self._closed.is_set)


# --- threads ---------------------------------------------------------------------------------------------------------


class Threads(Queued):
    """Decodes in threads of this process, and reads in one more.

    Args:
        reading: how.
        piece_bytes: of the pixels of a piece, at most.
        threads: that decode.
        ahead: decoded pieces that may wait.
        decode: decodes rows; in this process, watched, if None.
    """

    def __init__(
        self, reading: Reading, *, piece_bytes: int, threads: int = 1, ahead: int = 1, decode: Decode | None = None
    ) -> None:
        super().__init__(ahead)
        self._reading = reading
        self._decode = decode or Watched(reading.crops)
        self._raw = _reading_ahead(reading, self._slices, self._closed.is_set)
        self._rooms = Rooms(threads, -(-ahead // threads) + AT_WORK, piece_bytes, shared=False)
        for number in range(threads):
            threading.Thread(target=self._decode_all, args=(number,), daemon=True, name="embed_decode_all").start()

    def _decode_all(self, number: int) -> None:
        ended = self._closed.is_set
        while (raw := take(self._raw, ended)) is not None and (room := self._rooms.take(number, ended)) is not None:
            put(self._found, _decoded(self._reading, raw, self._decode, self._rooms, room), ended)

    def close(self) -> None:
        """As `Loader` has it."""
        super().close()
        self._rooms.close()


class Inline(Asked):
    """Decodes in the thread that asks for the pieces, and reads in one more: for a model that has a core to itself.

    A thread that decodes would take turns with it there, and each find the cache full of what the other left. Two
    actors on two cores embedded 19 shards of a thousand rows in 16 s with such threads, and 23 so.

    Args:
        reading: how.
        piece_bytes: of the pixels of a piece, at most.
        decode: as `Threads`.
    """

    def __init__(self, reading: Reading, *, piece_bytes: int, decode: Decode | None = None) -> None:
        super().__init__()
        self._reading = reading
        self._decode = decode or Watched(reading.crops)
        self._raw = _reading_ahead(reading, self._slices, self._closed.is_set)
        self._rooms = Rooms(1, 1, piece_bytes, shared=False)

    def next(self) -> Piece | Failed | None:
        """As `Loader` has it; the piece before has been let go."""
        ended = self._closed.is_set
        if (raw := take(self._raw, ended)) is None or (room := self._rooms.take(0, ended)) is None:
            return None
        return _decoded(self._reading, raw, self._decode, self._rooms, room)

    def close(self) -> None:
        """As `Loader` has it."""
        super().close()
        self._rooms.close()


def _reading_ahead(reading: Reading, slices: Any, ended: Callable[[], bool]) -> "queue.Queue[Raw | Failed]":
    """The queue into which a thread reads the pieces of slices, one ahead, until it is `ended`."""
    found: queue.Queue[Raw | Failed] = queue.Queue(1)
    arguments = reading, slices, found, ended
    threading.Thread(target=_read_ahead, args=arguments, daemon=True, name="embed_read_ahead").start()
    return found


def _read_ahead(reading: Reading, slices: Any, found: "queue.Queue[Raw | Failed]", ended: Callable[[], bool]) -> None:
    """Read slices from one queue into pieces for the other, until it is `ended`."""
    while (some := take(slices, ended)) is not None:
        try:
            for raw in reading.raw(some):
                if not put(found, raw, ended):
                    return
        except Exception as error:  # whoever asked decides what it means
            put(found, Failed(job=some.job, error=error), ended)


def _decoded(reading: Reading, raw: Raw | Failed, decode: Decode, rooms: Rooms, room: Room) -> Piece | Failed:
    """A piece in a room, which is given back if nothing comes of the piece."""
    if not isinstance(raw, Failed):
        try:
            return reading.piece(raw, decode, room)
        except Exception as error:  # likewise
            raw = Failed(job=raw.slice.job, error=error)
    rooms.give_back(room)
    return raw


def take(source: "queue.Queue[T]", ended: Callable[[], bool]) -> T | None:
    """Wait for what comes next out of a queue; None once it is `ended`."""
    while not ended():
        with contextlib.suppress(queue.Empty):
            return source.get(timeout=POLL_S)
    return None


def put(target: "queue.Queue[T]", item: T, ended: Callable[[], bool]) -> bool:
    """Wait for room in a queue; whether there was some before it `ended`."""
    while not ended():
        with contextlib.suppress(queue.Full):
            target.put(item, timeout=POLL_S)
            return True
    return False


# --- processes -------------------------------------------------------------------------------------------------------


def start_server(preload: Sequence[str] = ()) -> None:
    """Start the process that decoding ones will be forked from; it imports meanwhile what they all need.

    It holds no thread and no device: a fork of this process, with both, would be unsound.

    Args:
        preload: more modules that they would import.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["curate.embed.loader", "curate.models.encoder", *preload]
    )
    forkserver.ensure_running()


def processes_that_fit(wanted: int, piece_bytes: int, *, ahead: int) -> int:
    """Of so many processes those whose pieces have room in the shared memory that is free; a container may have 64 MB.

    Args:
        wanted: processes.
        piece_bytes: of the pixels of one piece.
        ahead: pieces of each process that wait.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 2**40
    return max(0, min(wanted, int(0.8 * free) // (piece_bytes * (ahead + AT_WORK))))


class Processes:
    """Decodes in processes that live as long as this; one that dies costs the row that it died of.

    Args:
        reading: how.
        processes: that read, decode and tokenise.
        piece_bytes: of the pixels of a piece, at most.
        ahead: finished pieces of each process that may wait.
        pin: whether the pieces' tensors are moved to pinned memory, for a GPU.
        preload: as `start_server`.
        deadline_s: for one row.
    """

    def __init__(
        self,
        reading: Reading,
        *,
        processes: int,
        piece_bytes: int,
        ahead: int = 2,
        pin: bool = False,
        preload: Sequence[str] = (),
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._reading = reading
        self._how: dict[str, Any] = {"num_workers": processes, "prefetch_factor": ahead, "pin_memory": pin}
        self._piece_bytes = piece_bytes
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._closed = False
        self._asked: dict[int, list[Slice]] = {}
        """By job: what is wanted yet."""
        self._ready: deque[Piece | Failed] = deque()
        """Found by this process itself."""
        self._fruitless = 0
        start_server(preload)
        self._start()

    def submit(self, some: Slice) -> None:
        """As `Loader` has it."""
        with self._lock:
            self._asked.setdefault(some.job, []).append(some)
            self._slices.put(some)

    def next(self) -> Piece | Failed | None:
        """As `Loader` has it.

        Raises:
            ClusterError: the processes end again and again, whatever they decode.
        """
        while not self._closed:
            if self._ready:
                return self._ready.popleft()
            try:
                found = next(self._found)
            except StopIteration:
                break
            except (RuntimeError, OSError, EOFError) as error:  # a worker died, or what it had sent died with it
                if not self._closed:
                    self._recover(error)
                continue
            self._fruitless = 0
            self._note(found)
            return found
        self._rooms.close()
        return None

    def close(self) -> None:
        """As `Loader` has it."""
        self._closed = True
        self._stream.end()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._slices = context.Queue()
        processes = int(self._how["num_workers"])
        self._rooms = Rooms(processes, int(self._how["prefetch_factor"]) + AT_WORK, self._piece_bytes)
        self._stream = _Stream(self._reading, self._slices, self._rooms, processes, self._deadline_s)
        self._found: Iterator[Piece | Failed] = iter(
            DataLoader(
                self._stream,
                batch_size=None,
                collate_fn=_same,
                multiprocessing_context=context,
                in_order=False,
                **self._how,
            )
        )

    def _note(self, found: Piece | Failed) -> None:
        """Remember that a piece need not be asked for again."""
        with self._lock:
            asked = self._asked.get(found.job, [])
            if isinstance(found, Failed):
                self._asked.pop(found.job, None)
                return
            left = [part for some in asked for part in _without(some, {found.number})]
            self._asked[found.job] = left
            if not left:
                del self._asked[found.job]

    def _recover(self, error: Exception) -> None:
        """Start other processes; the pieces that the old ones were at are decoded here, by a child that may die."""
        self._fruitless += 1
        if self._fruitless > TRIES:
            raise ClusterError(
                f"embed: decoding processes ended {TRIES} times before they had decoded anything ({error}); most "
                f"often it is memory, or {SHARED_MEMORY} of a container: lower resources.loaders or embed.batch_size, "
                "and run the same command again: what is done stays"
            ) from None
        suspects = self._stream.at_work()
        self._stream.end()
        del self._found  # which waits for those that are alive, and ends them
        self._rooms.close()
        apart = Apart(self._reading.crops, deadline_s=self._deadline_s, method="forkserver")
        for job, number in suspects:
            for some in self._asked.get(job, []):
                if number in some.numbers:
                    found: Piece | Failed
                    try:
                        for raw in self._reading.raw(some.part(number, number + 1)):
                            found = self._reading.piece(raw, apart)
                    except CurateError as failure:
                        found = Failed(job=job, error=failure)
                    self._ready.append(found)
                    break
        apart.close()
        for found in self._ready:
            self._note(found)
        with self._lock:
            self._start()
            for some in [some for asked in self._asked.values() for some in asked]:
                self._slices.put(some)


def _without(some: Slice, numbers: set[int]) -> list[Slice]:
    """What is left of a slice without some of its pieces."""
    for number in numbers & set(some.numbers):
        parts = [some.part(some.numbers.start, number), some.part(number + 1, some.numbers.stop)]
        return [part for part in parts if part.start < part.stop]
    return [some]


def _same(item: T) -> T:
    return item


class _Stream(IterableDataset[Piece | Failed]):
    """What a worker process iterates over: it takes slices from the queue of all of them until it is told to end."""

    def __init__(self, reading: Reading, slices: Any, rooms: Rooms, processes: int, deadline_s: float) -> None:
        self._reading = reading
        self._slices = slices
        self._rooms = rooms
        self._deadline_s = deadline_s
        # Read by others while they are written, each by one: a word of memory needs no lock.
        self._marks: Tensor = torch.full((processes, 2), -1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        """[w, 2] job and piece that each worker is decoding; -1 if none."""
        self._ended: Tensor = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def at_work(self) -> list[tuple[int, int]]:
        """Jobs and pieces that were being decoded."""
        return sorted((job, number) for job, number in self._marks.tolist() if job >= 0)

    def end(self) -> None:
        """Tell the workers."""
        self._ended[0] = 1

    def __iter__(self) -> Iterator[Piece | Failed]:
        info = get_worker_info()
        assert info is not None
        mark, parent = self._marks[info.id], os.getppid()

        def ended() -> bool:
            return bool(self._ended[0]) or os.getppid() != parent

        raws = _reading_ahead(self._reading, self._slices, ended)
        decode = Watched(self._reading.crops, deadline_s=self._deadline_s)
        while (raw := take(raws, ended)) is not None:
            if isinstance(raw, Failed):
                yield raw
            elif (room := self._rooms.take(info.id, ended)) is not None:
                mark[1], mark[0] = raw.number, raw.slice.job
                found = _decoded(self._reading, raw, decode, self._rooms, room)
                mark[0] = -1
                yield found
