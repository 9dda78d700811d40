"""Embed one shard: decode each pair once, run it through every encoder that asks, write one file per encoder.

An embedding file has exactly one row per row of its shard, in order:

    uid      string                 the recipe's column, else `content` in hex
    status   string                 ok, not_scored, or why the pair cannot be used
    error    string or null         what was found, for people
    content  fixed_size_binary[16]  hash of image bytes and caption: equal pairs, equal content
    zimg     fixed_size_list<float16>[D] or null     unit rows, null unless status is ok
    ztxt     likewise
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.encoder import Encoder
from curate.images import Dropped, clean_caption, decode_image
from curate.pool import Columns, Shard, caption_bytes, image_bytes, read_batches
from curate.recipe import EmbedSection
from curate.storage import Store

CONTENT_BYTES = 16
Wanted = Callable[[npt.NDArray[np.uint64]], npt.NDArray[np.bool_]]
NOT_SCORED = "not_scored"
EMBEDDING_NONFINITE = "embedding_nonfinite"
EMBEDDING_ZERO = "embedding_zero"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One row on its way through the encoders."""

    uid: str
    content: bytes
    status: str
    error: str | None = None
    pixels: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    """What each kind of encoder sees, [H, W, 3], by `Encoder.view`."""
    caption: str = ""


def content_hash(image: bytes | None, caption: bytes | None) -> bytes:
    """16 bytes that two rows share exactly if image bytes and caption bytes are equal (BLAKE2b).

    >>> content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    True
    """
    digest = hashlib.blake2b(digest_size=CONTENT_BYTES)
    digest.update(len(image or b"").to_bytes(8, "little"))
    digest.update(image or b"")
    digest.update(caption or b"")
    return digest.digest()


def embed_shard(
    shard: Shard,
    columns: Columns,
    encoders: Mapping[str, Encoder],
    store: Store,
    settings: EmbedSection,
    *,
    threads: int = 1,
    wanted: Wanted | None = None,
) -> dict[str, int]:
    """Write the embedding files of one shard.

    Args:
        shard: of the pool.
        columns: of the pool.
        encoders: by the name, within the root, of the file to write.
        store: the root.
        settings: sizes.
        threads: decoding threads; the model runs meanwhile.
        wanted: tells from contents [n, 2] which rows to score; the others get the status `not_scored`. All if None.

    Returns:
        Rows by status; the same for every encoder but for rows whose embedding is unusable, which are counted once.

    Raises:
        InputChangedError: if the shard is not the file that was inventoried.
    """
    counts: dict[str, int] = {}
    with store.local_scratch() as scratch, ThreadPoolExecutor(threads) as executor:
        paths = {name: scratch / f"{i}.parquet" for i, name in enumerate(encoders)}
        writers = {
            name: pq.ParquetWriter(
                path, _schema(encoders[name].spec.embed_dim), compression="zstd", use_dictionary=["status"]
            )
            for name, path in paths.items()
        }
        try:
            names = [columns.image, columns.caption] + ([columns.uid] if columns.uid else [])
            batches = read_batches(shard, list(dict.fromkeys(names)), batch_rows=settings.chunk_rows)
            decode = partial(_decode, columns=columns, encoders=list(encoders.values()), wanted=wanted)
            for pairs in _decoded_ahead(batches, executor, threads, decode):
                unusable: dict[int, str] = {}
                for name, encoder in encoders.items():
                    table, statuses = _embed_pairs(pairs, encoder, settings.batch_size)
                    writers[name].write_table(table)
                    unusable |= statuses
                for row, pair in enumerate(pairs):
                    status = unusable.get(row, pair.status)
                    counts[status] = counts.get(status, 0) + 1
        finally:
            for writer in writers.values():
                writer.close()
        for name, path in paths.items():
            store.put_file(path, name)
    return counts


def embedding_name(sha: str, shard: Shard, scope: str = "") -> str:
    """Name, within the root, of a shard's embeddings by one encoder; `scope` if only some rows are scored."""
    return "/".join(part for part in ("embeddings", sha, scope, f"{shard.key}.parquet") if part)


