"""Pools in the formats that others write: the same rows as of Parquet, by the library that made them."""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import curate.formats.tar as tar_module
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.formats.tar import make_index
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, caption_bytes, image_bytes, read_batches, read_rows, read_some, row_groups
from curate.recipe import PoolSection
from curate.storage import Store


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def jpeg(number: int, size: int = 24) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(rows: range) -> list[tuple[str, bytes]]:
    """Members as img2dataset writes them."""
    return [
        member
        for row in rows
        for member in (
            (f"{row:09d}.jpg", jpeg(row)),
            (f"{row:09d}.txt", f"caption {row}".encode()),
            (f"{row:09d}.json", json.dumps({"width": 10 * row, "caption": f"said {row}"}).encode()),
        )
    ]


def inventory(path: Path | str, **settings: Any) -> Pool:
    return take_inventory(PoolSection(path=str(path), **settings))


def line_about(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        inventory(path, **settings)
    (line,) = caught.value.lines
    return line


def pairs_of(pool: Pool, batch_rows: int = 3) -> list[tuple[bytes | None, bytes | None]]:
    columns = pool.columns
    return [
        pair
        for shard in pool.shards
        for batch in read_batches(shard, [columns.image, columns.caption], batch_rows=batch_rows)
        for pair in zip(
            image_bytes(batch.column(columns.image)).to_pylist(),
            caption_bytes(batch.column(columns.caption)).to_pylist(),
            strict=True,
        )
    ]


# --- tars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_have_a_row_for_each_sample(tmp_path: Path, kind: int) -> None:
    for number in range(2):
        write_tar(tmp_path / f"pool/{number:05d}.tar", samples(range(5 * number, 5 * number + 5)), kind=kind)
    pool = inventory(tmp_path / "pool")
    assert (pool.columns.image, pool.columns.caption, pool.rows) == ("image", "txt", 10)
    assert pairs_of(pool) == [(jpeg(row), f"caption {row}".encode()) for row in range(10)]
    assert row_groups(pool.shards[0]) == [1] * 5
    table = read_rows(pool.shards[1], [1, 4], ["key", "json", "image"])
    assert table["key"].to_pylist() == ["000000006", "000000009"]
    assert [json.loads(text)["width"] for text in table["json"].to_pylist()] == [60, 90]


def test_members_are_one_sample_by_webdatasets_rules(tmp_path: Path) -> None:
    members = [
        ("__meta__", b"x"),
        ("./a.b/000.JPG", b"one"),
        ("./a.b/000.txt", b"first"),
        ("__MACOSX/._000.jpg", b"x"),
        ("./a.b/000.seg.png", b"mask"),
        ("c/001.png", b"two"),
        ("c/002.txt", "ohne Bild".encode("latin-1") + b"\xff"),
        ("c/003.webp", b""),
        ("c/003.txt", b""),
    ]
    path = write_tar(tmp_path / "pool/0.tar", members)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("c/dir.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    pool = inventory(tmp_path / "pool")
    (batch,) = read_batches(pool.shards[0], None, batch_rows=9)
    assert batch.column("key").to_pylist() == ["a.b/000", "c/001", "c/002", "c/003"]
    assert pairs_of(pool) == [(b"one", b"first"), (b"two", None), (None, b"ohne Bild\xff"), (b"", b"")]
    assert batch.column("seg.png").to_pylist() == [b"mask", None, None, None]


def test_a_tar_is_indexed_once_and_its_index_is_shared(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "pool/0.tar", samples(range(4)))
    section = PoolSection(path=str(path.parent))
    pool = take_inventory(section, indices=str(tmp_path / "root/indices"))
    (name,) = Store(str(tmp_path / "root")).list("indices")
    assert pool.shards[0].offsets == str(tmp_path / "root" / name)
    assert tar_module._index(str(path), pool.shards[0].offsets) == make_index(str(path))
    (tmp_path / "root" / name).unlink()  # whoever reads makes it anew
    assert len(pairs_of(pool)) == 4
    assert take_inventory(section, known=pool, indices=str(tmp_path / "root/indices")) == pool
    write_tar(path, samples(range(3)))
    with pytest.raises(InputChangedError):
        pairs_of(pool)
    assert pairs_of(inventory(path.parent)) == pairs_of(pool_of_rows(tmp_path / "same", range(3)))


def pool_of_rows(folder: Path, rows: range) -> Pool:
    folder.mkdir()
    table = pa.table({"jpg": [jpeg(row) for row in rows], "caption": [f"caption {row}" for row in rows]})
    pq.write_table(table, folder / "0.parquet")
    return inventory(folder)


def test_members_that_lie_together_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "pool/0.tar", samples(range(200)))
    (shard,) = inventory(tmp_path / "pool").shards
    read: list[int] = []
    from curate.access import _Input

    whole = _Input.read

    def reading(self: _Input, size: int | None = -1) -> bytes:
        read.append(size or 0)
        return whole(self, size)

    monkeypatch.setattr(_Input, "read", reading)
    assert sum(len(rows) for rows, _ in read_some(shard, np.arange(200), ["image", "txt"], batch_rows=100)) == 200
    assert len(read) == 2
    read.clear()
    (found,) = read_some(shard, np.array([3, 150]), ["image"], batch_rows=100)
    assert image_bytes(found[1].column("image")).to_pylist() == [jpeg(3), jpeg(150)]
    assert len(read) == 2
    assert sum(read) < path.stat().st_size / 20


def side_car(path: Path, keys: Sequence[str], failed: Sequence[str] = ()) -> Path:
    said = ["failed_to_download" if key in failed else "success" for key in keys]
    table = pa.table(
        {"key": keys, "caption": [f"beside {key}" for key in keys], "status": said, "width": [7] * len(keys)}
    )
    pq.write_table(table.append_column("error_message", pa.array([None] * len(keys), pa.string())), path)
    return path


def test_the_parquet_file_beside_a_tar_tells_of_what_is_not_in_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "pool/00000.tar", samples(range(3)))
    side_car(tmp_path / "pool/00000.parquet", [f"{row:09d}" for row in (2, 7, 0, 1)], failed=["000000007"])
    pool = inventory(tmp_path / "pool")
    assert [shard.name for shard in pool.shards] == ["00000.tar"]
    assert pool.rows == 4
    expected = [(jpeg(2), "2"), (None, "7"), (jpeg(0), "0"), (jpeg(1), "1")]
    assert pairs_of(pool) == [(data, f"beside 00000000{key}".encode()) for data, key in expected]
    assert read_rows(pool.shards[0], [0], ["json", "txt", "width"]).to_pylist()[0]["width"] == 7
    side_car(tmp_path / "pool/00000.parquet", ["000000000", "000000001", "000000002"])
    with pytest.raises(InputChangedError):
        pairs_of(pool)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("keys twice", r"1 of its 4 samples have the key of another"),
        ("cut off in data", "unexpected end of data"),
        ("cut off in a header", r"a damaged header at byte 2560, or more after the end, after 1 samples"),
        ("a damaged header", r"a damaged header at byte 2560, or more after the end, after 1 samples"),
        ("joined", r"or more after the end, after 3 samples"),
        ("junk", "invalid header"),
        ("twice", r"the sample 'a' has two members \.txt"),
        ("other side-car", r"the Parquet file beside it has no row for 2 of its 3 samples"),
        ("no key", r"the Parquet file beside it, .*0\.parquet, has no column 'key'"),
        ("empty", "found 0 bytes"),
    ],
)
def test_a_broken_tar_is_one_line(tmp_path: Path, what: str, found: str) -> None:
    path = write_tar(tmp_path / "pool/0.tar", samples(range(3)))
    match what:
        case "cut off in data":
            path.write_bytes(path.read_bytes()[:1400])
        case "cut off in a header":
            path.write_bytes(path.read_bytes()[:3000])
        case "a damaged header":
            data = bytearray(path.read_bytes())
            data[2600:2700] = b"x" * 100
            path.write_bytes(data)
        case "joined":
            path.write_bytes(path.read_bytes() * 2)
        case "keys twice":
            write_tar(path, [*samples(range(3)), ("000000000.jpg", b"again")])
            side_car(path.with_suffix(".parquet"), [f"{row:09d}" for row in range(3)])
        case "junk":
            path.write_bytes(b"x" * 4096)
        case "twice":
            write_tar(path, [("a.jpg", b""), ("a.txt", b"1"), ("a.txt", b"2")])
        case "other side-car":
            side_car(path.with_suffix(".parquet"), ["000000001"])
        case "no key":
            pq.write_table(pa.table({"caption": ["a"]}), path.with_suffix(".parquet"))
        case "empty":
            path.write_bytes(b"")
    line = line_about(tmp_path / "pool")
    assert line.startswith(f"{path}: expected a tar, found ")
    assert re.search(found, line), line
    write_tar(tmp_path / "pool/1.tar", samples(range(2)))
    pool = inventory(tmp_path / "pool", on_bad_shard="skip")
    assert (pool.rows, pool.skipped) == (2, (line,))


