"""Embed one shard: decode each pair once, run it through every encoder that asks, write one file per encoder."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.embed.decode import Crop, Decoded, Row, Watched
from curate.embed.files import (
    CONTENT_BYTES,
    DAMAGED_SHARD,
    EMBEDDING_NONFINITE,
    EMBEDDING_ZERO,
    embedding_schema,
    pair_hashes,
    uid_texts,
)
from curate.errors import ShardDamagedError
from curate.parquet import CHECKED
from curate.pool.img2dataset import DOWNLOAD_FAILED, OUTCOME_COLUMNS, download_errors
from curate.pool.shards import (
    READ_ROWS,
    Columns,
    Shard,
    caption_bytes,
    image_bytes,
    read_batches,
    read_some,
)
from curate.recipe import EmbedSection
from curate.storage import Store

if TYPE_CHECKING:
    from curate.models.encoder import Encoder

Decode = Callable[[Sequence[Row]], list[Decoded]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row on its way through the encoders."""

    row: int
    uid: str | None
    content: bytes
    picture: bytes
    decoded: Decoded


def embed_shard(
    shard: Shard,
    encoders: "Mapping[str, Encoder]",
    store: Store,
    settings: EmbedSection,
    *,
    threads: int = 1,
    rows: npt.NDArray[np.int64] | None = None,
    decode: Decode | None = None,
) -> dict[str, int]:
    """Write the embedding files of one shard.

    Args:
        shard: of the pool.
        encoders: by the name, within the root, of the file to write.
        store: the root.
        settings: sizes.
        threads: decoding threads; the model runs meanwhile.
        rows: numbers of the rows that are wanted, ascending; the file holds these alone. All if None.
        decode: decodes rows for all encoders; in this process, watched, if None.

    Returns:
        Rows by status; the same for every encoder but for rows whose embedding is unusable, which are counted once.

    Raises:
        InputChangedError: if the shard is not the file that was inventoried.
        ShardDamagedError: if a page of it cannot be read; nothing is written then.
    """
    counts: dict[str, int] = {}
    with ThreadPoolExecutor(threads) as executor, _writers(store, encoders, some=rows is not None) as writers:
        columns = shard.columns
        names = [columns.image, columns.caption, *([columns.uid] if columns.uid else []), *OUTCOME_COLUMNS]
        batches = _batches(shard, rows, list(dict.fromkeys(names)), settings.chunk_rows)
        decode = decode or Watched(crops_of(encoders.values()))
        read = partial(_read_pairs, columns=columns, decode=decode)
        for pairs in _decoded_ahead(batches, executor, threads, read):
            unusable: dict[int, str] = {}
            for name, encoder in encoders.items():
                table, statuses = _embed_pairs(pairs, encoder, settings.batch_size, some=rows is not None)
                writers[name].write_table(table)
                unusable |= statuses
            for row, pair in enumerate(pairs):
                status = unusable.get(row, pair.decoded.status)
                counts[status] = counts.get(status, 0) + 1
    return counts


def embed_damaged(
    shard: Shard, encoders: "Mapping[str, Encoder]", store: Store, damage: ShardDamagedError
) -> dict[str, int]:
    """Write the embedding files of a shard that `embed_shard` could not read: every row of it is dropped.

    All of them, because whoever reads a shard to its end, as the writing of a round does, meets its damage again.

    Returns:
        Rows by status, as `embed_shard`.
    """
    pairs = [
        Pair(
            row=row,
            uid=uid,
            content=bytes(CONTENT_BYTES),
            picture=bytes(CONTENT_BYTES),
            decoded=Decoded(status=DAMAGED_SHARD, error=damage.found),
        )
        for row, uid in enumerate(_uids_in_spite(shard))
    ]
    with _writers(store, encoders, some=False) as writers:
        for name, encoder in encoders.items():
            for start in range(0, len(pairs), READ_ROWS):
                table, _ = _embed_pairs(pairs[start : start + READ_ROWS], encoder, READ_ROWS, some=False)
                writers[name].write_table(table)
    return {DAMAGED_SHARD: len(pairs)}


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
                        **CHECKED,
                    )
                )
                for name, path in paths.items()
            }
        for name, path in paths.items():
            store.put_file(path, name)


