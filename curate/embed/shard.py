"""What becomes of a shard: the parts of its embedding files, put together in order, one file per encoder."""

import contextlib
import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curate.embed.files import (
    DAMAGED_SHARD,
    EMBEDDING_NONFINITE,
    EMBEDDING_ZERO,
    embedding_schema,
    uid_texts,
)
from curate.embed.pieces import Piece, dropped_rows
from curate.errors import ShardDamagedError
from curate.parquet import CHECKED
from curate.pool.shards import READ_ROWS, Shard, read_batches
from curate.storage import Store

if TYPE_CHECKING:
    from curate.models.encoder import Encoder

F16 = npt.NDArray[np.float16]


@dataclass
class Part:
    """Consecutive pieces of a shard: a row group of its embedding files, while its pieces come in any order."""

    piece_rows: int
    missing: int
    """Pieces."""
    pieces: dict[int, Piece] = field(default_factory=dict)
    """Without pixels and texts; by place within the part."""
    z: dict[str, Tensor] = field(default_factory=dict)
    """zimg and ztxt, float16 [2, rows, D], by encoder; the rows of a piece begin at a multiple of `piece_rows`. On the
    device until the part is complete."""
    copied: "torch.cuda.Event | None" = None
    """When `z` has come back from the device."""

    def add(self, place: int, piece: Piece, z: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
        """Take in a piece and its embeddings float32 [n, D]; says whether the part is complete."""
        at = place * self.piece_rows
        for name, towers in z.items():
            if name not in self.z:
                shape = 2, (self.missing + len(self.pieces)) * self.piece_rows, towers[0].shape[1]
                self.z[name] = torch.zeros(shape, dtype=torch.float16, device=towers[0].device)
            for held, tower in zip(self.z[name], towers, strict=True):
                held[at : at + len(tower)].copy_(tower)
        self.pieces[place] = piece
        self.missing -= 1
        return not self.missing

    def send_back(self) -> None:
        """Begin to copy the embeddings back from a GPU, behind what computes them; nothing to do on a CPU."""
        for name, z in self.z.items():
            if z.is_cuda:
                self.z[name] = torch.empty(z.shape, dtype=z.dtype, pin_memory=True).copy_(z, non_blocking=True)
                self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.copied.record()

    def tables(
        self, encoders: "Mapping[str, Encoder]", *, some: bool
    ) -> tuple[dict[str, pa.Table], npt.NDArray[np.object_]]:
        """The part's rows of each encoder's file, and their statuses for the tally."""
        if self.copied is not None:
            self.copied.synchronize()
        places = sorted(self.pieces)
        rows = pa.concat_tables([self.pieces[place].table() for place in places])
        oks = [(place * self.piece_rows, self.pieces[place].ok) for place in places]
        statuses = told = np.array(rows["status"].to_pylist(), object)
        tables = {}
        for name, encoder in encoders.items():
            width = encoder.spec.embed_dim
            held = self.z[name].numpy() if name in self.z else np.zeros((2, 0, width), np.float16)
            z = np.concatenate([held[:, at : at + ok] for at, ok in oks], axis=1)
            tables[name] = _with_vectors(rows, z, some=some)
            own = np.array(tables[name]["status"].to_pylist(), object)
            statuses = np.where(own != told, own, statuses)
        return tables, statuses


@dataclass
class Job:
    """A shard on its way through the encoders; made by who writes its files, filled by who runs the models."""

    names: Mapping[str, str]
    """Of the embedding files, by encoder."""
    pieces: int
    piece_rows: int
    part_pieces: int
    """Pieces of each part."""
    done: "queue.SimpleQueue[tuple[int, Part] | BaseException]" = field(default_factory=queue.SimpleQueue)
    _begun: dict[int, Part] = field(default_factory=dict)

    def add(self, piece: Piece, z: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take in a piece and its embeddings."""
        number, place = divmod(piece.number, self.part_pieces)
        if number not in self._begun:
            missing = min(self.part_pieces, self.pieces - number * self.part_pieces)
            self._begun[number] = Part(piece_rows=self.piece_rows, missing=missing)
        if self._begun[number].add(place, piece, z):
            part = self._begun.pop(number)
            part.send_back()
            self.done.put((number, part))

    def parts(self) -> Iterator[Part]:
        """The complete parts, in order, as soon as they are there.

        Raises:
            Exception: what made the shard fail.
        """
        waiting: dict[int, Part] = {}
        for number in range(-(-self.pieces // self.part_pieces)):
            while number not in waiting:
                found = self.done.get()
                if isinstance(found, BaseException):
                    raise found
                waiting[found[0]] = found[1]
            yield waiting.pop(number)


def write_files(store: Store, job: Job, encoders: "Mapping[str, Encoder]", *, some: bool) -> dict[str, int]:
    """Write the embedding files of a job as its parts come; returns its rows by status."""
    counts: dict[str, int] = {}
    asked = {name: encoders[name] for name in job.names}
    with _writers(store, {job.names[name]: encoder for name, encoder in asked.items()}, some=some) as writers:
        for part in job.parts():
            tables, statuses = part.tables(asked, some=some)
            for name, table in tables.items():
                writers[job.names[name]].write_table(table)
            for status in statuses.tolist():
                counts[status] = counts.get(status, 0) + 1
    return counts


def embed_damaged(
    shard: Shard, encoders: "Mapping[str, Encoder]", store: Store, damage: ShardDamagedError
) -> dict[str, int]:
    """Write the embedding files of a shard that could not be read: every row of it is dropped.

    All of them, because whoever reads a shard to its end, as the writing of a round does, meets its damage again.

    Args:
        shard: of the pool.
        encoders: by the name, within the root, of the file to write.
        store: the root.
        damage: what was found.

    Returns:
        Rows by status.
    """
    uids = _uids_in_spite(shard)
    with _writers(store, encoders, some=False) as writers:
        for start in range(0, len(uids), READ_ROWS):
            here = uids[start : start + READ_ROWS]
            numbers = np.arange(start, start + len(here))
            rows = pa.Table.from_batches([dropped_rows(numbers, here, DAMAGED_SHARD, damage.found)])
            for name, encoder in encoders.items():
                none = np.zeros((2, 0, encoder.spec.embed_dim), np.float16)
                writers[name].write_table(_with_vectors(rows, none, some=False))
    return {DAMAGED_SHARD: len(uids)}


def _uids_in_spite(shard: Shard) -> list[str | None]:
    """The uids of a damaged shard: its own, if that column is sound, else one for each row that no other row has."""
    if uid := shard.columns.uid:
        with contextlib.suppress(ShardDamagedError):
            batches = read_batches(shard, [uid], batch_rows=READ_ROWS)
            return [text for batch in batches for text in uid_texts(batch.column(uid))]
    return [f"{shard.name}#{row}" for row in range(shard.rows)]


@contextlib.contextmanager
def _writers(store: Store, encoders: "Mapping[str, Encoder]", *, some: bool) -> Iterator[dict[str, pq.ParquetWriter]]:
    """A writer for each embedding file; the files are put in their places at the end, if nothing was raised."""
    with store.local_scratch() as scratch:
        paths = {name: scratch / f"{i}.parquet" for i, name in enumerate(encoders)}
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(
                    pq.ParquetWriter(
                        path,
                        embedding_schema(encoders[name].spec.embed_dim, some=some),
                        compression="zstd",
                        use_dictionary=["status"],
                        write_statistics=False,  # of vectors they took a third of the time; nothing asks for any
                        **CHECKED,
                    )
                )
                for name, path in paths.items()
            }
        for name, path in paths.items():
            store.put_file(path, name)


def _with_vectors(rows: pa.Table, z: F16, *, some: bool) -> pa.Table:
    """The file's rows: vectors [2, n, D] are those of the n rows that are ok; statuses tell the unusable."""
    statuses: Sequence[str] = rows["status"].to_pylist()
    usable = np.flatnonzero(np.array([status == "ok" for status in statuses], bool))
    finite = np.asarray(np.isfinite(z).all(axis=(0, 2)))
    good = np.asarray(finite & z.any(axis=2).all(axis=0))
    told = np.array(statuses, object)
    told[usable[~finite]] = EMBEDDING_NONFINITE
    told[usable[finite & ~good]] = EMBEDDING_ZERO
    null: npt.NDArray[np.bool_] = np.ones(len(told), bool)
    null[usable[good]] = False
    schema = embedding_schema(z.shape[2], some=some)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: rows[name] for name in rows.schema.names}
    columns |= {"status": pa.array(told, pa.string())}
    columns |= {name: _vector_column(z[i, good], null) for i, name in enumerate(("zimg", "ztxt"))}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _vector_column(rows: F16, null: npt.NDArray[np.bool_]) -> pa.Array:
    """Rows [n, D] where `null` is false, in order, as a column as long as `null`."""
    values = np.zeros((len(null), rows.shape[1]), np.float16)
    values[~null] = rows
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), rows.shape[1], mask=pa.array(null))
