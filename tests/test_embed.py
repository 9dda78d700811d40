"""One row out per row in, in order, with the status it deserves; the same bytes however the work was cut."""

import hashlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import curate.models.crop
from curate.embed.files import (
    DAMAGED_SHARD,
    EMBEDDING_NONFINITE,
    EMBEDDING_ZERO,
    content_hash,
    contents,
    embedding_name,
    read_embeddings,
    vectors,
)
from curate.embed.run import embed_shard
from curate.embed.shard import embed_damaged
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.jobs.drawn_pool import draw_pair
from curate.models.encoder import Encoder, load_encoder
from curate.models.spec import WEIGHTS_NAME
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.recipe import EmbedSection, PoolSection, ResourcesSection
from curate.storage import Store
from tests.helpers import CPU, damage_page, drawn_pool, tiny_encoder, write_pool

torch.set_num_threads(1)

KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "binary_view": pa.binary_view(),
}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return drawn_pool(tmp_path / "pool", rows=120, shards=2, broken_share=0.2, duplicate_share=0.1)


def embedded(
    store: Store, pool: Pool, encoder: Encoder, *, shard: int = 0, name: str = "embeddings/x", **how: Any
) -> pa.Table:
    """The embedding file of one shard; `how` is threads, rows, or sizes."""
    sizes = {key: how.pop(key) for key in ("batch_size", "chunk_rows") if key in how}
    embed_shard(pool.shards[shard], {name: encoder}, store, EmbedSection(**sizes), **how)
    with store.open_input(name) as file:
        return pq.read_table(file)


def one_row(jpg: Any = None, caption: Any = "a red circle", **other: Any) -> dict[str, Any]:
    return {"jpg": draw_pair(0, 0, image_size=32)[0] if jpg is None else jpg, "caption": caption, **other}


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"chunk_rows": 7}, {"chunk_rows": 1}, {"batch_size": 3, "chunk_rows": 16}])
def test_one_row_per_row_with_the_status_that_the_truth_demands(store: Store, pool: Pool, encoder: Encoder, sizes):
    for shard in pool.shards:
        truth = pq.read_table(shard.path).to_pylist()
        name = embedding_name(encoder.spec.sha, shard)
        counts = embed_shard(shard, {name: encoder}, store, EmbedSection(**sizes))
        table = read_embeddings(store, name, ["uid", "status", "error", "content", "zimg", "ztxt"])
        assert table["uid"].to_pylist() == [row["key"] for row in truth]
        statuses = [row["broken"] or "ok" for row in truth]
        assert table["status"].to_pylist() == statuses
        assert counts == Counter(statuses)
        assert len(counts) >= 4
        assert table["content"].to_pylist() == [content_hash(row["jpg"], row["caption"].encode()) for row in truth]
        for row in table.to_pylist():
            ok = row["status"] == "ok"
            assert (row["zimg"] is not None) == (row["ztxt"] is not None) == (row["error"] is None) == ok
        for tower in ("zimg", "ztxt"):
            assert table[tower].type == pa.list_(pa.float16(), 16)
            found = vectors(table[tower], 16)
            assert found.dtype == np.float16
            assert found.shape == (shard.rows, 16)
            norms = np.linalg.norm(found.astype(np.float64), axis=1)
            ok = np.array(statuses) == "ok"
            np.testing.assert_allclose(norms[ok], 1, atol=2e-3)
            assert np.isnan(found[~ok]).all()


def test_the_vectors_are_those_of_their_own_row(store: Store, pool: Pool, encoder: Encoder):
    from curate.pool.images import decode_image

    table = embedded(store, pool, encoder, chunk_rows=16, batch_size=5)
    truth = pq.read_table(pool.shards[0].path).to_pylist()
    rows = [i for i, row in enumerate(truth) if not row["broken"]]
    pixels = np.stack([encoder.crop(decode_image(truth[i]["jpg"])) for i in rows])
    expected = encoder.encode(torch.from_numpy(pixels), encoder.tokenize([truth[i]["caption"] for i in rows]))
    for tower, z in zip(("zimg", "ztxt"), expected, strict=True):
        found = vectors(table[tower], 16)[rows].astype(np.float32)
        np.testing.assert_allclose(found, z.numpy(), atol=1e-3)
        assert np.abs(found - np.roll(z.numpy(), 1, 0)).max(1).min() > 0.01  # a neighbour's would be noticed


