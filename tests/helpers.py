"""Small worlds to test in: a tiny model, a drawn pool, and committed rounds made without Ray."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.embed.files import content_hash, embedding_name, embedding_schema, pair_hashes
from curate.jobs.drawn_pool import draw_pool
from curate.models.encoder import store_encoder
from curate.models.spec import EncoderSpec
from curate.pool.columns import Columns
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes
from curate.recipe import LearnerSection, PoolSection
from curate.rounds.manifest import Manifest, commit, read_manifest, round_folder
from curate.rounds.write import chosen_rows, curated_schema, write_curated
from curate.select.files import SELECTED_SCHEMA
from curate.storage import Store
from curate.tally import Tally

CPU = torch.device("cpu")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """An open_clip model configuration with 0.8 million weights, nearly all of them the vocabulary."""
    config: dict[str, Any] = {
        "embed_dim": 16,
        "init_logit_scale": 2.302585,
        "init_logit_bias": -10,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def write_tiny(folder: Path, name: str = "tiny.json", **changes: Any) -> LearnerSection:
    """Write a tiny configuration; returns the section that names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(tiny_config(**changes)))
    return LearnerSection(model=name)


def tiny_encoder(store: Store, folder: Path, *, seed: int = 0, **changes: Any) -> EncoderSpec:
    """Store a tiny model with random weights in a root."""
    section = write_tiny(folder, **changes)
    return store_encoder(store, section, role="reference", base=folder, seed=seed)


def drawn_pool(folder: Path, *, rows: int, shards: int = 1, seed: int = 0, **how: Any) -> Pool:
    """Draw a pool of 32 × 32 pictures and take its inventory."""
    draw_pool(folder, rows=rows, shards=shards, seed=seed, **{"image_size": 32} | how)
    return take_inventory(PoolSection(path=str(folder), uid="key"))


def write_pool(folder: Path, *tables: pa.Table, uid: str | None = None, **section: Any) -> Pool:
    """Write tables as the shards of a pool and take its inventory."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number:05d}.parquet")
    return take_inventory(PoolSection(path=str(folder), uid=uid, **section))


def damage_page(path: Path, column: str, row_group: int = 0) -> None:
    """Overwrite the first page of a column of a Parquet file; its footer stays sound."""
    group = pq.read_metadata(path).row_group(row_group)
    (chunk,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(column)]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)


def _halved(vector: Any) -> list[np.float16] | None:
    return None if vector is None else list(np.asarray(vector, np.float16))


def embedded_pool(
    store: Store,
    spec: EncoderSpec,
    shards: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Pool:
    """A pool that consists of its embedding files alone: rows by name of shard.

    A row has `zimg`, and may have `ztxt` (else the same), `image` and `caption` (bytes, else its own), `status`, `size`
    and `uid`.
    """
    columns = Columns(image="jpg", caption="caption", uid=None)
    made = []
    for index, (name, rows) in enumerate(sorted(shards.items())):
        shard = Shard(index=index, name=name, path=name, size=1, version="1", rows=len(rows), columns=columns)
        made.append(shard)
        table = []
        for number, row in enumerate(rows):
            picture, content = pair_hashes(
                row.get("image", f"{name}/{number}".encode()), row.get("caption", f"{name}/{number}".encode())
            )
            width, height = row.get("size", (32, 32))
            table.append(
                {
                    "uid": row.get("uid", content.hex()),
                    "status": row.get("status", "ok"),
                    "content": content,
                    "picture": picture,
                    "width": width,
                    "height": height,
                    "zimg": _halved(row["zimg"]),
                    "ztxt": _halved(row.get("ztxt", row["zimg"])),
                }
            )
        with store.local_scratch() as scratch:
            pq.write_table(pa.Table.from_pylist(table, embedding_schema(spec.embed_dim)), scratch / "e.parquet")
            store.put_file(scratch / "e.parquet", embedding_name(spec.sha, shard))
    return Pool(shards=tuple(made), columns=columns, schema=pa.schema([]), ignored=(), skipped=())


def pool_table(pool: Pool) -> pa.Table:
    """All rows of a pool, shard after shard."""
    return pa.concat_tables([pq.read_table(shard.path) for shard in pool.shards], promote_options="permissive")


def picks_of(pool: Pool, sub_batches: Sequence[Sequence[tuple[int, int]]], first: int = 0) -> pa.Table:
    """What selection would say if it had chosen, for each sub-batch, these (shard, row) in this order."""
    tables = {shard.index: pq.read_table(shard.path) for shard in pool.shards}
    records = []
    for number, chosen in enumerate(sub_batches, first):
        for position, (shard, row) in enumerate(chosen):
            one = tables[shard].slice(row, 1).combine_chunks()
            image = image_bytes(one[pool.columns.image].chunk(0))[0].as_py()
            caption = caption_bytes(one[pool.columns.caption].chunk(0))[0].as_py()
            low, high = np.frombuffer(content_hash(image, caption), "<u8").tolist()
            records.append(
                {
                    "sub_batch": number,
                    "position": position,
                    "chunk": position % 4,
                    "score": position / 8,
                    "learner_loss": None,
                    "reference_loss": 0.5,
                    "shard": shard,
                    "row": row,
                    "content_low": low,
                    "content_high": high,
                }
            )
    return pa.Table.from_pylist(records, SELECTED_SCHEMA)


def pieces_of(pool: Pool, picks: pa.Table, round_number: int = 0) -> list[pa.Table]:
    """The chosen rows of each shard, as the round's tasks pass them on."""
    shards = picks["shard"].to_numpy()
    here = [(shard, np.flatnonzero(shards == shard.index)) for shard in pool.shards]
    how = {"columns": pool.columns, "schema": curated_schema(pool), "round_number": round_number}
    return [chosen_rows(shard, picks.take(pa.array(rows)), **how) for shard, rows in here if len(rows)]


