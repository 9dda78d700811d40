"""Embeddings that travel: a reference's, out of one root and into another whose pool holds the same files elsewhere.

An export is a folder or `s3://bucket/prefix`:

    embeddings.json     the encoder (model, preprocessing, precision, as its sha has them), and the shards
    embeddings/…        embedding files, as they lie in a root: see `curate.embed.files`

A shard is known again by its name, size and rows, and by what its columns mean. Before its embeddings are taken over
some of its pairs are hashed, and compared with what was embedded.
"""

from collections.abc import Iterator
from typing import Any

from curate.embed.files import CONTENT_BYTES, check_schema, content_hash, damage_of, embedding_name
from curate.errors import DamagedError, UserError
from curate.models.spec import EncoderSpec
from curate.parquet import open_table
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes, load_pool, read_rows, spread
from curate.rounds.committed import newest_round
from curate.sealed import seal, unseal
from curate.storage import Store

RECORD = "embeddings.json"
SAMPLED_ROWS = 8
"""Of each shard, whose pairs are hashed."""


def export_embeddings(store: Store, target: Store, pool: Pool, encoder: EncoderSpec) -> Iterator[Shard]:
    """Copy the embeddings of a pool's shards by an encoder, as `shards_of` has the two.

    Yields:
        Each shard whose embeddings are in place.
    """
    shards = []
    for shard in pool.shards:
        # Of a shard that could not be read nothing is known that another root could be held against.
        if not damage_of(store, [shard], encoder.sha):
            name = embedding_name(encoder.sha, shard)
            if not target.exists(name):
                target.put_bytes(name, store.read_bytes(name))
            shards.append({"file": name, "name": shard.name, "size": shard.size, "rows": shard.rows})
        yield shard
    record = {"encoder": encoder.to_json() | {"sha": encoder.sha}, "columns": _meaning(pool), "shards": shards}
    target.put_bytes(RECORD, seal(record))


def shards_of(store: Store) -> tuple[EncoderSpec, Pool]:
    """The reference and the pool of the newest round.

    Raises:
        UserError: no round is committed.
    """
    lineage = newest_round(store).lineage
    return EncoderSpec(**lineage["reference"]), load_pool(store, lineage["pool"]["fingerprint"])


def import_embeddings(source: Store, store: Store, pool: Pool, encoder: EncoderSpec) -> Iterator[tuple[Shard, bool]]:
    """Take over the embeddings of a pool's shards, where an export has them.

    Args:
        source: the export.
        store: the root.
        pool: its pool.
        encoder: its reference.

    Yields:
        Each shard, and whether its embeddings are in the root now.

    Raises:
        UserError: the export is of another encoder or other columns, or a pair is not the one that was embedded.
        DamagedError: a file of the export is not what was written.
    """
    record = _read_record(source)
    theirs = record["encoder"]
    if theirs["sha"] != encoder.sha:
        ours = encoder.to_json() | {"sha": encoder.sha}
        apart = [f"{key} {theirs.get(key)!r}, not {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
        raise UserError(
            f"{source.url}: expected embeddings by the recipe's reference, found others ({', '.join(apart)}); name "
            "that one in [reference], or embed anew"
        )
    if record["columns"] != _meaning(pool):
        raise UserError(
            f"{source.url}: expected columns {_meaning(pool)}, as the recipe has them, found "
            f"{record['columns']}; name the same in [pool]"
        )
    known = {(one["name"], one["size"], one["rows"]): one["file"] for one in record["shards"]}
    for shard in pool.shards:
        file = known.get((shard.name, shard.size, shard.rows))
        target = embedding_name(encoder.sha, shard)
        if file is not None and not store.exists(target):
            _check_pairs(source, file, shard)
            store.put_bytes(target, source.read_bytes(file))
        yield shard, file is not None


def _meaning(pool: Pool) -> dict[str, Any]:
    """What its columns mean; not where pictures lie that it only names, which may be elsewhere."""
    return {name: value for name, value in pool.columns.identity().items() if name != "images"}


def _read_record(source: Store) -> dict[str, Any]:
    try:
        return unseal(source.read_bytes(RECORD), f"{source.url}/{RECORD}")
    except FileNotFoundError:
        raise UserError(
            f"{source.url}: expected {RECORD}, as curate embeddings export leaves it, found none; correct the folder"
        ) from None


def _check_pairs(source: Store, file: str, shard: Shard) -> None:
    """Hold some pairs of a shard against what was embedded: an export of other pictures must not pass for its own."""
    with open_table(source, file) as parquet:
        check_schema(file, parquet.schema_arrow)
        table = parquet.read(columns=["content", "status"])
    if len(table) != shard.rows:
        raise DamagedError(file, f"{len(table)} rows of {shard.rows}")
    contents = table["content"].to_pylist()
    read = [row for row, content in enumerate(contents) if content != bytes(CONTENT_BYTES)]
    rows = [read[at] for at in spread(len(read), SAMPLED_ROWS)]
    columns = shard.columns
    pairs = read_rows(shard, rows, [columns.image, columns.caption])
    images = image_bytes(pairs[columns.image].combine_chunks()).to_pylist()
    captions = caption_bytes(pairs[columns.caption].combine_chunks()).to_pylist()
    for row, image, caption in zip(rows, images, captions, strict=True):
        if content_hash(image, caption) != contents[row]:
            raise UserError(
                f"{shard.path}: row {row} is not the pair that was embedded in {source.url}, though name and size are "
                "the same; import from an export of this pool"
            )