def _batches(
    shard: Shard, rows: npt.NDArray[np.int64] | None, columns: Sequence[str], batch_rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
    """Numbers of rows and these rows, in order: all of the shard, or some."""
    if rows is not None:
        yield from read_some(shard, rows, columns, batch_rows=batch_rows)
        return
    start = 0
    for batch in read_batches(shard, columns, batch_rows=batch_rows):
        yield np.arange(start, start + batch.num_rows), batch
        start += batch.num_rows


def _decoded_ahead(
    batches: Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]],
    executor: Executor,
    threads: int,
    decode: Callable[[npt.NDArray[np.int64], pa.RecordBatch], list[Pair]],
) -> Iterator[list[Pair]]:
    """Decoded batches in order; the next one decodes while the caller works on this one."""
    pending: list[Future[list[Pair]]] = []
    for numbers, batch in batches:
        step = -(-batch.num_rows // threads)
        begun = [
            executor.submit(decode, numbers[start : start + step], batch.slice(start, step))
            for start in range(0, batch.num_rows, step)
        ]
        if pending:
            yield [pair for future in pending for pair in future.result()]
        pending = begun
    if pending:
        yield [pair for future in pending for pair in future.result()]


def crops_of(encoders: "Iterable[Encoder]") -> dict[str, Crop]:
    """What decoding has to make for some encoders: one crop for all that see the same pixels."""
    return {encoder.view: encoder.crop for encoder in encoders}


def _read_pairs(
    numbers: npt.NDArray[np.int64], batch: pa.RecordBatch, *, columns: Columns, decode: Decode
) -> list[Pair]:
    images = image_bytes(batch.column(columns.image)).to_pylist()
    captions = caption_bytes(batch.column(columns.caption)).to_pylist()
    hashes = [pair_hashes(image, caption) for image, caption in zip(images, captions, strict=True)]
    uids = uid_texts(batch.column(columns.uid)) if columns.uid else [content.hex() for _, content in hashes]
    failures = download_errors(batch, images)
    rows = zip(images, captions, failures, strict=True)
    decoded = iter(decode([(image, caption) for image, caption, failure in rows if failure is None]))
    return [
        Pair(
            row=row,
            uid=uid,
            content=content,
            picture=picture,
            decoded=next(decoded) if failure is None else Decoded(status=DOWNLOAD_FAILED, error=failure),
        )
        for row, uid, (picture, content), failure in zip(numbers.tolist(), uids, hashes, failures, strict=True)
    ]


def _embed_pairs(
    pairs: Sequence[Pair], encoder: "Encoder", batch_size: int, *, some: bool
) -> tuple[pa.Table, dict[int, str]]:
    """The file's rows for these pairs, and the rows whose embedding turned out unusable."""
    usable = [row for row, pair in enumerate(pairs) if pair.decoded.status == "ok"]
    width = encoder.spec.embed_dim
    z = np.zeros((2, len(usable), width), np.float16)  # zimg, ztxt
    for start in range(0, len(usable), batch_size):
        rows = [pairs[row] for row in usable[start : start + batch_size]]
        pixels = torch.from_numpy(np.stack([pair.decoded.pixels[encoder.view] for pair in rows]))
        texts = encoder.tokenize([pair.decoded.caption for pair in rows])
        for tower, encoded in zip(z, encoder.encode(pixels, texts), strict=True):
            tower[start : start + len(rows)] = encoded.numpy()

    finite = np.asarray(np.isfinite(z).all(axis=(0, 2)))
    good = np.asarray(finite & z.any(axis=2).all(axis=0))
    failed = {usable[i]: EMBEDDING_ZERO if finite[i] else EMBEDDING_NONFINITE for i in np.flatnonzero(~good).tolist()}
    null: npt.NDArray[np.bool_] = np.ones(len(pairs), bool)
    null[np.array(usable, int)[good]] = False
    arrays = [
        *([pa.array([pair.row for pair in pairs], pa.int64())] if some else []),
        pa.array([pair.uid for pair in pairs], pa.string()),
        pa.array([failed.get(row, pair.decoded.status) for row, pair in enumerate(pairs)], pa.string()),
        pa.array([pair.decoded.error for pair in pairs], pa.string()),
        pa.array([pair.content for pair in pairs], pa.binary(CONTENT_BYTES)),
        pa.array([pair.picture for pair in pairs], pa.binary(CONTENT_BYTES)),
        *(pa.array([pair.decoded.size and pair.decoded.size[side] for pair in pairs], pa.int32()) for side in (0, 1)),
        _vector_column(z[0, good], null),
        _vector_column(z[1, good], null),
    ]
    return pa.Table.from_arrays(arrays, schema=embedding_schema(width, some=some)), failed


def _vector_column(rows: npt.NDArray[np.float16], null: npt.NDArray[np.bool_]) -> pa.Array:
    """Rows [n, D] where `null` is false, in order, as a column as long as `null`."""
    values = np.zeros((len(null), rows.shape[1]), np.float16)
    values[~null] = rows
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), rows.shape[1], mask=pa.array(null))