def test_contents_and_duplicates(store: Store, pool: Pool, encoder: Encoder):
    tables = [embedded(store, pool, encoder, shard=i) for i in range(2)]
    by_key = {key: c for t in tables for key, c in zip(t["uid"].to_pylist(), t["content"].to_pylist(), strict=True)}
    truth = [row for shard in pool.shards for row in pq.read_table(shard.path).to_pylist()]
    pairs = [(row["key"], row["duplicate_of"]) for row in truth if row["duplicate_of"]]
    assert len(pairs) == 12
    assert all(by_key[a] == by_key[b] for a, b in pairs)
    assert len(set(by_key.values())) == len({(row["jpg"], row["caption"]) for row in truth})
    halves = contents(pa.chunked_array([tables[0]["content"].chunk(0)] * 2))
    assert halves.shape == (120, 2)
    assert halves.tobytes() == b"".join(tables[0]["content"].to_pylist() * 2)
    assert contents(pa.chunked_array([], pa.binary(16))).shape == (0, 2)


def test_content_tells_image_and_caption_apart():
    assert content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    assert content_hash(b"", b"x") == content_hash(None, b"x")
    assert content_hash(b"x", b"") != content_hash(b"", b"x")


# --- columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "large_string", "int64", "uint8"])
def test_the_users_own_uid(store: Store, encoder: Encoder, tmp_path: Path, kind: str):
    ids = ["b/../a", None, "a"] if "string" in kind else [7, None, 0]
    rows = [one_row(caption=f"number {i}", id=id_) for i, id_ in enumerate(ids)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(2, "id", table["id"].cast(pa.type_for_alias(kind)))
    pool = write_pool(tmp_path / "pool", table, uid="id")
    assert embedded(store, pool, encoder)["uid"].to_pylist() == [None if i is None else str(i) for i in ids]


def test_without_a_uid_column_the_content_names_the_pair(store: Store, encoder: Encoder, tmp_path: Path):
    pool = write_pool(tmp_path / "pool", pa.Table.from_pylist([one_row(), one_row(caption="x"), one_row()]))
    table = embedded(store, pool, encoder)
    assert table["uid"].to_pylist() == [content.hex() for content in table["content"].to_pylist()]
    assert table["uid"][0] == table["uid"][2] != table["uid"][1]


def test_a_uid_that_is_not_utf8_does_not_take_its_shard_with_it(store: Store, encoder: Encoder, tmp_path: Path):
    table = pa.Table.from_pylist([one_row(), one_row(caption="b")])
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"fine"]).buffers())
    pool = write_pool(tmp_path / "pool", table.append_column("id", bad), uid="id")
    assert embedded(store, pool, encoder)["uid"].to_pylist() == ["��", "fine"]


def test_the_caption_may_be_the_uid(store: Store, encoder: Encoder, tmp_path: Path):
    pool = write_pool(tmp_path / "pool", pa.Table.from_pylist([one_row(), one_row(caption="b")]), uid="caption")
    assert embedded(store, pool, encoder)["uid"].to_pylist() == ["a red circle", "b"]


