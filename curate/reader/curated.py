"""CuratedReader: committed rounds as exact training batches, for one rank or many.

A sub-batch was chosen as a whole, so a batch is exactly one sub-batch, its rows in the order drawn, never mixed with
another's. On N ranks each rank reads its own slice. The whole state is one integer: the number, counted from the first
row of round 0, of the next batch; so training may go on with another number of ranks and reads the same order.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from curate.errors import CurateError, UserError
from curate.messages import one_line
from curate.models.crop import Preprocess, decode_for, pixels_of
from curate.parquet import open_table
from curate.pool.images import clean_caption
from curate.pool.shards import ADDED_COLUMN, caption_bytes
from curate.reader.pieces import Joined, one_ahead, piece_bounds
from curate.rounds.manifest import CuratedFile, Manifest, is_expired, manifest_name, read_manifest, round_folder
from curate.rounds.pictures import pictures_of
from curate.rounds.stream import await_round
from curate.rounds.write import row_group_rows
from curate.storage import Store


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's slice of one sub-batch, b/W rows in the order drawn."""

    number: int
    """Of the batch, counted from round 0 on."""
    round: int
    sub_batch: int
    last: bool
    """Whether its round ends with it: a good moment to publish a learner."""
    uids: list[str]
    images: Tensor | list[PIL.Image.Image]
    """[b/W, 3, H, W] if the reader was given `preprocess`, uint8 [b/W, H, W, 3] if that is a `Crop`; else pictures."""
    texts: Tensor | list[str]
    """[b/W, L] if the reader was given `tokenize`, else captions."""

    def pin_memory(self) -> "Batch":
        """What `DataLoader(pin_memory=True)` calls."""
        pinned = {
            name: value.pin_memory() for name in ("images", "texts") if isinstance(value := getattr(self, name), Tensor)
        }
        return Batch(**self.__dict__ | pinned)


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Where one piece of a batch lies: all that a worker process needs to read it."""

    number: int
    round: int
    sub_batch: int
    last: bool
    file: str
    first_row: int
    rows: int
    left: int
    """Rows of the batch that come after these."""
    columns: dict[str, Any]
    """As the manifest has them."""


class CuratedReader:
    """Iterate over the batches of committed rounds, in order.

    Args:
        root: the root of the curation, as in the recipe.
        rank: of this process.
        world_size: number of ranks; must divide b.
        preprocess: open_clip's transform of a picture, or a `Crop`; pictures are returned as they are if None.
        tokenize: open_clip's tokenizer; captions are returned as they are if None.
        workers: processes that read, decode and tokenise ahead, a few hundred rows at a time; with any, one batch is
            put together while the last is used. Batches come in order all the same.
        batch_size: global batch size that the trainer is about to use; refused unless it is b.
        follow: wait for the next round where the committed ones end, until somebody ends the stream.
        timeout_s: with `follow`, how long to wait for a round; for ever if None.
        pin_memory: hold tensors in pinned memory, from which a GPU copies without blocking.
        verify: also hash each file, whole, when it is first opened. Without it the size of a file is compared, and each
            page that is read with its checksum.

    Raises:
        UserError: no such root, b not divisible by `world_size`, another batch size, a damaged file or manifest.
        StreamStalledError: with `follow`, neither a round nor the end of the stream came within `timeout_s`.
    """

    def __init__(
        self,
        root: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        preprocess: Preprocess | None = None,
        tokenize: Callable[[list[str]], Tensor] | None = None,
        workers: int = 0,
        batch_size: int | None = None,
        follow: bool = False,
        timeout_s: float | None = None,
        pin_memory: bool = False,
        verify: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank = {rank}: must be at least 0 and below world_size = {world_size}")
        self.store = Store(root)
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.follow = follow
        self.timeout_s = timeout_s
        self.pin_memory = pin_memory
        self.verify = verify
        self.workers = workers
        self._next = 0
        self._passed: list[tuple[str, int]] = []  # sha256 and stop_batch of the rounds that lie behind
        self._pieces = _Pieces(self.store, preprocess, tokenize)

    def state_dict(self) -> dict[str, int]:
        """`{"next_batch": n}`: what has been handed out, whatever the workers have read ahead."""
        return {"next_batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the batch that a `state_dict` names, of this or any other number of ranks.

        Raises:
            UserError: not the state of a reader.
        """
        number = state.get("next_batch")
        if not isinstance(number, int) or number < 0:
            raise UserError(f"state: expected {{'next_batch': n}} with n at least 0, found {state!r}")
        self._next = number

    def __iter__(self) -> Generator[Batch]:
        ranges = _Ranges()
        loader: DataLoader[_Piece | CurateError] = DataLoader(
            self._pieces,
            batch_size=None,
            sampler=ranges,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
        pieces: Iterator[_Piece | CurateError] | None = None
        # A round once read is not read again, but for those that an earlier state goes back to.
        while self._passed and self._passed[-1][1] > self._next:
            self._passed.pop()
        try:
            while (found := self._read_round(len(self._passed))) is not None:
                manifest, digest = found
                self._check_parent(manifest)
                if self._next < manifest.stop_batch:
                    self._check_sizes(manifest)
                    self._check_files(manifest)
                    ranges.ranges = self._of_round(manifest)[self._next - manifest.first_batch :]
                    pieces = iter(loader)  # here: only the main thread is told when a worker dies
                    with contextlib.closing(self._ahead(pieces)) as batches:
                        for batch in batches:
                            self._next = batch.number + 1
                            yield batch
                self._passed.append((digest, manifest.stop_batch))
        finally:
            # Its workers end now; the garbage collector would wait 5 s for each of them.
            del loader, pieces
        stop = self._passed[-1][1] if self._passed else 0
        if self._next > stop:
            raise UserError(
                f"{self.store.url}: the state says that batch {self._next} is next, but the committed rounds hold only "
                f"{stop}; the state belongs to another root"
            )

    def _ahead(self, pieces: Iterator["_Piece | CurateError"]) -> Generator[Batch]:
        """The batches of one round. Without workers each is read when it is asked for, by whoever asks."""
        if self.workers:
            return one_ahead(lambda check: self._joined(pieces, check))
        return self._joined(pieces, lambda: None)

    def _joined(self, pieces: Iterator["_Piece | CurateError"], check: Callable[[], None]) -> Generator[Batch]:
        """Batches from their pieces."""
        uids: list[str] = []
        images = texts = None
        for piece in pieces:
            check()
            if isinstance(piece, CurateError):
                raise copy.copy(piece)  # anew: one that this frame holds would keep it alive
            if images is None or texts is None:
                images, texts = (Joined(len(piece.uids) + piece.left, pin_memory=self.pin_memory) for _ in range(2))
            uids += piece.uids
            images.add(piece.images)
            texts.add(piece.texts)
            if piece.left:
                continue
            batch = Batch(
                number=piece.number,
                round=piece.round,
                sub_batch=piece.sub_batch,
                last=piece.last,
                uids=uids,
                images=images.whole,
                texts=texts.whole,
            )
            uids, images, texts = [], None, None
            del piece
            yield batch
            del batch  # one that is used no more need not be held while the next is put together

    def _read_round(self, number: int) -> tuple[Manifest, str] | None:
        """The manifest of a round, with `follow` once it is there; None where the stream ends."""
        if self.follow:
            return await_round(self.store, number, timeout_s=self.timeout_s)
        found = read_manifest(self.store, number)
        if found is None and number == 0:
            raise UserError(f"{self.store.url}: expected a committed round, found none; run: curate round RECIPE")
        return found

    def _check_parent(self, manifest: Manifest) -> None:
        parent, stop = self._passed[-1] if self._passed else (None, 0)
        if (manifest.parent, manifest.first_batch) != (parent, stop):
            raise UserError(
                f"{manifest_name(manifest.round)}: its parent is {manifest.parent}, but round {manifest.round - 1} as "
                f"read here is {parent}; the rounds of two roots are mixed: restore the root"
            )

    def _check_sizes(self, manifest: Manifest) -> None:
        name = manifest_name(manifest.round)
        b = manifest.sub_batch_size
        if b % self.world_size:
            raise UserError(
                f"{name}: {b} pairs per batch do not divide over {self.world_size} ranks; use a divisor of {b}"
            )
        if self.batch_size not in (None, b):
            raise UserError(
                f"{name}: its batches hold {b} pairs and were chosen as wholes, the trainer asked for "
                f"{self.batch_size}; train with batches of {b}, or curate with sub_batch_size = {self.batch_size}"
            )

    def _check_files(self, manifest: Manifest) -> None:
        for file in manifest.files:
            self._check_file(manifest, file, f"{round_folder(manifest.round)}/{file.name}")

    def _check_file(self, manifest: Manifest, file: CuratedFile, name: str) -> None:
        size = self.store.size(name)
        if size is None and is_expired(self.store, manifest.round):
            raise UserError(
                f"{name}: the rows of round {manifest.round} were removed by curate gc --keep-rounds; go on from a "
                f"state whose next_batch is {manifest.stop_batch} or more"
            )
        if size != file.size:
            raise UserError(f"{name}: expected {file.size} bytes, found {size}; restore the file")
        if self.verify:
            with self.store.open_input(name) as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != file.sha256:
                raise UserError(f"{name}: expected sha256 {file.sha256[:12]}, found {found[:12]}; restore the file")

    def _of_round(self, manifest: Manifest) -> list[_Range]:
        """The pieces of this rank's slice of each sub-batch of a round."""
        b = manifest.sub_batch_size
        share = b // self.world_size
        pieces = piece_bounds(self.rank * share, (self.rank + 1) * share, row_group_rows(b))
        return [
            _Range(
                number=manifest.first_batch + sub_batch,
                round=manifest.round,
                sub_batch=sub_batch,
                last=sub_batch + 1 == manifest.sub_batches,
                file=f"{round_folder(manifest.round)}/{file.name}",
                first_row=(sub_batch - file.first_sub_batch) * b + start,
                rows=stop - start,
                left=(self.rank + 1) * share - stop,
                columns=manifest.columns,
            )
            for file in sorted(manifest.files, key=lambda file: file.first_sub_batch)
            for sub_batch in range(file.first_sub_batch, file.first_sub_batch + file.sub_batches)
            for start, stop in pieces
        ]


class _Ranges(Sampler[_Range]):
    """The pieces of one round. The loader keeps its workers from round to round and asks here what to read."""

    def __init__(self) -> None:
        self.ranges: Sequence[_Range] = ()

    def __iter__(self) -> Iterator[_Range]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Consecutive rows of a batch, as a worker hands them over."""

    number: int
    round: int
    sub_batch: int
    last: bool
    left: int
    """Rows of the batch that come after these."""
    uids: list[str]
    images: Tensor | list[PIL.Image.Image]
    texts: Tensor | list[str]


class _Pieces(Dataset[_Piece | CurateError]):
    """From a range to its rows: the work of a worker process.

    A mistake is returned, not raised: on its way from a worker a raised one becomes a traceback.
    """

    def __init__(
        self,
        store: Store,
        preprocess: Preprocess | None,
        tokenize: Callable[[list[str]], Tensor] | None,
    ) -> None:
        self.store = store
        self.preprocess = preprocess
        self.tokenize = tokenize
        self._footer: tuple[str, Any] | None = None  # of the file that was read last

    def __getitem__(self, some: _Range) -> _Piece | CurateError:
        # Published images were decoded once before, so this cannot fail but for damage on the way; and a damaged
        # file makes pyarrow raise whatever it likes.
        try:
            rows = self._read_rows(some)
            encoded = pictures_of(self.store, rows, some.columns)
            images: list[Any] = [decode_for(data, [self.preprocess]) for data in encoded]
            captions = [clean_caption(raw) for raw in caption_bytes(rows.column(some.columns["caption"])).to_pylist()]
            uids = rows.column(ADDED_COLUMN).field("uid").to_pylist()
        except CurateError as error:  # the store refused or failed, or the file is damaged
            return error
        except Exception as error:
            reason = one_line(error)
            where = f"{some.file}: cannot be read at sub-batch {some.sub_batch}"
            return UserError(f"{where} ({reason}); restore the file")
        return _Piece(
            number=some.number,
            round=some.round,
            sub_batch=some.sub_batch,
            last=some.last,
            left=some.left,
            uids=uids,
            images=torch.stack([pixels_of(image, self.preprocess) for image in images]) if self.preprocess else images,
            texts=self.tokenize(captions) if self.tokenize else captions,
        )

    def _read_rows(self, some: _Range) -> Any:
        """The rows of a range as one record batch; only the row groups that they lie in are read."""
        name, footer = self._footer or ("", None)
        with open_table(self.store, some.file, footer=footer if name == some.file else None) as parquet:
            self._footer = some.file, parquet.metadata
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            ends = np.cumsum(sizes)
            first, last = np.searchsorted(ends, [some.first_row, some.first_row + some.rows - 1], side="right")
            columns = some.columns
            names = [*([] if "pool" in columns else [columns["image"]]), columns["caption"], ADDED_COLUMN]
            table = parquet.read_row_groups(range(first, last + 1), columns=names)
        start = some.first_row - int(ends[first] - sizes[first])
        return table.slice(start, some.rows).combine_chunks().to_batches()[0]
