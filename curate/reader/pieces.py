"""Batches are read in pieces of a few hundred rows, and joined: what passes between processes stays small."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from curate.errors import UserError

T = TypeVar("T")

PIECE_ROWS = 256
"""Rows that one process hands over to another at a time, at most: 39 MB of pictures of 224 pixels, 8 bits each."""


def piece_bounds(first: int, stop: int, row_group_rows: int) -> list[tuple[int, int]]:
    """Cut rows of a sub-batch into pieces of whole row groups, so that no row group is read twice.

    >>> piece_bounds(0, 1000, 100)
    [(0, 200), (200, 400), (400, 600), (600, 800), (800, 1000)]
    >>> piece_bounds(250, 500, 100)
    [(250, 400), (400, 500)]
    """
    rows = max(1, PIECE_ROWS // row_group_rows) * row_group_rows
    cuts = [first, *range((first // rows + 1) * rows, stop, rows), stop]
    return [(cuts[i], cuts[i + 1]) for i in range(len(cuts) - 1)]


class Joined:
    """Rows of a batch, filled in piece by piece: each piece can be let go of once it is in.

    Args:
        rows: of the whole.
        pin_memory: hold tensors in pinned memory, from which a GPU copies without blocking.
    """

    def __init__(self, rows: int, *, pin_memory: bool = False) -> None:
        self.rows = rows
        self.pin_memory = pin_memory
        self.filled = 0
        self._whole: Tensor | list[Any] | None = None

    def add(self, piece: Tensor | Sequence[Any]) -> None:
        """Add the rows that follow.

        Raises:
            UserError: their shape is another than that of those before.
        """
        start, self.filled = self.filled, self.filled + len(piece)
        if not isinstance(piece, Tensor):
            self._whole = [*(self._whole or []), *piece]
            return
        if self._whole is None:
            if len(piece) == self.rows and not self.pin_memory:
                self._whole = piece  # nothing to join
                return
            self._whole = torch.empty((self.rows, *piece.shape[1:]), dtype=piece.dtype, pin_memory=self.pin_memory)
        assert isinstance(self._whole, Tensor)
        if piece.shape[1:] != self._whole.shape[1:] or piece.dtype != self._whole.dtype:
            raise UserError(
                f"preprocess, tokenize: expected rows of one shape, found {[*self._whole.shape[1:]]} and "
                f"{[*piece.shape[1:]]}; crop to one size and pad to one length, as open_clip does"
            )
        self._whole[start : self.filled] = piece

    @property
    def whole(self) -> Any:
        """The rows, [rows, ...]."""
        assert self.filled == self.rows, (self.filled, self.rows)
        return self._whole


class Stopped(Exception):  # noqa: N818 not an error
    """Nobody waits for what is being made any more."""


def one_ahead(make: Callable[[Callable[[], None]], Iterator[T]]) -> Generator[T]:
    """What an iterator gives, the next being made by a thread while the last is used.

    Args:
        make: the iterator; it is to call what it is given now and then, which ends it when nobody waits any more.
    """
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise Stopped

    made = make(check)
    with ThreadPoolExecutor(1, thread_name_prefix="one-ahead") as thread:
        try:
            coming = thread.submit(next, made, None)
            while (found := coming.result()) is not None:
                coming = thread.submit(next, made, None)
                yield found
        finally:
            stopped.set()
            del made  # and what it holds, such as processes
