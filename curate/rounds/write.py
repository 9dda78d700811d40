"""Write: the chosen rows, sub-batch by sub-batch, in the order drawn, as plain Parquet named by its content."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curate.embed.files import CONTENT_BYTES, content_hash, uids_of
from curate.errors import InputChangedError
from curate.parquet import CHECKED
from curate.pool.columns import Columns
from curate.pool.shards import ADDED_COLUMN, Pool, Shard, caption_bytes, image_bytes, read_some
from curate.rounds.manifest import CuratedFile
from curate.sealed import seal, unseal
from curate.storage import Store

READ_ROWS = 1024
"""Rows of a source shard that are held at once while the chosen ones are picked out."""

ADDED_TYPE = pa.struct(
    [
        ("round", pa.int32()),
        ("sub_batch", pa.int32()),
        ("position", pa.int32()),
        ("chunk", pa.int16()),
        ("score", pa.float32()),
        ("learner_loss", pa.float32()),
        ("reference_loss", pa.float32()),
        ("uid", pa.string()),
        ("source_shard", pa.string()),
        ("source_row", pa.int64()),
    ]
)
"""What a curated row carries beside the user's columns: why and whence it came."""


INDEX_TYPE = pa.struct([*ADDED_TYPE, pa.field("content", pa.binary(CONTENT_BYTES))])
"""The same in a round without pictures: with a hash of the pair, by which the picture chosen is known again."""