def test_an_image_column_of_hugging_face(store: Store, encoder: Encoder, tmp_path: Path):
    jpgs = [draw_pair(0, i, image_size=32)[0] for i in range(3)]
    plain = [{"image": jpg, "caption": "c"} for jpg in jpgs] + [{"image": None, "caption": "c"}] * 2
    images: list[Any] = [{"bytes": jpg, "path": "x.jpg"} for jpg in jpgs] + [{"bytes": None, "path": "y.jpg"}, None]
    struct = pa.Table.from_pylist([{"image": image, "caption": "c"} for image in images])
    a = embedded(store, write_pool(tmp_path / "plain", pa.Table.from_pylist(plain)), encoder)
    b = embedded(store, write_pool(tmp_path / "struct", struct), encoder, name="embeddings/y")
    assert a["status"].to_pylist() == ["ok"] * 3 + ["image_empty"] * 2
    assert b["status"].to_pylist() == ["ok"] * 3 + ["image_missing", "image_empty"]
    assert b["error"][3].as_py() == "y.jpg: expected a picture, found no such file"
    assert a.drop_columns(["status", "error"]).equals(b.drop_columns(["status", "error"]))


@pytest.mark.parametrize("kind", [*KINDS, "dictionary"])
def test_captions_of_every_kind(store: Store, encoder: Encoder, tmp_path: Path, kind: str):
    raw: list[bytes | None] = [b"fine", None, b"", b" \t\n", "grün ☃ 😀".encode(), b"nul\0nul", b"word " * 100_000]
    expected = ["ok", "caption_missing", "caption_empty", "caption_empty", "ok", "ok", "ok"]
    if kind == "dictionary":
        column = pa.array(raw).cast(pa.string()).dictionary_encode()
    else:
        raw, expected = [*raw, b"caf\xe9"], [*expected, "caption_encoding"]
        column = pa.array(raw, pa.large_binary()).cast(KINDS[kind], safe=False)
    jpg = one_row()["jpg"]
    pool = write_pool(tmp_path / "pool", pa.table({"jpg": [jpg] * len(raw), "caption": column}))
    table = embedded(store, pool, encoder)
    assert table["status"].to_pylist() == expected
    assert table["content"].to_pylist() == [content_hash(jpg, caption) for caption in raw]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_were_not_downloaded_say_why(store: Store, encoder: Encoder, tmp_path: Path, kind: str):
    jpg = one_row()["jpg"]
    rows = [  # image, img2dataset's status and error_message, what becomes of it
        (jpg, "success", None, "ok", None),
        (None, "failed_to_download", "HTTP Error 404: Not\n Found", "download_failed", "HTTP Error 404: Not Found"),
        (b"", "failed_to_resize", None, "download_failed", "failed_to_resize"),
        (jpg, "failed_to_download", "HTTP Error 404: Not Found", "ok", None),
        (None, "success", None, "image_empty", "null"),
        (None, None, "left over", "image_empty", "null"),
    ]
    raw = {name: [row[i] for row in rows] for i, name in ((1, "status"), (2, "error_message"))}
    said = {name: pa.array(texts, pa.string()).cast(KINDS[kind]) for name, texts in raw.items()}
    table = pa.table({"jpg": [row[0] for row in rows], "caption": list("abcdef"), **said})
    found = embedded(store, write_pool(tmp_path / "pool", table), encoder)
    assert found["status"].to_pylist() == [row[3] for row in rows]
    assert found["error"].to_pylist() == [row[4] for row in rows]


@pytest.mark.parametrize(
    "other", [{"status": ["active", "gone"]}, {"status": [200, 404], "error_message": ["a", "b"]}], ids=["text", "code"]
)
def test_a_status_of_something_else(store: Store, encoder: Encoder, tmp_path: Path, other: dict[str, Any]):
    table = pa.table({"jpg": [one_row()["jpg"], None], "caption": ["a", "b"], **other})
    assert embedded(store, write_pool(tmp_path / "pool", table), encoder)["status"].to_pylist() == ["ok", "image_empty"]


def test_a_column_of_nothing_but_nulls(store: Store, encoder: Encoder, tmp_path: Path):
    pool = write_pool(tmp_path / "pool", pa.table({"jpg": pa.nulls(2), "caption": pa.nulls(2)}))
    assert embedded(store, pool, encoder)["status"].to_pylist() == ["caption_missing"] * 2


# --- files -------------------------------------------------------------------------------------------------------


def digest(store: Store, name: str) -> str:
    return hashlib.sha256(store.read_bytes(name)).hexdigest()


