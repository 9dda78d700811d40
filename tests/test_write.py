"""Curated files: the chosen rows as they came in, in the order drawn, in plain Parquet that anybody opens."""

import hashlib
import io
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curate.errors import InputChangedError
from curate.jobs.drawn_pool import draw_pair
from curate.pool.shards import ADDED_COLUMN, Pool, Shard
from curate.rounds.manifest import CuratedFile
from curate.rounds.write import (
    ADDED_TYPE,
    chosen_rows,
    curated_schema,
    read_written,
    record_written,
    row_group_rows,
    write_curated,
    written_name,
)
from curate.storage import Store
from tests.helpers import drawn_pool, picks_of, pieces_of, pool_table, write_pool

FOLDER = "rounds/r000000"
HUGGING_FACE = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}


def places(pool: Pool, sub_batches: int, b: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    everywhere = [(shard.index, row) for shard in pool.shards for row in range(shard.rows)]
    drawn = [everywhere[i] for i in np.random.default_rng(seed).permutation(len(everywhere))[: sub_batches * b]]
    return [drawn[start : start + b] for start in range(0, len(drawn), b)]


def written(
    store: Store, pool: Pool, chosen: list[list[tuple[int, int]]], *, first: int = 0
) -> tuple[CuratedFile, pq.ParquetFile]:
    pieces = pieces_of(pool, picks_of(pool, chosen, first))
    file = write_curated(pieces, store, FOLDER, columns=pool.columns, sub_batch_size=len(chosen[0]))
    return file, pq.ParquetFile(path_of(store, file))


def chosen(pool: Pool, shard: Shard, picks: pa.Table) -> pa.Table:
    return chosen_rows(shard, picks, columns=pool.columns, schema=curated_schema(pool), round_number=0)


def path_of(store: Store, file: CuratedFile) -> Path:
    path = store.local_path(f"{FOLDER}/{file.name}")
    assert path is not None
    return path


def rich_pool(folder: Path, *, rows: int = 24, image: str = "jpg", without: tuple[str, ...] = ()) -> Pool:
    """Two shards with columns of every kind; `license` is in the second one only."""
    pairs = [draw_pair(0, row, image_size=32) for row in range(rows)]
    images: list[Any] = [jpg for jpg, _ in pairs]
    if image == "image":
        images = [{"bytes": jpg, "path": f"{i}.jpg" if i % 2 else None} for i, jpg in enumerate(images)]
    table = pa.table(
        {
            "tags": [[f"t{j}" for j in range(i % 4)] if i % 5 else None for i in range(rows)],
            image: images,
            "caption": [caption for _, caption in pairs],
            "nested": [{"a": {"b": [i, None]}, "c": None if i % 3 else "ü"} for i in range(rows)],
            "boxes": [[[i, 1.5], []] for i in range(rows)],
            "map": pa.array([[("k", i)] for i in range(rows)], pa.map_(pa.string(), pa.int32())),
            "when": pa.array(range(rows), pa.timestamp("us", tz="UTC")),
            "flag": [None if i % 7 == 0 else bool(i % 2) for i in range(rows)],
            "nothing": pa.nulls(rows),
            "a.b c/ü": range(rows),
            "half": pa.array(np.arange(rows, dtype=np.float16)),
            "word": pa.array([f"w{i % 3}" for i in range(rows)]).dictionary_encode(),
            "thumb": [b"\0" * i for i in range(rows)],
        }
    )
    table = table.drop_columns(list(without))
    first, second = table.slice(0, rows // 2), table.slice(rows // 2)
    second = second.append_column("license", pa.array(["cc"] * (rows - rows // 2)))
    return write_pool(folder, first, second)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["jpg", "image"])
def test_every_column_of_the_user_comes_through(store: Store, tmp_path: Path, image: str):
    pool = rich_pool(tmp_path / "pool", image=image)
    chosen = places(pool, 3, 6)
    file, parquet = written(store, pool, chosen)
    table = parquet.read()
    assert table.column_names == [*pool.schema.names, ADDED_COLUMN]
    source = pool_table(pool).to_pylist()
    expected = [source[shard * 12 + row] for sub_batch in chosen for shard, row in sub_batch]
    assert table.drop_columns(ADDED_COLUMN).to_pylist() == expected
    assert {row["license"] for row in expected} == {None, "cc"}
    for name in pool.schema.names:
        kept = table.schema.field(name).type
        assert kept == (pa.large_binary() if name == "jpg" else pool.schema.field(name).type)
    assert file.rows == 18


def test_images_are_byte_for_byte_those_of_the_pool(store: Store, tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=90, shards=3)
    chosen = places(pool, 4, 15)
    _, parquet = written(store, pool, chosen)
    source = pool_table(pool)
    rows = [shard * 30 + row for sub_batch in chosen for shard, row in sub_batch]
    assert parquet.read(["jpg"])["jpg"].to_pylist() == source["jpg"].take(pa.array(rows)).to_pylist()
    assert len({bytes(jpg) for jpg in source["jpg"].to_pylist()}) == 90


def test_each_row_says_why_it_is_here_and_whence(store: Store, tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=40, shards=2)
    chosen = places(pool, 2, 10)
    picks = picks_of(pool, chosen, first=6)
    pieces = pieces_of(pool, picks, round_number=3)
    file = write_curated(pieces, store, FOLDER, columns=pool.columns, sub_batch_size=10)
    assert (file.first_sub_batch, file.sub_batches, file.rows) == (6, 2, 20)
    table = pq.read_table(path_of(store, file))
    assert table.schema.field(ADDED_COLUMN).type == ADDED_TYPE
    added = table[ADDED_COLUMN].to_pylist()
    for row, pick, (shard, place) in zip(added, picks.to_pylist(), chain(*chosen), strict=True):
        assert row == {
            "round": 3,
            "uid": f"{shard:05d}{place:04d}",
            "source_shard": f"{shard:05d}.parquet",
            "source_row": place,
            **{name: pick[name] for name in ("sub_batch", "position", "chunk", "score")},
            **{name: pick[name] for name in ("learner_loss", "reference_loss")},
        }
    assert [row["uid"] for row in added] == table["key"].to_pylist()


def test_without_a_uid_column_the_content_names_the_pair(store: Store, tmp_path: Path):
    from curate.embed.files import content_hash

    pool = rich_pool(tmp_path / "pool")
    _, parquet = written(store, pool, places(pool, 1, 8))
    for row in parquet.read().to_pylist():
        assert row[ADDED_COLUMN]["uid"] == content_hash(row["jpg"], row["caption"].encode()).hex()


def test_a_shard_with_no_pick_in_a_stretch_of_it(store: Store, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("curate.rounds.write.READ_ROWS", 4)
    pool = drawn_pool(tmp_path / "pool", rows=40)
    chosen = [[(0, row) for row in (37, 3, 20, 4, 39, 0)]]
    _, parquet = written(store, pool, chosen)
    assert [row["source_row"] for row in parquet.read()[ADDED_COLUMN].to_pylist()] == [37, 3, 20, 4, 39, 0]


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 6, 64, 100, 127, 128, 192, 384, 509, 1009])
def test_a_sub_batch_is_a_whole_number_of_row_groups(store: Store, tmp_path: Path, b: int):
    pool = drawn_pool(tmp_path / "pool", rows=2 * b, image_size=8)
    _, parquet = written(store, pool, places(pool, 2, b))
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    rows = row_group_rows(b)
    assert sizes == 2 * ([rows] * (b // rows) + [b % rows] * bool(b % rows))
    assert min(b, 32) <= rows <= 256


def test_row_groups_suit_any_sub_batch():
    for b in range(1, 40_000, 7):
        rows = row_group_rows(b)
        assert min(b, 32) <= rows <= 256, b
        if any(b % wanted == 0 for wanted in range(64, max(64, min(256, b // 8)) + 1)):
            assert b % rows == 0
            assert rows >= 64


@pytest.mark.parametrize("image", ["jpg", "image"])
def test_images_are_plain_and_the_rest_is_compressed(store: Store, tmp_path: Path, image: str):
    pool = rich_pool(tmp_path / "pool", image=image)
    file, parquet = written(store, pool, places(pool, 3, 6))
    leaf = "image.bytes" if image == "image" else "jpg"
    leaves = set()
    data = path_of(store, file).read_bytes()
    for group in range(parquet.metadata.num_row_groups):
        for i in range(parquet.metadata.num_columns):
            column = parquet.metadata.row_group(group).column(i)
            leaves.add(column.path_in_schema)
            if column.path_in_schema == leaf:
                assert column.compression == "UNCOMPRESSED"
                assert set(column.encodings) <= {"PLAIN", "RLE"}
                assert not column.has_dictionary_page
                assert column.statistics is None
                # Each image lies in one piece in the file, at a place that its index tells.
                chunk = data[column.data_page_offset :][: column.total_compressed_size]
                for picture in parquet.read_row_group(group)[image].to_pylist():
                    assert (picture["bytes"] if image == "image" else picture) in chunk
            else:
                assert column.compression == "ZSTD", column.path_in_schema
    assert leaf in leaves
    assert {"nested.a.b.list.element", "tags.list.element", "thumb", "a.b c/ü", "curate.uid"} <= leaves


def test_the_file_is_named_by_its_content(store: Store, tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=40)
    file, _ = written(store, pool, places(pool, 2, 10))
    data = path_of(store, file).read_bytes()
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.name == f"curated-{file.sha256}.parquet"
    assert file.size == len(data)
    assert store.list(FOLDER) == [f"{FOLDER}/{file.name}"]
    assert not list(Path(store.url).glob(".tmp-*"))
    name = written_name(f"{FOLDER}/steps-0a", 4)
    assert name == f"{FOLDER}/steps-0a/written-000004.json"
    record_written(store, name, file)
    assert read_written(store, name) == file


def test_the_same_bytes_again_and_whatever_the_order_of_the_pieces(store: Store, tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=60, shards=3)
    picks = picks_of(pool, places(pool, 3, 12))
    pieces = pieces_of(pool, picks)
    assert len(pieces) == 3
    cut = [piece.slice(start, 5) for piece in pieces for start in range(0, piece.num_rows, 5)]
    shuffled = picks.take(pa.array(np.random.default_rng(1).permutation(picks.num_rows)))
    mixed = [piece.take(pa.array(np.arange(piece.num_rows)[::-1])) for piece in pieces]
    ways = [pieces, pieces, pieces[::-1], cut, cut[::-1], pieces_of(pool, shuffled), mixed]
    found = {write_curated(w, store, FOLDER, columns=pool.columns, sub_batch_size=12).sha256 for w in ways}
    assert len(found) == 1
    other = picks_of(pool, places(pool, 3, 12, seed=1))
    found.add(write_curated(pieces_of(pool, other), store, FOLDER, columns=pool.columns, sub_batch_size=12).sha256)
    assert len(found) == 2


def test_the_schema_says_what_the_pools_did(store: Store, tmp_path: Path):
    table = pa.table({"image": [{"bytes": draw_pair(0, 0)[0], "path": "x"}] * 4, "caption": list("abcd")})
    pool = write_pool(tmp_path / "pool", table.replace_schema_metadata(HUGGING_FACE | {"mine": "kept"}))
    _, parquet = written(store, pool, [[(0, 0), (0, 3)]])
    assert parquet.schema_arrow.metadata[b"mine"] == b"kept"
    assert parquet.schema_arrow.metadata[b"huggingface"] == HUGGING_FACE["huggingface"].encode()


# --- a pool that changed -----------------------------------------------------------------------------------------


def test_a_row_that_changed_while_its_file_did_not(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("curate.rounds.write.READ_ROWS", 8)
    pool = drawn_pool(tmp_path / "pool", rows=30)
    picks = picks_of(pool, [[(0, row) for row in (29, 3, 12, 17)]])
    table = pq.read_table(pool.shards[0].path)
    captions = table["caption"].to_pylist()
    captions[12] = captions[12].upper()
    changed = table.set_column(table.column_names.index("caption"), "caption", pa.array(captions))
    pq.write_table(changed, pool.shards[0].path)
    with pytest.raises(InputChangedError, match=r"expected \d+ bytes"):
        chosen(pool, pool.shards[0], picks)
    path = Path(pool.shards[0].path)
    now = {"size": path.stat().st_size, "version": str(path.stat().st_mtime_ns)}
    disguised = Shard(**pool.shards[0].__dict__ | now)
    with pytest.raises(InputChangedError, match=re.escape(f"{path}: row 12 is not the pair that was embedded")):
        chosen(pool, disguised, picks)
    kept = picks.filter(pc.not_equal(picks["row"], 12))
    assert chosen(pool, disguised, kept).num_rows == 3


# --- who opens it ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return str(tmp_path / "cache")


def load(path: Path, cache: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=[str(path)], split="train", cache_dir=cache)


def test_hugging_face_datasets_show_a_plain_column_after_one_cast(store: Store, tmp_path: Path, offline: str):
    import datasets

    pool = rich_pool(tmp_path / "pool", without=("map",))  # which datasets have no word for
    file, parquet = written(store, pool, places(pool, 2, 6))
    rows = parquet.read().to_pylist()
    data = load(path_of(store, file), offline).cast_column("jpg", datasets.Image())
    assert len(data) == 12
    for found, row in zip(data, rows, strict=True):
        assert found["jpg"].tobytes() == Image.open(io.BytesIO(row["jpg"])).tobytes()
        assert found["caption"] == row["caption"]
        assert found["tags"] == row["tags"]
        assert found["license"] == row["license"]
        assert found["curate"]["sub_batch"] == row["curate"]["sub_batch"]
    assert data["curate"][7]["position"] == 1


def test_hugging_face_datasets_show_their_own_images_at_once(store: Store, tmp_path: Path, offline: str):
    import datasets

    jpgs = [draw_pair(0, row, image_size=32)[0] for row in range(6)]
    source = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpg, "path": None} for jpg in jpgs], "caption": list("abcdef"), "mine": [[1.5]] * 6}
    ).cast_column("image", datasets.Image())
    (tmp_path / "pool").mkdir()
    source.to_parquet(str(tmp_path / "pool" / "a.parquet"))
    from curate.pool.inventory import take_inventory
    from curate.recipe import PoolSection

    pool = take_inventory(PoolSection(path=str(tmp_path / "pool")))
    file, _ = written(store, pool, [[(0, 4), (0, 1)], [(0, 0), (0, 5)]])
    data = load(path_of(store, file), offline)
    assert isinstance(data.features["image"], datasets.Image)
    assert data["caption"][:] == ["e", "b", "a", "f"]
    assert data["mine"][0] == [1.5]
    assert data[1]["curate"]["source_row"] == 1
    for found, number in zip(data["image"], (4, 1, 0, 5), strict=True):
        assert found.tobytes() == Image.open(io.BytesIO(jpgs[number])).tobytes()


@pytest.mark.parametrize("image", ["jpg", "image"])
def test_duckdb_opens_it(store: Store, tmp_path: Path, image: str):
    import duckdb

    pool = rich_pool(tmp_path / "pool", image=image)
    file, parquet = written(store, pool, places(pool, 3, 6))
    rows = parquet.read().to_pylist()
    data = f"{image}.bytes" if image == "image" else image
    with duckdb.connect() as connection:
        found = connection.execute(
            f'select {data}, caption, tags, nested.a.b[1], "a.b c/ü", license, curate.sub_batch, curate.uid '
            "from read_parquet(?) order by curate.sub_batch, curate.position",
            [str(path_of(store, file))],
        ).fetchall()
        (counted,) = connection.execute(
            "select count(*) from read_parquet(?) where curate.sub_batch = 1", [str(path_of(store, file))]
        ).fetchone()
    assert counted == 6
    assert found == [
        (
            row[image]["bytes"] if image == "image" else row[image],
            row["caption"],
            row["tags"],
            row["nested"]["a"]["b"][0],
            row["a.b c/ü"],
            row["license"],
            row["curate"]["sub_batch"],
            row["curate"]["uid"],
        )
        for row in rows
    ]


def test_pandas_and_plain_pyarrow_open_it(store: Store, tmp_path: Path):
    import pandas as pd
    import pyarrow.dataset

    pool = rich_pool(tmp_path / "pool")
    file, parquet = written(store, pool, places(pool, 2, 6))
    rows = parquet.read().to_pylist()
    frame = pd.read_parquet(path_of(store, file))
    assert frame["jpg"].tolist() == [row["jpg"] for row in rows]
    assert frame["caption"].tolist() == [row["caption"] for row in rows]
    assert [row["uid"] for row in frame["curate"]] == [row["curate"]["uid"] for row in rows]
    dataset = pyarrow.dataset.dataset(path_of(store, file))
    some = dataset.to_table(["caption"], filter=pc.field("curate", "sub_batch") == 1)
    assert some["caption"].to_pylist() == [row["caption"] for row in rows[6:]]


def test_a_frame_of_pandas_as_pool(store: Store, tmp_path: Path):
    import pandas as pd

    (tmp_path / "pool").mkdir()
    jpgs = [draw_pair(0, row, image_size=32)[0] for row in range(8)]
    frame = pd.DataFrame({"jpg": jpgs, "caption": list("abcdefgh"), "n": range(8)}, index=list("ABCDEFGH"))
    frame.iloc[:8:2].to_parquet(tmp_path / "pool" / "a.parquet")
    frame.iloc[1:8:2].to_parquet(tmp_path / "pool" / "b.parquet")
    from curate.pool.inventory import take_inventory
    from curate.recipe import PoolSection

    pool = take_inventory(PoolSection(path=str(tmp_path / "pool")))
    file, _ = written(store, pool, [[(1, 0), (0, 3)], [(0, 1), (1, 1)]])
    found = pd.read_parquet(path_of(store, file))
    assert found["n"].tolist() == [1, 6, 2, 3]
    assert found.index.tolist() == ["B", "G", "C", "D"]