def row_group_rows(sub_batch_size: int) -> int:
    """Rows per row group: 64 to 256 where b allows, a divisor of b where there is one, so that ranks' slices align.

    >>> [row_group_rows(b) for b in (32_768, 1_024, 256, 100, 1_009)]
    [256, 128, 64, 50, 126]
    """
    most = max(64, min(256, sub_batch_size // 8))
    divisor = next(rows for rows in range(min(most, sub_batch_size), 0, -1) if sub_batch_size % rows == 0)
    return divisor if 2 * divisor >= min(64, sub_batch_size) else most


def chosen_rows(shard: Shard, picks: pa.Table, *, columns: Columns, schema: pa.Schema, round_number: int) -> pa.Table:
    """The rows of one shard that were chosen, with the user's columns and ours, in the order of the shard.

    Args:
        shard: of the pool.
        picks: of the schema of selected files, rows of this shard only, at least one.
        columns: of the pool.
        schema: of curated files.
        round_number: for the added column.

    Raises:
        InputChangedError: if a row is not the pair that was embedded.
    """
    picks = picks.sort_by("row")
    pieces, done = [], 0
    # Without pictures only what is small is read.
    names = None if columns.image in schema.names else [name for name in schema.names if name != ADDED_COLUMN]
    for rows, batch in read_some(shard, picks["row"].to_numpy(), names, batch_rows=READ_ROWS):
        there = picks.slice(done, len(rows))
        done += len(rows)
        pieces.append(_with_added(batch, there, shard=shard, columns=columns, schema=schema, round_number=round_number))
    return pa.concat_tables(pieces)


def curated_schema(pool: Pool, *, pictures: bool = True) -> pa.Schema:
    """The pool's columns and the added one; a plain image column widened to 64-bit offsets, or none without `pictures`.

    A struct image column keeps its type, because `datasets` shows it as an image only if it is exactly its own.
    """
    schema = pool.schema
    index = schema.get_field_index(pool.columns.image)
    if not pictures:
        schema = schema.remove(index)
    elif not pa.types.is_struct(schema.field(index).type):
        schema = schema.set(index, pa.field(pool.columns.image, pa.large_binary()))
    return schema.append(pa.field(ADDED_COLUMN, ADDED_TYPE if pictures else INDEX_TYPE, nullable=False))


def write_curated(
    pieces: Sequence[pa.Table], store: Store, folder: str, *, columns: Columns, sub_batch_size: int
) -> CuratedFile:
    """Put the rows of whole sub-batches in order and write them as one file named by its hash.

    Args:
        pieces: as `chosen_rows` gives them; together whole consecutive sub-batches.
        store: the root.
        folder: the round's.
        columns: of the pool.
        sub_batch_size: b.
    """
    table = pa.concat_tables(pieces)
    added = table[ADDED_COLUMN].combine_chunks()
    order = (
        pc.sort_indices(
            pa.table({"sub_batch": added.field("sub_batch"), "position": added.field("position")}),
            sort_keys=[("sub_batch", "ascending"), ("position", "ascending")],
        )
        .to_numpy()
        .astype(np.int64)
    )
    numbers = pc.unique(added.field("sub_batch")).to_pylist()
    assert len(order) == len(numbers) * sub_batch_size, (len(order), numbers, sub_batch_size)
    rows = row_group_rows(sub_batch_size)
    with store.local_scratch() as scratch:
        path = Path(scratch) / "curated.parquet"
        batches = table.to_batches()
        with pq.ParquetWriter(path, table.schema, **_layout(table.schema, columns), **CHECKED) as writer:
            for start in range(0, len(order), sub_batch_size):
                sub_batch = order[start : start + sub_batch_size]
                for group in range(0, sub_batch_size, rows):
                    writer.write_table(_take(batches, sub_batch[group : group + rows]), row_group_size=rows)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        record = CuratedFile(
            name=f"curated-{sha256}.parquet",
            sha256=sha256,
            size=path.stat().st_size,
            rows=len(order),
            first_sub_batch=min(numbers),
            sub_batches=len(numbers),
        )
        store.put_file(path, f"{folder}/{record.name}")
    return record


def written_name(steps: str, number: int) -> str:
    """Name of the record that says that file `number` of a round is in place."""
    return f"{steps}/written-{number:06d}.json"


def record_written(store: Store, name: str, file: CuratedFile) -> None:
    """Remember a written file, so that a rerun need not write it again."""
    store.put_bytes(name, seal(asdict(file)))


def read_written(store: Store, name: str) -> CuratedFile:
    """The inverse of `record_written`."""
    return CuratedFile(**unseal(store.read_bytes(name), name))


def _layout(schema: pa.Schema, columns: Columns) -> dict[str, object]:
    """Images are compressed already: stored as they are they read four times faster, each contiguous in the file."""
    image = columns.image
    leaf = None
    if image in schema.names:
        leaf = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    leaves = [name for name in _leaves(schema) if name != leaf]
    return {
        "compression": ({leaf: "none"} if leaf else {}) | dict.fromkeys(leaves, "zstd"),
        "use_dictionary": leaves,
        "write_statistics": leaves,
    }


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the leaf columns."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _take(batches: Sequence[pa.RecordBatch], order: npt.NDArray[np.int64]) -> pa.Table:
    """Rows at these positions of the joined batches, in this order.

    `Table.take` would join all batches first, copying every image of the file once per row group.
    """
    positions = np.sort(order)
    bounds = np.cumsum([0, *(batch.num_rows for batch in batches)])
    numbers = np.searchsorted(bounds, positions, side="right") - 1
    parts = [
        batches[number].take(pa.array(positions[numbers == number] - bounds[number])) for number in np.unique(numbers)
    ]
    small = pa.Table.from_batches(parts).combine_chunks()
    return small.take(pa.array(np.searchsorted(positions, order)))


def _with_added(
    rows: pa.RecordBatch, picks: pa.Table, *, shard: Shard, columns: Columns, schema: pa.Schema, round_number: int
) -> pa.Table:
    """The chosen rows of one batch in the schema of curated files, checked against what was embedded."""
    expected = np.stack([picks["content_low"].to_numpy(), picks["content_high"].to_numpy()], axis=1).tobytes()
    contents = [expected[at : at + CONTENT_BYTES] for at in range(0, len(expected), CONTENT_BYTES)]
    if columns.image in schema.names:
        _check_contents(rows, picks, contents, shard=shard, columns=columns)
    added = {
        "round": np.full(len(picks), round_number),
        "uid": uids_of(rows, columns, contents),
        "source_shard": [shard.name] * len(picks),
        "source_row": picks["row"].combine_chunks(),
        "content": contents,
    } | {name: picks[name].combine_chunks() for name in picks.column_names if ADDED_TYPE.get_field_index(name) >= 0}
    kind = schema.field(ADDED_COLUMN).type
    fields = [pa.array(added[field.name]).cast(field.type) for field in kind]
    own = [
        rows.column(field.name).cast(field.type)
        if field.name in rows.schema.names
        else pa.nulls(len(picks), field.type)
        for field in schema
        if field.name != ADDED_COLUMN
    ]
    return pa.Table.from_arrays([*own, pa.StructArray.from_arrays(fields, fields=list(kind))], schema=schema)


def _check_contents(
    rows: pa.RecordBatch, picks: pa.Table, contents: Sequence[bytes], *, shard: Shard, columns: Columns
) -> None:
    images = image_bytes(rows.column(columns.image)).to_pylist()
    captions = caption_bytes(rows.column(columns.caption)).to_pylist()
    for place, (image, caption, expected) in enumerate(zip(images, captions, contents, strict=True)):
        if content_hash(image, caption) != expected:
            raise InputChangedError(
                f"{shard.path}: row {picks['row'][place]} is not the pair that was embedded; the shard changed but "
                "kept its size and date: touch the shard, and delete the round's folder to begin it anew"
            )