def test_the_file_is_the_same_again_and_with_any_number_of_threads(store: Store, pool: Pool, encoder: Encoder):
    found = set()
    for threads in (0, 1, 1, 3, 50):
        embedded(store, pool, encoder, threads=threads, chunk_rows=13, batch_size=4)
        found.add(digest(store, "embeddings/x"))
    assert len(found) == 1


def test_a_shard_of_no_rows(store: Store, encoder: Encoder, tmp_path: Path):
    table = pa.Table.from_pylist([one_row()])
    pool = write_pool(tmp_path / "pool", table, table.slice(0, 0))
    assert [shard.rows for shard in pool.shards] == [1, 0]
    assert embed_shard(pool.shards[1], {"embeddings/x": encoder}, store, EmbedSection()) == {}
    found = read_embeddings(store, "embeddings/x", ["status", "content", "zimg"])
    assert found.num_rows == 0
    assert vectors(found["zimg"], 16).shape == (0, 16)
    assert contents(found["content"]).shape == (0, 2)
    assert found.schema == read_embeddings(store, "embeddings/x", ["status", "content", "zimg"]).schema


def test_empty_row_groups(store: Store, encoder: Encoder, tmp_path: Path):
    table = pa.Table.from_pylist([one_row(), one_row(caption="b")])
    (tmp_path / "pool").mkdir()
    with pq.ParquetWriter(tmp_path / "pool" / "0.parquet", table.schema) as writer:
        for piece in (table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1), table.slice(0, 0)):
            writer.write_table(piece)
    pool = take_inventory(PoolSection(path=str(tmp_path / "pool")))
    assert embedded(store, pool, encoder)["status"].to_pylist() == ["ok", "ok"]


def test_nothing_is_left_where_the_shard_changed(store: Store, pool: Pool, encoder: Encoder):
    path = Path(pool.shards[0].path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputChangedError, match=r"00000\.parquet"):
        embedded(store, pool, encoder)
    assert store.list("embeddings") == []
    assert list(Path(store.url).glob(".tmp-*")) == []


@pytest.mark.parametrize(("column", "uid"), [("jpg", "key"), ("jpg", None), ("caption", "key"), ("key", "key")])
def test_a_damaged_shard_has_a_row_for_each_of_its_rows(
    store: Store, encoder: Encoder, tmp_path: Path, column: str, uid: str | None
):
    drawn_pool(tmp_path / "pool", rows=80, shards=2)
    path = tmp_path / "pool" / "00001.parquet"
    keys = pq.read_table(path)["key"].to_pylist()
    pq.write_table(pq.read_table(path), path, row_group_size=15)
    damage_page(path, column, 1)
    pool = take_inventory(PoolSection(path=str(tmp_path / "pool"), uid=uid))
    shard = pool.shards[1]
    with pytest.raises(ShardDamagedError) as caught:
        embedded(store, pool, encoder, shard=1, chunk_rows=4)
    assert store.list("embeddings") == []
    assert list(Path(store.url).glob(".tmp-*")) == []
    assert embed_damaged(shard, {"embeddings/x": encoder}, store, caught.value) == {DAMAGED_SHARD: 40}
    table = read_embeddings(store, "embeddings/x", ["uid", "status", "error", "content", "picture", "zimg", "ztxt"])
    made_up = uid is None or column == uid
    assert table["uid"].to_pylist() == ([f"{shard.name}#{row}" for row in range(40)] if made_up else keys)
    assert set(table["status"].to_pylist()) == {DAMAGED_SHARD}
    (error,) = set(table["error"].to_pylist())
    assert error.startswith(f"a damaged page in column '{column}' after row 1")
    assert table["zimg"].null_count == table["ztxt"].null_count == 40
    assert not contents(table["content"]).any()


# --- several encoders, some of the rows --------------------------------------------------------------------------


