"""Slices of shards → pieces: pixels, tokens and the rest of a batch's rows. All that needs no model is done here.

A shard's wanted rows are cut at fixed places, every `piece_rows` of them, so that batches, and with them the last bits
of embeddings, are the same whoever does the work. Consecutive pieces are read as one slice, so that a row group is read
by few: whoever begins in the middle of one reads it from its start.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from curate.embed.decode import Crop, Decoded, Row
from curate.embed.files import CONTENT_BYTES, pair_hashes, uid_texts, uids_of
from curate.embed.room import Room, Rooms, offsets_of
from curate.pool.columns import Columns
from curate.pool.derived import IMAGE_MISSING, missing
from curate.pool.img2dataset import DOWNLOAD_FAILED, OUTCOME_COLUMNS, download_errors
from curate.pool.shards import Shard, caption_bytes, image_bytes, read_rows, read_some
from curate.pool.wanted import FILTERED, load_kept, wanted_rows

Decode = Callable[[Sequence[Row]], Iterable[Decoded]]
Tokenize = Callable[[Sequence[str]], Tensor]
Rows = npt.NDArray[np.int64]

FILTER_ROWS = 8192
"""Rows that `pool.where` is asked about at a time."""
SPLITS = 4
"""Slices of one row group at most, each of which reads it from its start: on average 2.5 times, if it is large."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Consecutive pieces of a shard, for one worker."""

    job: int
    """Whose shard it is, for whoever asked."""
    shard: Shard
    start: int
    """Of the shard's wanted rows; a multiple of `piece_rows`."""
    stop: int
    rows: Rows | None
    """Numbers of the wanted rows from `start` to `stop`; all rows are wanted if None."""
    piece_rows: int
    encoders: tuple[str, ...]
    """For whom, as `Reading` knows them."""

    @property
    def numbers(self) -> range:
        """Of its pieces, within the shard."""
        return range(self.start // self.piece_rows, -(-self.stop // self.piece_rows))

    def part(self, first: int, stop: int) -> "Slice":
        """The pieces with these numbers, the last not included."""
        start, end = max(self.start, first * self.piece_rows), min(self.stop, stop * self.piece_rows)
        rows = None if self.rows is None else self.rows[start - self.start : end - self.start]
        return replace(self, start=start, stop=end, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One batch on its way to the encoders."""

    job: int
    number: int
    """Within the shard: its rows are the wanted ones from `number * piece_rows` on."""
    rows: Tensor
    """uint8: a record batch as a stream of Arrow's, of the embedding file's columns but the vectors, and `row`."""
    ok: int
    """n, rows whose status is ok: what follows is theirs."""
    pixels: Mapping[str, Tensor]
    """uint8 [n, H, W, 3] by `Encoder.view`."""
    texts: Mapping[str, Tensor]
    """int64 [u, L] by `Encoder.wording`: each caption once."""
    of: Tensor
    """int64 [n], which of the texts each row has."""
    room: Room | None = None
    """Where the pixels lie, if it is shared; to be given back."""

    def __getstate__(self) -> dict[str, Any]:
        """On its way to another process: no tensors, each of which takes a connection; pixels stay in their room."""
        arrays = {name: tensor.numpy() for name, tensor in (("rows", self.rows), ("of", self.of))}
        texts = {wording: texts.numpy() for wording, texts in self.texts.items()}
        pixels: dict[str, Any] = (
            {view: pixels.numpy() for view, pixels in self.pixels.items()}
            if self.room is None
            else offsets_of(self.pixels)
        )
        return self.__dict__ | arrays | {"texts": texts, "pixels": pixels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["room"] is None:
            pixels = {view: _writable(pixels) for view, pixels in state["pixels"].items()}
        else:
            rooms = Rooms.ours[state["room"].key]
            pixels = {view: rooms.at(*where) for view, where in state["pixels"].items()}
        texts = {wording: _writable(texts) for wording, texts in state["texts"].items()}
        arrays = {name: _writable(state[name]) for name in ("rows", "of")}
        self.__dict__.update(state | arrays, texts=texts, pixels=pixels)

    def table(self) -> pa.Table:
        """The rows; a view of `rows`."""
        return pa.ipc.open_stream(pa.py_buffer(self.rows.numpy())).read_all()

    def pin_memory(self) -> "Piece":
        """What `DataLoader(pin_memory=True)` calls; gives the room back."""
        pinned = replace(
            self,
            room=None,
            pixels={view: pixels.pin_memory() for view, pixels in self.pixels.items()},
            texts={wording: texts.pin_memory() for wording, texts in self.texts.items()},
            of=self.of.pin_memory(),
        )
        self.let_go()
        return pinned

    def let_go(self) -> None:
        """Give the room back: the pixels are no longer needed."""
        if self.room is not None:
            self.room.give_back()


def _writable(array: npt.NDArray[Any]) -> Tensor:
    """An array as a tensor, copied out of memory that is not ours to write to, as that of Ray's object store."""
    return torch.from_numpy(np.require(array, requirements="W"))


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A slice that could not be read to its end."""

    job: int
    error: Exception


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The rows of one piece as the shard has them."""

    slice: Slice
    number: int
    rows: Rows
    batch: pa.RecordBatch
    """Of those of the rows that the recipe wants of the pool."""
    filtered: Mapping[int, str | None] = field(default_factory=dict)
    """Uids of the others, by place."""


def columns_read(shard: Shard) -> list[str]:
    """Names of the columns that embedding a shard reads, where it has them."""
    columns = shard.columns
    named = [name for name in (columns.paths, columns.uid) if name]
    return list(dict.fromkeys([columns.image, columns.caption, *named, *OUTCOME_COLUMNS]))


def cut_slices(groups: Sequence[int], rows: Rows | None, *, piece_rows: int, slice_rows: int) -> list[tuple[int, int]]:
    """Where the slices of a shard's wanted rows begin and end.

    Each has `slice_rows` at least, if there are so many, and a row group is cut in no more than `SPLITS`.

    >>> cut_slices([100] * 10, None, piece_rows=64, slice_rows=250)
    [(0, 256), (256, 512), (512, 768), (768, 1000)]
    >>> cut_slices([10_000], None, piece_rows=256, slice_rows=1024)
    [(0, 2560), (2560, 5120), (5120, 7680), (7680, 10000)]

    Args:
        groups: rows of each row group.
        rows: numbers of the wanted ones, ascending; all if None.
        piece_rows: the slices' starts are multiples of it.
        slice_rows: that are worth opening a file for.
    """
    ends = np.cumsum([0, *groups])
    # Of the wanted rows, where those of each row group begin.
    begins = ends if rows is None else np.searchsorted(rows, ends)
    wanted = int(begins[-1])
    cuts = [0]
    for start in range(piece_rows, wanted, piece_rows):
        group = int(np.searchsorted(begins, cuts[-1], side="right")) - 1
        here = int(begins[group + 1] - begins[group])
        if start - cuts[-1] >= max(slice_rows, here / SPLITS):
            cuts.append(start)
    return list(pairwise([*cuts, wanted])) if wanted else []


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read for some encoders; goes to other processes, where their models need not."""

    views: Mapping[str, str]
    """By encoder; which of the crops it sees."""
    crops: Mapping[str, Crop]
    wordings: Mapping[str, str]
    """By encoder; which of the tokenizers it reads by."""
    tokenizers: Mapping[str, Tokenize]
    _one: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """The tokenizers of transformers fail if two threads ask them at a time."""

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_one"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _one=threading.Lock())

    def raw(self, some: Slice) -> Iterator[Raw]:
        """Read the pieces of a slice, in order, and no further.

        Raises:
            InputChangedError, ShardDamagedError, UserError, StoreError: as `read_some`.
        """
        wanted = np.arange(some.start, some.stop) if some.rows is None else some.rows
        # Whoever asks for some rows knows them for wanted ones.
        filtered = _filtered(some.shard, wanted) if some.rows is None else {}
        passed = np.array([row for row in wanted.tolist() if row not in filtered], np.int64) if filtered else wanted
        batches = read_some(some.shard, passed, columns_read(some.shard), batch_rows=some.piece_rows)
        held: deque[pa.RecordBatch] = deque()
        none: pa.RecordBatch | None = None
        for number in some.numbers:
            at = number * some.piece_rows - some.start
            rows = wanted[at : at + some.piece_rows]
            out = {place: filtered[row] for place, row in enumerate(rows.tolist()) if row in filtered}
            taken: list[pa.RecordBatch] = []
            missing_rows = len(rows) - len(out)
            while missing_rows:
                first = held.popleft() if held else next(batches)[1]
                taken.append(first.slice(0, missing_rows))
                if first.num_rows > missing_rows:
                    held.appendleft(first.slice(missing_rows))
                missing_rows -= taken[-1].num_rows
            if not taken:
                none = none or _none_of(some.shard)
            batch = pa.concat_batches(taken) if taken else none
            yield Raw(slice=some, number=number, rows=rows, batch=batch, filtered=out)

    def piece(self, raw: Raw, decode: Decode, room: Room | None = None) -> Piece:
        """Hash, decode, crop and tokenise the rows of a piece; the pixels are put into `room`, if there is one."""
        some, batch, columns = raw.slice, raw.batch, raw.slice.shard.columns
        images = image_bytes(batch.column(columns.image)).to_pylist()
        captions = caption_bytes(batch.column(columns.caption)).to_pylist()
        hashes = [pair_hashes(image, caption) for image, caption in zip(images, captions, strict=True)]
        uids = uids_of(batch, columns, (content for _, content in hashes))
        views = list(dict.fromkeys(self.views[encoder] for encoder in some.encoders))
        pixels = _Pixels(len(images), room)
        decoded = before_decoding(batch, columns, images, uids)
        there = [place for place, one in enumerate(decoded) if one.status == "ok"]
        found = decode([(images[place], captions[place]) for place in there])
        for place, one in zip(there, found, strict=True):
            pixels.add({view: one.pixels[view] for view in views if one.status == "ok"})
            decoded[place] = Decoded(status=one.status, error=one.error, caption=one.caption, size=one.size)
        usable = [one.caption for one in decoded if one.status == "ok"]
        captioned: dict[str, int] = {}
        of = [captioned.setdefault(caption, len(captioned)) for caption in usable]
        with self._one:
            wordings = {self.wordings[encoder] for encoder in some.encoders} if usable else set[str]()
            texts = {wording: self.tokenizers[wording](list(captioned)) for wording in sorted(wordings)}
        return Piece(
            job=some.job,
            number=raw.number,
            rows=_packed(_rows(raw.rows, *_with_filtered(raw.filtered, uids, hashes, decoded))),
            ok=len(usable),
            pixels=pixels.found(),
            texts=texts,
            of=torch.tensor(of, dtype=torch.int64),
            room=room,
        )


def _filtered(shard: Shard, rows: Rows) -> dict[int, str | None]:
    """Of some rows of a shard those that the recipe does not want, with their uids; their pictures are not read."""
    columns = shard.columns
    # Without a column of uids they are hashes of contents, which `piece` asks about once they are read.
    if columns.where is None and (columns.keep is None or columns.uid is None):
        return {}
    names = list(dict.fromkeys([*columns.where_columns, *([columns.uid] if columns.uid else [])]))
    found: dict[int, str | None] = {}
    for numbers, batch in read_some(shard, rows, names, batch_rows=FILTER_ROWS):
        uids = uid_texts(batch.column(columns.uid)) if columns.uid else [f"{shard.name}#{row}" for row in numbers]
        mask = wanted_rows(columns, batch, uids if columns.uid else None)
        found |= {int(numbers[place]): uids[place] for place in np.flatnonzero(~mask)}
    return found


def _none_of(shard: Shard) -> pa.RecordBatch:
    """No rows of a shard, with their columns."""
    return pa.RecordBatch.from_pylist([], read_rows(shard, [], columns_read(shard)).schema)


def before_decoding(
    batch: pa.RecordBatch, columns: Columns, images: Sequence[bytes | None], uids: Sequence[str | None]
) -> list[Decoded]:
    """What becomes of rows before any is decoded: `ok` if nothing speaks against it."""
    downloads, files = download_errors(batch, images), missing(batch, columns, images)
    decoded = [Decoded(status="ok")] * len(images)
    for place, (download, file) in enumerate(zip(downloads, files, strict=True)):
        if download is not None:
            decoded[place] = Decoded(status=DOWNLOAD_FAILED, error=download)
        elif file is not None:
            decoded[place] = Decoded(status=IMAGE_MISSING, error=file)
    if columns.keep is not None and columns.uid is None:
        for place in np.flatnonzero(~load_kept(columns.keep, columns.keep_sha)(uids)).tolist():
            decoded[place] = Decoded(status=FILTERED)
    return decoded


def _with_filtered(
    filtered: Mapping[int, str | None],
    uids: Sequence[str | None],
    hashes: Sequence[tuple[bytes, bytes]],
    decoded: Sequence[Decoded],
) -> tuple[list[str | None], list[tuple[bytes, bytes]], list[Decoded]]:
    """Rows that were read and rows that were filtered out, in their order."""
    unknown = bytes(CONTENT_BYTES)
    read = iter(zip(uids, hashes, decoded, strict=True))
    rows = [
        (filtered[place], (unknown, unknown), Decoded(status=FILTERED)) if place in filtered else next(read)
        for place in range(len(uids) + len(filtered))
    ]
    return [uid for uid, _, _ in rows], [digests for _, digests, _ in rows], [one for _, _, one in rows]


class _Pixels:
    """Crops, written side by side as they come, while they are in a core's cache."""

    def __init__(self, most: int, room: Room | None) -> None:
        self._most = most
        self._left = None if room is None else room.memory
        self._count = 0
        self._held: dict[str, tuple[Tensor, npt.NDArray[np.uint8]]] = {}

    def add(self, crops: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """A row's crops, by view; nothing if there are none."""
        for view, crop in crops.items():
            if view not in self._held:
                held = self._place(self._most, *crop.shape)
                self._held[view] = held, held.numpy()
            self._held[view][1][self._count] = crop
        self._count += bool(crops)

    def _place(self, *shape: int) -> Tensor:
        if self._left is None:
            return torch.empty(shape, dtype=torch.uint8)
        size = int(np.prod(shape))
        here, self._left = self._left[:size], self._left[size:]
        return here.view(shape)

    def found(self) -> dict[str, Tensor]:
        """Rows [n, H, W, 3] by view."""
        return {view: held[: self._count] for view, (held, _) in self._held.items()}


def _rows(
    numbers: Rows,
    uids: Sequence[str | None],
    hashes: Sequence[tuple[bytes, bytes]],
    decoded: Sequence[Decoded],
) -> pa.RecordBatch:
    """Columns of an embedding file, all but the vectors."""
    pictures, contents = zip(*hashes, strict=True) if hashes else ((), ())
    return pa.RecordBatch.from_pydict(
        {
            "row": pa.array(numbers, pa.int64()),
            "uid": pa.array(uids, pa.string()),
            "status": pa.array([one.status for one in decoded], pa.string()),
            "error": pa.array([one.error for one in decoded], pa.string()),
            "content": pa.array(contents, pa.binary(CONTENT_BYTES)),
            "picture": pa.array(pictures, pa.binary(CONTENT_BYTES)),
            "width": pa.array([one.size and one.size[0] for one in decoded], pa.int32()),
            "height": pa.array([one.size and one.size[1] for one in decoded], pa.int32()),
        }
    )


def dropped_rows(numbers: Rows, uids: Sequence[str | None], status: str, error: str) -> pa.RecordBatch:
    """The same of rows that cannot be read, so that their contents are unknown: zeros."""
    unknown = bytes(CONTENT_BYTES)
    return _rows(numbers, uids, [(unknown, unknown)] * len(numbers), [Decoded(status=status, error=error)] * len(uids))


def _packed(batch: pa.RecordBatch) -> Tensor:
    """A record batch as a tensor, which goes from process to process without being copied."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)