def test_tars_on_s3(s3_root: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in samples(range(6)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    Store(s3_root).put_bytes("pool/0.tar", out.getvalue())
    pool = take_inventory(PoolSection(path=f"{s3_root}/pool"), indices=f"{s3_root}/indices")
    assert pairs_of(pool) == [(jpeg(row), f"caption {row}".encode()) for row in range(6)]


# --- Arrow -----------------------------------------------------------------------------------------------------------


def test_what_datasets_saves(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Sequence(datasets.Value("string")),
            "n": datasets.Value("int32"),
        }
    )
    rows = {
        "image": [{"bytes": jpeg(row), "path": None} for row in range(7)],
        "caption": [[f"one {row}", f"two {row}"] for row in range(7)],
        "n": list(range(7)),
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved/cache-0123.arrow").write_bytes(b"junk")
    pool = inventory(tmp_path / "saved")
    assert [shard.rows for shard in pool.shards] == [4, 3]
    found = pairs_of(pool)
    assert [data for data, _ in found] == [jpeg(row) for row in range(7)]
    assert all(caption in (f"one {row}".encode(), f"two {row}".encode()) for row, (_, caption) in enumerate(found))
    table = read_rows(pool.shards[1], [0, 2], ["n", "caption_drawn", "caption_which", "caption"])
    for row in table.to_pylist():
        assert row["caption_drawn"] == row["caption"][row["caption_which"]]
    assert table["n"].to_pylist() == [4, 6]


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_arrow_files_and_streams(tmp_path: Path, s3_root: str, form: str, where: str) -> None:
    table = pa.table({"jpg": [jpeg(row) for row in range(10)], "caption": [f"{row}" for row in range(10)]})
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if form == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    root = s3_root if where == "s3" else str(tmp_path)
    Store(root).put_bytes("pool/data.arrow", sink.getvalue().to_pybytes())
    pool = inventory(f"{root}/pool")
    (shard,) = pool.shards
    assert row_groups(shard) == [4, 4, 2]
    assert pairs_of(pool) == [(jpeg(row), str(row).encode()) for row in range(10)]
    assert read_rows(shard, [1, 5, 9], ["caption"])["caption"].to_pylist() == ["1", "5", "9"]
    data = bytearray(sink.getvalue().to_pybytes())
    data[len(data) // 2 :] = b""
    Store(root).put_bytes("pool/data.arrow", bytes(data))
    assert "expected an Arrow file, found a broken one" in line_about(f"{root}/pool")


# --- pictures by their names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_a_folder_of_pictures_with_a_table_that_names_them(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "pool"
    (folder / "deep").mkdir(parents=True)
    names = ["a.jpg", "deep/b.jpg", "gone.jpg", str(folder / "deep/b.jpg")]
    for number, name in enumerate(names[:2]):
        (folder / name).write_bytes(jpeg(number))
    rows = [{"file_name": name, "text": f"0{number}"} for number, name in enumerate(names)]
    path = folder / f"metadata.{suffix}"
    match suffix:
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            between = "," if suffix == "csv" else "\t"
            lines = [["file_name", "text"], *(row.values() for row in rows)]
            path.write_text("".join(between.join(line) + "\n" for line in lines), encoding="utf-8")
    pool = inventory(folder)
    assert pool.columns.image == "file_name_bytes"
    assert pairs_of(pool) == [(jpeg(0), b"00"), (jpeg(1), b"01"), (None, b"02"), (jpeg(1), b"03")]


def test_a_table_beside_a_pool_is_none_of_its_shards(tmp_path: Path) -> None:
    pool_of_rows(tmp_path / "pool", range(3))
    (tmp_path / "pool/metadata.csv").write_text("shard,rows\n0.parquet,3\n", encoding="utf-8")
    pool = inventory(tmp_path / "pool")
    assert (pool.rows, pool.ignored) == (3, (str(tmp_path / "pool/metadata.csv"),))


def test_pictures_by_url_and_by_a_folder_of_their_own(tmp_path: Path, s3_root: str) -> None:
    Store(f"{s3_root}/pictures").put_bytes("a.jpg", jpeg(0))
    (tmp_path / "pool").mkdir()
    table = pa.table({"image": ["a.jpg", f"{s3_root}/pictures/a.jpg", None, "b.jpg"], "caption": ["1", "2", "3", "4"]})
    pq.write_table(table, tmp_path / "pool/0.parquet")
    pool = inventory(tmp_path / "pool", images=f"{s3_root}/pictures")
    assert [data for data, _ in pairs_of(pool)] == [jpeg(0), jpeg(0), None, None]
    pq.write_table(table.set_column(0, "image", pa.array(["https://x/a.jpg"] * 4)), tmp_path / "pool/0.parquet")
    with pytest.raises(UserError, match=r"https://x/a.jpg: expected a path or a URL of an object store"):
        pairs_of(inventory(tmp_path / "pool"))


def test_pictures_that_hugging_face_names_by_a_path_alone(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/a.jpg").write_bytes(jpeg(0))
    images = [
        {"bytes": None, "path": "a.jpg"},
        {"bytes": b"own", "path": "a.jpg"},
        None,
        {"bytes": None, "path": "b.jpg"},
    ]
    pq.write_table(pa.table({"image": images, "text": list("abcd")}), tmp_path / "pool/0.parquet")
    assert [data for data, _ in pairs_of(inventory(tmp_path / "pool"))] == [jpeg(0), b"own", None, None]


# --- captions --------------------------------------------------------------------------------------------------------


def test_one_caption_of_several_is_drawn_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    captions = (
        [["a", "b", "c"]] * 2
        + [["", "x", " "], [], None, [None, "y"], ["", ""]]
        + [[f"{i}", f"-{i}"] for i in range(40)]
    )
    table = pa.table({"jpg": [b"x"] * len(captions), "captions": pa.array(captions, pa.list_(pa.string()))})
    pq.write_table(table, tmp_path / "pool/0.parquet")
    drawn = [[caption for _, caption in pairs_of(inventory(tmp_path / "pool", caption_seed=seed))] for seed in range(6)]
    assert drawn[0] == [caption for _, caption in pairs_of(inventory(tmp_path / "pool"), batch_rows=1)]
    assert all(found[2:7] == [b"x", None, None, b"y", b""] for found in drawn)
    assert len({tuple(found) for found in drawn}) == 6
    assert {found[0] for found in drawn} > {drawn[0][0]}
    counts = sum(caption.startswith(b"-") for found in drawn for caption in found[7:] if caption)
    assert 80 < counts < 160
    keys = {inventory(tmp_path / "pool", caption_seed=seed).shards[0].key for seed in range(3)}
    assert len(keys) == 3


@pytest.mark.parametrize("kind", ["json", "struct"])
def test_captions_within_json_and_structs(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pool").mkdir()
    said: list[Any] = [
        {"said": {"en": "one", "de": "eins"}},
        {"said": {"en": None, "de": "zwei"}},
        {"said": None},
        None,
    ]
    column = pa.array([value if kind == "struct" or value is None else json.dumps(value) for value in said])
    if kind == "json":
        column = pa.array([*column.to_pylist()[:3], "{broken"])
    pq.write_table(pa.table({"jpg": [b"x"] * 4, "meta": column}), tmp_path / "pool/0.parquet")
    pool = inventory(tmp_path / "pool", caption="meta.said.en")
    assert pool.columns.caption == "meta_said_en"
    assert [caption for _, caption in pairs_of(pool)] == [b"one", None, None, None]
    assert "expected the caption column" in line_about(tmp_path / "pool")


def test_columns_that_were_made_before_are_taken_as_they_are(tmp_path: Path) -> None:
    """As a shuffle of a pool leaves them."""
    (tmp_path / "pool").mkdir()
    made = {"image": ["a"], "image_bytes": [b"x"], "captions": [["a", "b"]], "captions_drawn": ["b"]}
    pq.write_table(pa.table(made | {"captions_which": pa.array([1], pa.int32())}), tmp_path / "pool/0.parquet")
    pool = inventory(tmp_path / "pool", image="image", caption="captions")
    assert pairs_of(pool) == [(b"x", b"b")]


@pytest.mark.parametrize("caption", [b'{"c": "cut \\ud83d"}', b'{"c": "\xff"}', b"[" * 100_000, b'{"c": {"en": "x"}}'])
def test_one_odd_caption_in_json_is_one_row(tmp_path: Path, caption: bytes) -> None:
    (tmp_path / "pool").mkdir()
    column = pa.array([caption, b'{"c": "sound"}']).view(pa.string())
    pq.write_table(pa.table({"jpg": [b"x"] * 2, "meta": column}), tmp_path / "pool/0.parquet")
    odd, sound = pairs_of(inventory(tmp_path / "pool", caption="meta.c"))
    assert sound == (b"x", b"sound")
    assert odd[1] in (None, "cut \ud83d".encode("utf-8", "surrogatepass"))


def test_a_glob_of_tars_finds_what_lies_beside_them(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"pool/{number}.tar", samples(range(2)))
        side_car(tmp_path / f"pool/{number}.parquet", [f"{row:09d}" for row in range(3)], failed=["000000002"])
    for path in ("*.tar", "0.tar", ""):
        assert {shard.rows for shard in inventory(tmp_path / "pool" / path).shards} == {3}


def test_tars_beside_a_pool_of_parquet_are_passed_over(tmp_path: Path) -> None:
    whole = pool_of_rows(tmp_path / "pool", range(3))
    path = write_tar(tmp_path / "pool/0.tar", samples(range(1)))
    pool = inventory(tmp_path / "pool")
    assert (pairs_of(pool), pool.ignored) == (pairs_of(whole), (str(path),))


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "pool/0.tar", samples(range(50)))
    (shard,) = inventory(tmp_path / "pool").shards
    index = Path(shard.offsets)
    whole, sound = index.read_bytes(), pairs_of(inventory(tmp_path / "pool"))
    for at in range(40, len(whole) - 40, 97):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        index.write_bytes(damaged)
        tar_module._index.cache_clear()
        assert pairs_of(inventory(tmp_path / "pool")) == sound


def test_shards_of_one_pool_in_several_formats(tmp_path: Path) -> None:
    write_tar(tmp_path / "pool/0.tar", samples(range(2)))
    table = pa.table({"image": [jpeg(5)], "txt": ["caption 5"]})
    pq.write_table(table, tmp_path / "pool/1.parquet")
    pool = inventory(tmp_path / "pool")
    assert pairs_of(pool) == [(jpeg(row), f"caption {row}".encode()) for row in (0, 1, 5)]
    assert pool.schema.names == ["key", "image", "json", "txt"]


def test_a_damaged_tar_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "pool/0.tar", samples(range(3)))
    pool = inventory(tmp_path / "pool")
    shard = pool.shards[0]
    stat = path.stat()
    path.write_bytes(path.read_bytes()[:-5000])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises((ShardDamagedError, InputChangedError)):
        list(read_batches(shard, None, batch_rows=9))