def test_two_encoders_share_one_decoding(store: Store, pool: Pool, encoder: Encoder, tmp_path: Path, monkeypatch):
    vision = {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    other = load_encoder(store, tiny_encoder(store, tmp_path / "o", seed=1, embed_dim=8, vision_cfg=vision), CPU)
    twin = load_encoder(store, tiny_encoder(store, tmp_path / "t", seed=2), CPU)
    alone = [embedded(store, pool, e, name=f"alone/{i}", chunk_rows=11) for i, e in enumerate((encoder, other, twin))]
    decoded = []
    decode = curate.models.crop.decode_image
    monkeypatch.setattr(curate.models.crop, "decode_image", lambda data: decoded.append(data) or decode(data))
    cropped = []
    for e in (encoder, other, twin):
        crop = e.crop
        monkeypatch.setattr(e, "crop", lambda image, crop=crop: cropped.append(crop) or crop(image))
    names = {f"both/{i}": e for i, e in enumerate((encoder, other, twin))}
    counts = embed_shard(pool.shards[0], names, store, EmbedSection(chunk_rows=11), threads=2)
    captioned = 60 - counts["caption_empty"]
    assert len(decoded) == captioned
    assert len(cropped) == 2 * counts["ok"]  # encoders with equal views share the pixels as well
    for i, table in enumerate(alone):
        assert digest(store, f"both/{i}") == digest(store, f"alone/{i}")
        assert table["zimg"].type.list_size == (8 if i == 1 else 16)


def test_rows_that_nobody_wants_are_not_even_decoded(store: Store, pool: Pool, encoder: Encoder, monkeypatch):
    whole = embedded(store, pool, encoder)
    decoded = []
    decode = curate.models.crop.decode_image
    monkeypatch.setattr(curate.models.crop, "decode_image", lambda data: decoded.append(data) or decode(data))
    rows = np.flatnonzero(contents(whole["content"])[:, 0] % np.uint64(3) == 0)
    assert 5 < len(rows) < 55
    some = embedded(store, pool, encoder, name="some/x", rows=rows, chunk_rows=7)
    expected = whole.take(pa.array(rows))
    assert some["row"].to_pylist() == rows.tolist()
    for column in ("uid", "status", "error", "content", "picture", "width", "height"):
        assert some[column].to_pylist() == expected[column].to_pylist()
    assert len(decoded) == sum(status != "caption_empty" for status in expected["status"].to_pylist())
    scored = [status == "ok" for status in expected["status"].to_pylist()]
    found = vectors(some["zimg"], 16)
    np.testing.assert_allclose(found[scored], vectors(expected["zimg"], 16)[scored], atol=2e-3)
    assert np.isnan(found[np.logical_not(scored)]).all()


def test_row_groups_without_wanted_rows_are_not_read(store: Store, pool: Pool, encoder: Encoder, monkeypatch):
    path = pool.shards[0].path
    pq.write_table(pq.read_table(path), path, row_group_size=10)
    shard = take_inventory(PoolSection(path=path, uid="key")).shards[0]
    asked = []
    whole = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, rows: int, *, row_groups: list[int], **how: Any) -> Any:
        asked.extend(row_groups)
        return whole(self, rows, row_groups=row_groups, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    embed_shard(shard, {"some/x": encoder}, store, EmbedSection(), rows=np.array([3, 20, 29]))
    assert asked == [0, 2]
    assert read_embeddings(store, "some/x", ["uid"], numbered=True)["row"].to_pylist() == [3, 20, 29]


# --- embeddings that are none ------------------------------------------------------------------------------------


def test_embeddings_that_are_not_finite(store: Store, pool: Pool, encoder: Encoder):
    before = embedded(store, pool, encoder)
    encoder.model.visual.proj[0, 0] = torch.nan
    statuses = embedded(store, pool, encoder)["status"].to_pylist()
    assert statuses == [EMBEDDING_NONFINITE if s == "ok" else s for s in before["status"].to_pylist()]


def test_one_tower_is_enough_to_spoil_a_row_and_only_that_row(store: Store, pool: Pool, encoder: Encoder):
    word = int(encoder.tokenize(["triangle"])[0, 1])
    encoder.model.token_embedding.weight[word] = torch.inf
    table = embedded(store, pool, encoder, batch_size=6)
    captions = pq.read_table(pool.shards[0].path)["caption"].to_pylist()
    # Words that the context of 24 tokens cuts off spoil nothing.
    spoilt = [bool((encoder.tokenize([caption]) == word).any()) for caption in captions]
    found = [status == EMBEDDING_NONFINITE for status in table["status"].to_pylist()]
    usable = [status in ("ok", EMBEDDING_NONFINITE) for status in table["status"].to_pylist()]
    assert found == [a and b for a, b in zip(spoilt, usable, strict=True)]
    assert 0 < sum(found) < sum(usable)
    assert table["zimg"].null_count == table["ztxt"].null_count == 60 - sum(usable) + sum(found)


def test_embeddings_of_zero(store: Store, pool: Pool, encoder: Encoder):
    before = embedded(store, pool, encoder)["status"].to_pylist()
    encoder.model.text_projection.zero_()
    counts = embed_shard(pool.shards[0], {"embeddings/x": encoder}, store, EmbedSection(chunk_rows=9))
    table = read_embeddings(store, "embeddings/x", ["status", "zimg"])
    assert table["status"].to_pylist() == [EMBEDDING_ZERO if status == "ok" else status for status in before]
    assert table["zimg"].null_count == 60
    assert counts == Counter(table["status"].to_pylist())


def test_a_row_spoilt_for_one_encoder_is_whole_for_another(store: Store, pool: Pool, encoder: Encoder, tmp_path: Path):
    other = load_encoder(store, tiny_encoder(store, tmp_path, seed=1), CPU)
    other.model.visual.proj[0, 0] = torch.nan
    counts = embed_shard(pool.shards[0], {"a/x": encoder, "b/x": other}, store, EmbedSection())
    a, b = (read_embeddings(store, name, ["status"])["status"].to_pylist() for name in ("a/x", "b/x"))
    assert [EMBEDDING_NONFINITE if status == "ok" else status for status in a] == b
    assert counts == Counter(b)


# --- the actor -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_local")
def test_an_actor_that_cannot_load_its_model_says_so_when_it_is_asked(tmp_path: Path, store: Store):
    """Of what a constructor raises Ray passes on a traceback alone."""
    from curate.pipelines.embed import EmbedShards

    pool = drawn_pool(tmp_path / "pool", rows=2)
    spec = tiny_encoder(store, tmp_path)
    store.put_bytes(f"{spec.folder}/{WEIGHTS_NAME}", b"damaged")
    actor = EmbedShards(store, [spec], [], EmbedSection(), ResourcesSection(), "fail", 1)
    item = {"shard": asdict(pool.shards[0]), "encoders": [spec.sha], "wanted": None, "rows": 2}
    with pytest.raises(UserError, match=WEIGHTS_NAME):
        list(actor(pa.Table.from_pylist([item])))


@pytest.mark.usefixtures("ray_local")
def test_an_actor_that_takes_over_does_not_embed_again_what_its_predecessor_did(tmp_path: Path, store: Store):
    from curate.pipelines.embed import EmbedShards

    pool = drawn_pool(tmp_path / "pool", rows=60, shards=3)
    spec = tiny_encoder(store, tmp_path)
    items = [{"shard": asdict(s), "encoders": [spec.sha], "wanted": None, "rows": s.rows} for s in pool.shards]
    block = pa.Table.from_pylist(items)
    names = [embedding_name(spec.sha, shard) for shard in pool.shards]

    def written() -> list[int]:
        return [store.local_path(name).stat().st_ino for name in names]

    def actor() -> EmbedShards:
        return EmbedShards(store, [spec], [], EmbedSection(), ResourcesSection(), "fail", 1)

    whole = list(actor()(block))
    assert [receipt["rows"] for receipt in whole] == [[20]] * 3
    before = written()
    store.delete(names[2])  # where the predecessor died
    assert [receipt["rows"] for receipt in actor()(block)] == [[20]] * 3
    assert written()[:2] == before[:2]
    assert store.exists(names[2])