def commit_round(
    store: Store,
    pool: Pool,
    sub_batches: Sequence[Sequence[tuple[int, int]]],
    *,
    number: int,
    per_file: int = 2,
    learner: int | None = None,
) -> Manifest:
    """Write and commit a round of these sub-batches of (shard, row), `per_file` of them in each curated file."""
    b = len(sub_batches[0])
    files = [
        write_curated(
            pieces_of(pool, picks_of(pool, sub_batches[first : first + per_file], first), number),
            store,
            round_folder(number),
            columns=pool.columns,
            sub_batch_size=b,
        )
        for first in range(0, len(sub_batches), per_file)
    ]
    parent = read_manifest(store, number - 1) if number else None
    kept = b * len(sub_batches)
    manifest = Manifest(
        round=number,
        parent=parent[1] if parent else None,
        first_batch=parent[0].stop_batch if parent else 0,
        sub_batch_size=b,
        sub_batches=len(sub_batches),
        columns=pool.columns.__dict__,
        files=tuple(files),
        pool_rows=pool.rows,
        tallies=(Tally(step="select", rows_in=pool.rows, kept=kept, dropped={"not_selected": pool.rows - kept}),),
        learnability=(None,) * len(sub_batches),
        uniform_learnability=(None,) * len(sub_batches),
        reference_loss=(0.5,) * len(sub_batches),
        quality={
            "learner": learner,
            "staleness_batches": None,
            "rank_correlation": None,
            "trained": [],
            "chosen_again": 0.0,
            "unique_examples": kept,
        },
        lineage={"made": "by a test", "recipe": {"selection": {"method": "joint", "criterion": "easy_reference"}}},
    )
    commit(store, manifest)
    return manifest


def commit_rounds(
    store: Store, pool: Pool, *, rounds: int, sub_batches: int, b: int, seed: int = 0, per_file: int = 2
) -> list[list[tuple[int, int]]]:
    """Commit rounds of rows drawn at random; returns the (shard, row) of every batch in order."""
    places = [(shard.index, row) for shard in pool.shards for row in range(shard.rows)]
    rng = np.random.default_rng(seed)
    batches: list[list[tuple[int, int]]] = []
    for number in range(rounds):
        drawn = [places[i] for i in rng.permutation(len(places))[: sub_batches * b]]
        cut = [drawn[start : start + b] for start in range(0, len(drawn), b)]
        commit_round(store, pool, cut, number=number, per_file=per_file)
        batches += cut
    return batches
