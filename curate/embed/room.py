"""Memory that those who decode and those whom they decode for share, taken and given back piece by piece.

Fresh pages cost more than what is written to them: a process took 10 to 110 ms to fill 38 MB of new shared memory for
the first time, 1.2 ms for the second, and to give it back held the other's lock for 8 ms.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

POLL_S = 0.001


class Rooms:
    """Places for pieces: so many of each process or thread that decodes.

    Args:
        workers: processes, or threads of this one, that take them.
        each: places of each.
        room_bytes: of a place.
        shared: with other processes.
    """

    ours: ClassVar[dict[int, "Rooms"]] = {}
    """Those that this process made, by key."""
    _keys = itertools.count()

    def __init__(self, workers: int, each: int, room_bytes: int, *, shared: bool = True) -> None:
        self.key = next(self._keys)
        shape = workers, each, room_bytes
        self._memory = shared_memory(shape) if shared else torch.empty(shape, dtype=torch.uint8)
        self._taken: Tensor = torch.zeros((workers, each), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        """Each is set by its worker, and cleared by whoever made it: a word of memory needs no lock."""
        self.ours[self.key] = self

    def take(self, worker: int, ended: Callable[[], bool]) -> "Room | None":
        """Wait for a free place of a worker, which calls this; None once it is `ended`."""
        while not ended():
            for number, taken in enumerate(self._taken[worker].tolist()):
                if not taken:
                    self._taken[worker, number] = 1
                    return Room(self.key, worker, number, self._memory[worker, number])
            time.sleep(POLL_S)
        return None

    def give_back(self, room: "Room") -> None:
        """What lies in a place is no longer needed."""
        self._taken[room.worker, room.number] = 0

    def at(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        """What lies at an offset of the memory of all places."""
        return self._memory.view(-1)[offset : offset + int(np.prod(shape))].view(shape)

    def close(self) -> None:
        """Forget the places; what still lies in them stays as long as somebody holds it."""
        self.ours.pop(self.key, None)


@dataclass(frozen=True)
class Room:
    """A place that was taken, and how much of it is used."""

    key: int
    worker: int
    number: int
    memory: Tensor | None = None
    """uint8 [bytes]; in the process that took it."""

    def give_back(self) -> None:
        """As `Rooms.give_back`, in the process that made them."""
        if (rooms := Rooms.ours.get(self.key)) is not None:
            rooms.give_back(self)

    def __getstate__(self) -> dict[str, Any]:
        """On its way to the process that made it, which has the memory."""
        return self.__dict__ | {"memory": None}


def offsets_of(pixels: Mapping[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where some tensors lie in the memory of all places."""
    return {view: (int(tensor.storage_offset()), tuple(tensor.shape)) for view, tensor in pixels.items()}


def shared_memory(shape: tuple[int, ...]) -> Tensor:
    """A uint8 tensor that other processes see; its pages come when they are written to."""
    # As `default_collate` does in a worker.
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