def read_embeddings(store: Store, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of an embedding file."""
    with store.open_input(name) as file:
        return pq.read_table(file, columns=list(columns))


def vectors(column: pa.ChunkedArray, embed_dim: int) -> npt.NDArray[np.float16]:
    """An embedding column as float16 [n, D]; NaN where it is null, so that nothing can mistake it for a vector."""
    array = column.combine_chunks()
    out = np.full((len(array), embed_dim), np.nan, np.float16)
    valid = np.asarray(array.is_valid())
    out[valid] = array.flatten().to_numpy(zero_copy_only=False).reshape(-1, embed_dim)
    return out


def contents(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """A content column as its two halves [n, 2]."""
    return np.concatenate([_halves(chunk.to_pylist()) for chunk in column.chunks] or [_halves([])])


def _halves(content: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(content), "<u8").reshape(-1, 2)


def _schema(embed_dim: int) -> pa.Schema:
    vector = pa.list_(pa.float16(), embed_dim)
    return pa.schema(
        [
            pa.field("uid", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("content", pa.binary(CONTENT_BYTES), nullable=False),
            pa.field("zimg", vector),
            pa.field("ztxt", vector),
        ],
        metadata={"format": json.dumps({"embeddings": 1})},
    )


def _decoded_ahead(
    batches: Iterator[pa.RecordBatch],
    executor: Executor,
    threads: int,
    decode: Callable[[pa.RecordBatch], list[Pair]],
) -> Iterator[list[Pair]]:
    """Decoded batches in order; the next one decodes while the caller works on this one."""
    pending: list[Future[list[Pair]]] = []
    for batch in batches:
        step = -(-batch.num_rows // threads)
        begun = [executor.submit(decode, batch.slice(start, step)) for start in range(0, batch.num_rows, step)]
        if pending:
            yield [pair for future in pending for pair in future.result()]
        pending = begun
    if pending:
        yield [pair for future in pending for pair in future.result()]


def _decode(
    batch: pa.RecordBatch,
    *,
    columns: Columns,
    encoders: Sequence[Encoder],
    wanted: Wanted | None,
) -> list[Pair]:
    images = image_bytes(batch.column(columns.image)).to_pylist()
    captions = caption_bytes(batch.column(columns.caption)).to_pylist()
    content = [content_hash(image, caption) for image, caption in zip(images, captions, strict=True)]
    uids = batch.column(columns.uid).cast(pa.string()).to_pylist() if columns.uid else [c.hex() for c in content]
    scored = wanted(_halves(content)) if wanted else np.ones(len(content), bool)
    views = {encoder.view: encoder.crop for encoder in encoders}
    pairs = []
    for uid, digest, data, raw, score in zip(uids, content, images, captions, scored, strict=True):
        pair = partial(Pair, uid=uid, content=digest)
        if not score:
            pairs.append(pair(status=NOT_SCORED))
            continue
        try:
            # The caption first: it costs nothing, and a row without one needs no decoding.
            caption = clean_caption(raw)
            image = decode_image(data)
        except Dropped as dropped:
            pairs.append(pair(status=dropped.reason, error=dropped.error))
        else:
            pixels = {view: crop(image) for view, crop in views.items()}
            pairs.append(pair(status="ok", pixels=pixels, caption=caption))
    return pairs


def _embed_pairs(pairs: Sequence[Pair], encoder: Encoder, batch_size: int) -> tuple[pa.Table, dict[int, str]]:
    """The file's rows for these pairs, and the rows whose embedding turned out unusable."""
    usable = [row for row, pair in enumerate(pairs) if pair.status == "ok"]
    width = encoder.spec.embed_dim
    z = np.zeros((2, len(usable), width), np.float16)  # zimg, ztxt
    for start in range(0, len(usable), batch_size):
        rows = [pairs[row] for row in usable[start : start + batch_size]]
        pixels = torch.from_numpy(np.stack([pair.pixels[encoder.view] for pair in rows]))
        texts = encoder.tokenize([pair.caption for pair in rows])
        for tower, encoded in zip(z, encoder.encode(pixels, texts), strict=True):
            tower[start : start + len(rows)] = encoded.numpy()

    finite = np.asarray(np.isfinite(z).all(axis=(0, 2)))
    good = np.asarray(finite & z.any(axis=2).all(axis=0))
    failed = {usable[i]: EMBEDDING_ZERO if finite[i] else EMBEDDING_NONFINITE for i in np.flatnonzero(~good).tolist()}
    null: npt.NDArray[np.bool_] = np.ones(len(pairs), bool)
    null[np.array(usable, int)[good]] = False
    arrays = [
        pa.array([pair.uid for pair in pairs], pa.string()),
        pa.array([failed.get(row, pair.status) for row, pair in enumerate(pairs)], pa.string()),
        pa.array([pair.error for pair in pairs], pa.string()),
        pa.array([pair.content for pair in pairs], pa.binary(CONTENT_BYTES)),
        _vector_column(z[0, good], null),
        _vector_column(z[1, good], null),
    ]
    return pa.Table.from_arrays(arrays, schema=_schema(width)), failed


def _vector_column(rows: npt.NDArray[np.float16], null: npt.NDArray[np.bool_]) -> pa.Array:
    """Rows [n, D] where `null` is false, in order, as a column as long as `null`."""
    values = np.zeros((len(null), rows.shape[1]), np.float16)
    values[~null] = rows
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), rows.shape[1], mask=pa.array(null))
