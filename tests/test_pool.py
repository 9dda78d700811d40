"""The inventory: every Parquet shard there is, or one clear line about it, never a traceback and never silence."""

import decimal
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curate.pool.inventory as inventory_module
from curate.errors import InputChangedError, ShardDamagedError, UserError
from curate.pool.inventory import take_inventory
from curate.pool.reshard import reshard_file
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes, load_pool, read_batches, read_rows
from curate.recipe import PoolSection
from curate.storage import Store
from tests.helpers import commit_round, damage_page, picks_of, pieces_of

HOUSE = Path(__file__).parents[1]
ODD = (HOUSE.parent / "shared" / "data" / "odd-parquet").resolve()  # inventories name files by their real path
PAIRS = pa.table({"jpg": [b"\xff\xd8one", b"\xff\xd8two"], "caption": ["a dog", "zwei Hünd"]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pool"
    made.mkdir()
    return made


def write(path: Path, table: pa.Table = PAIRS, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **how)
    return path


def inventory(path: Path | list[str], **settings: Any) -> Pool:
    return take_inventory(PoolSection(path=path if isinstance(path, list) else str(path), **settings))


def lines_about(path: Path | list[str], **settings: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        inventory(path, **settings)
    assert caught.value.lines
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


def line_about(path: Path, **settings: Any) -> str:
    (line,) = lines_about(path, **settings)
    return line


def pairs_of(pool: Pool) -> list[tuple[bytes | None, bytes | None]]:
    """All pairs as embedding would read them, two rows at a time."""
    found = []
    names = [pool.columns.image, pool.columns.caption]
    for shard in pool.shards:
        for batch in read_batches(shard, names, batch_rows=2):
            images = image_bytes(batch.column(pool.columns.image))
            captions = caption_bytes(batch.column(pool.columns.caption))
            found += list(zip(images.to_pylist(), captions.to_pylist(), strict=True))
    return found


# --- pools as others write them ----------------------------------------------------------------------------------


def test_img2dataset(folder: Path) -> None:
    for i in range(2):
        table = pa.table(
            {
                "url": ["http://x/1", "http://x/2"],
                "key": [f"{i:05d}0000", f"{i:05d}0001"],
                "status": ["success", "failed_to_download"],
                "caption": ["a dog", None],
                "width": pa.array([10, None], pa.int32()),
                "exif": ["{}", None],
                "jpg": pa.array([b"\xff\xd8", None], pa.binary()),
            }
        )
        write(folder / f"{i:05d}.parquet", table)
        (folder / f"{i:05d}_stats.json").write_text("{}")
    pool = inventory(folder)
    assert (pool.columns.image, pool.columns.caption, pool.columns.uid) == ("jpg", "caption", None)
    assert [shard.name for shard in pool.shards] == ["00000.parquet", "00001.parquet"]
    assert [shard.index for shard in pool.shards] == [0, 1]
    assert pool.rows == 4
    assert [Path(name).name for name in pool.ignored] == ["00000_stats.json", "00001_stats.json"]
    assert pairs_of(pool) == [(b"\xff\xd8", b"a dog"), (None, None)] * 2


def test_hugging_face(folder: Path) -> None:
    images = [{"bytes": b"one", "path": "1.jpg"}, None, {"bytes": None, "path": "only/a/path.jpg"}]
    table = pa.table({"image": images, "text": ["a", "b", "c"]}).replace_schema_metadata({"huggingface": "{}"})
    write(folder / "train-00000-of-00001.parquet", table)
    pool = inventory(folder)
    assert (pool.columns.image, pool.columns.caption) == ("image", "text")
    assert pairs_of(pool) == [(b"one", b"a"), (None, b"b"), (None, b"c")]
    assert pool.schema.metadata[b"huggingface"] == b"{}"  # by which `datasets` knows an image when it sees one


def test_an_image_that_is_null_as_a_whole_has_no_bytes() -> None:
    fields = [pa.array([b"kept", b"hidden"])]
    column = pa.StructArray.from_arrays(fields, names=["bytes"], mask=pa.array([False, True]))
    assert image_bytes(column).to_pylist() == [b"kept", None]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_captions_of_any_textual_type(folder: Path, kind: pa.DataType) -> None:
    texts = pa.array(["a dog", None])
    column = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    write(folder / "a.parquet", pa.table({"jpg": [b"1", b"2"], "caption": column}))
    assert pairs_of(inventory(folder)) == [(b"1", b"a dog"), (b"2", None)]


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.string(), pa.null()], ids=str
)
def test_a_shard_may_hold_its_captions_in_a_wider_type_than_the_others(folder: Path, kind: pa.DataType) -> None:
    write(folder / "a.parquet")
    texts = pa.nulls(1) if pa.types.is_null(kind) else pa.array(["x"])
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    write(folder / "b.parquet", pa.table({"jpg": pa.array([b"3"], pa.large_binary()), "caption": column}))
    pool = inventory(folder)
    assert pool.schema.field("jpg").type == pa.large_binary()
    assert pairs_of(pool)[-1] == (b"3", None if pa.types.is_null(kind) else b"x")


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.null(), pa.struct([("bytes", pa.null())])])
def test_images_of_any_binary_type(folder: Path, kind: pa.DataType) -> None:
    column = pa.array([b"1"]).cast(kind) if "binary" in str(kind) else pa.nulls(1, kind)
    write(folder / "a.parquet", pa.table({"jpg": column, "caption": ["x"]}))
    assert pairs_of(inventory(folder)) == [(b"1" if "binary" in str(kind) else None, b"x")]


def test_other_columns_are_united_and_widened(folder: Path) -> None:
    write(folder / "a.parquet", PAIRS.append_column("width", pa.array([1, 2], pa.int32())))
    write(folder / "b.parquet", PAIRS.append_column("width", pa.array([1, 2], pa.int64())))
    write(folder / "c.parquet", PAIRS.append_column("style", pa.array(["s", "t"]).dictionary_encode()))
    pool = inventory(folder)
    assert pool.schema.names == ["jpg", "caption", "width", "style"]
    assert pool.schema.field("width").type == pa.int64()
    assert pool.schema.field("style").type == pa.string()
    assert len(pairs_of(pool)) == 6


DAYS = pa.array([0, 20_000, None, -700_000], pa.int32())
WORDS = pa.array(["a", "ü", None, ""])
PAIRED = pa.array([{"a": "x", "b": 1}, {"a": None, "b": 2}, None, {"a": "y", "b": None}])
KINDS = {
    **{
        f"int{bits}": pa.array([-(2 ** (bits - 1)), None, 2 ** (bits - 1) - 1, 0], f"int{bits}") for bits in (8, 32, 64)
    },
    **{f"uint{bits}": pa.array([1, None, 2**bits - 1, 0], f"uint{bits}") for bits in (8, 32, 64)},
    "bool": pa.array([True, None, False, True]),
    "half": pa.array([np.float16(0.5), None, np.float16(65_504), np.float16(-0.0)], pa.float16()),
    "float": pa.array([0.1, None, 3e38, -1.0], pa.float32()),
    "double": pa.array([0.1, None, 1e300, -1.0]),
    "null": pa.nulls(4),
    "string": WORDS,
    "large_string": WORDS.cast(pa.large_string()),
    "string_view": WORDS.cast(pa.string_view()),
    "dictionary": WORDS.dictionary_encode(),
    "large dictionary": WORDS.cast(pa.large_string()).dictionary_encode(),
    "dictionary of numbers": pa.array([1, None, 2**40, 1]).dictionary_encode(),
    "binary": WORDS.cast(pa.binary()),
    "large_binary": WORDS.cast(pa.large_binary()),
    "binary_view": WORDS.cast(pa.binary_view()),
    "3 bytes": pa.array([b"abc", None, b"\xff\xff\xff", b"123"], pa.binary(3)),
    "16 bytes": pa.array([bytes(16), None, bytes(16), bytes(16)], pa.binary(16)),
    "uuid": pa.array([bytes(16), None, bytes(16), bytes(16)], pa.binary(16)).cast(pa.uuid()),
    "json": pa.array(["{}", None, "1", "2"]).cast(pa.json_()),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(16, dtype=np.float32).reshape(4, 2, 2)),
    "days": DAYS.cast(pa.date32()),
    **{f"timestamp {unit}": DAYS.cast(pa.int64()).cast(pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")},
    "far future": pa.array([253_402_300_799_000, None, 0, 1]).cast(pa.timestamp("ms")),
    **{f"in {zone}": DAYS.cast(pa.int64()).cast(pa.timestamp("us", zone)) for zone in ("UTC", "Europe/Berlin")},
    "time": pa.array([1, None, 86_399_999, 0], pa.int32()).cast(pa.time32("ms")),
    "fine time": pa.array([1, None, 86_399_999_999, 0]).cast(pa.time64("us")),
    **{f"duration {unit}": pa.array([1, None, 2**50, -1]).cast(pa.duration(unit)) for unit in ("ms", "us")},
    "decimal": pa.array([decimal.Decimal("999.99"), None, decimal.Decimal("-0.01"), decimal.Decimal(0)]),
    "decimal of 4": pa.array([decimal.Decimal("1.2345"), None], pa.decimal128(10, 4)).take(pa.array([0, 1, 0, 0])),
    "decimal of 38": pa.array([decimal.Decimal(10**38 - 1), None], pa.decimal128(38, 0)).take(pa.array([0, 1, 0, 0])),
    "small decimal": pa.array([decimal.Decimal("1.25"), None], pa.decimal32(5, 2)).take(pa.array([0, 1, 0, 0])),
    "list": pa.array([[1, None], None, [], [2**40]]),
    "large_list": pa.array([[1, None], None, [], [2**40]], pa.large_list(pa.int64())),
    "list of small": pa.array([[1, None], None, [], [3]], pa.list_(pa.int8())),
    "list of unsigned": pa.array([[2**64 - 1], None, [], [3]], pa.list_(pa.uint64())),
    "list of double": pa.array([[0.5], None, [], [3.0]]),
    "list of nulls": pa.array([[None], None, [], [None]], pa.list_(pa.null())),
    "list of 2": pa.array([[1, 2], None, [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
    "list of required": pa.array([[1], None, [], [2]], pa.list_(pa.field("x", pa.int64(), nullable=False))),
    "list_view": pa.array([[1, None], None, [], [2**40]], pa.list_view(pa.int64())),
    "list of views": pa.array([["a", None], None, [], ["b"]], pa.list_(pa.string_view())),
    "list of dictionary": pa.array([["a", None], None, [], ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "struct": PAIRED,
    "struct of views": PAIRED.cast(pa.struct([("a", pa.string_view()), ("b", pa.int64())])),
    "struct of one": pa.array([{"b": 1}, {"b": None}, None, {"b": 3}]),
    "struct of required": pa.array([{"b": 1}, {"b": 2}] * 2, pa.struct([pa.field("b", pa.int64(), nullable=False)])),
    "struct of unsigned": pa.array([{"b": 2**64 - 1}, {"b": 2}] * 2, pa.struct([("b", pa.uint64())])),
    "struct of double": pa.array([{"b": 0.5}, {"b": 2.0}] * 2),
    "map": pa.array([[("a", 1)], None, [], [("b", None)]], pa.map_(pa.string(), pa.int64())),
    "map of views": pa.array([[("a", 1)], None, [], [("b", 2)]], pa.map_(pa.string_view(), pa.int8())),
}
"""A column of four rows of each kind, extremes included."""


def as_values(value: Any) -> Any:
    """Values as they compare: a field of a struct that is null is as one that is not there."""
    if isinstance(value, dict):
        return {name: as_values(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [as_values(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def as_python(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":  # Python's own have no room for these
        column = column.cast(pa.int64())
    return [as_values(value) for value in column.to_pylist()]


QUICK = (
    "int64",
    "uint64",
    "half",
    "dictionary",
    "binary_view",
    "timestamp ms",
    "decimal",
    "list_view",
    "struct of views",
)


@pytest.mark.parametrize(
    "first", [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in KINDS]
)
def test_any_two_types_are_written_unchanged_or_refused_by_the_inventory(
    folder: Path, tmp_path: Path, first: str
) -> None:
    pairs = {"jpg": [b"1", b"2", b"3", b"4"], "caption": ["a", "b", "c", "d"]}
    write(folder / "0.parquet", pa.table(pairs | dict.fromkeys(KINDS, KINDS[first])))
    for name, column in KINDS.items():
        write(folder / f"{name}.parquet", pa.table(pairs | {name: column}))
    pool = inventory(folder, on_bad_shard="skip")
    for line in pool.skipped:
        assert "one type in all shards" in line
        assert "\n" not in line
    together = [shard.name.removesuffix(".parquet") for shard in pool.shards[1:]]
    assert len(together) + len(pool.skipped) == len(KINDS)
    assert {first, "null"} <= set(together)

    made = tmp_path / "pairs"
    write(made / "0.parquet", pa.table(pairs | dict.fromkeys(together, KINDS[first])))
    write(made / "1.parquet", pa.table(pairs | {name: KINDS[name] for name in together}))
    pool, store = inventory(made), Store(str(tmp_path / "root"))
    chosen = [(shard, row) for shard in (1, 0) for row in (3, 1, 0, 2)]
    manifest = commit_round(store, pool, [chosen], number=0)
    written = pq.read_table(tmp_path / "root/rounds/r000000" / manifest.files[0].name)
    for name in together:
        both = as_python(KINDS[first]) + as_python(KINDS[name])
        assert as_python(written[name]) == [both[4 * shard + row] for shard, row in chosen], name


def test_what_integers_dates_and_decimals_are_not_turned_into(folder: Path) -> None:
    for name, one, other in [
        ("signs", "int64", "uint64"),
        ("floats", "int32", "double"),
        ("units", "timestamp ms", "timestamp ns"),
        ("zones", "in UTC", "in Europe/Berlin"),
        ("spans", "duration ms", "duration us"),
        ("bytes", "string", "binary"),
        ("inner", "list", "list of unsigned"),
        ("fields", "struct", "struct of double"),
    ]:
        pairs = {"jpg": [b"1", b"2", b"3", b"4"], "caption": ["a", "b", "c", "d"]}
        write(folder / name / "0.parquet", pa.table(pairs | {"x": KINDS[one]}))
        write(folder / name / "1.parquet", pa.table(pairs | {"x": KINDS[other]}))
        line = line_about(folder / name)
        assert line.startswith(f"{folder}/{name}/1.parquet: expected the column types of the shards before it, found ")
        assert "x" in line
        assert line.endswith("give the column one type in all shards")


def test_a_column_that_one_shard_requires_and_another_lacks(folder: Path, tmp_path: Path) -> None:
    field = pa.field("x", pa.int64(), nullable=False)
    write(folder / "a.parquet", PAIRS.append_column(field, [[1, 2]]))
    write(folder / "b.parquet")
    pool = inventory(folder)
    manifest = commit_round(Store(str(tmp_path / "root")), pool, [[(0, 0), (1, 1), (1, 0), (0, 1)]], number=0)
    written = pq.read_table(tmp_path / "root/rounds/r000000" / manifest.files[0].name)
    assert written["x"].to_pylist() == [1, None, None, 2]


def test_an_empty_shard_is_counted(folder: Path) -> None:
    write(folder / "a.parquet", PAIRS.slice(0, 0))
    write(folder / "b.parquet")
    pool = inventory(folder)
    assert [shard.rows for shard in pool.shards] == [0, 2]
    assert len(pairs_of(pool)) == 2


# --- which column is which ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["jpg", "jpeg", "png", "webp", "image", "img", "image_bytes"])
@pytest.mark.parametrize("caption", ["caption", "txt", "text", "alt_text", "TEXT", "title"])
def test_columns_by_convention(folder: Path, image: str, caption: str) -> None:
    write(folder / "a.parquet", PAIRS.rename_columns([image, caption]))
    columns = inventory(folder).columns
    assert (columns.image, columns.caption) == (image, caption)


def test_the_more_specific_convention_wins(folder: Path) -> None:
    write(folder / "a.parquet", PAIRS.append_column("text", pa.array(["t", "u"])).select(["text", "caption", "jpg"]))
    assert inventory(folder).columns.caption == "caption"


def test_columns_by_the_recipe(folder: Path) -> None:
    table = PAIRS.append_column("photo", pa.array([b"p", b"q"])).append_column("alt", pa.array(["A", "B"]))
    write(folder / "a.parquet", table.append_column("id", pa.array([1, 2])))
    pool = inventory(folder, image="photo", caption="alt", uid="id")
    assert (pool.columns.image, pool.columns.caption, pool.columns.uid) == ("photo", "alt", "id")
    assert pairs_of(pool) == [(b"p", b"A"), (b"q", b"B")]


def test_no_such_columns_is_one_line_with_what_there_is(folder: Path) -> None:
    path = write(folder / "a.parquet", pa.table({f"c{i}": [1] for i in range(100)}))
    line = line_about(folder)
    for words in (str(path), "image column", "jpg, jpeg", "caption column", "c0, c1", "100 columns", "pool.image"):
        assert words in line
    assert "c50" not in line


def test_a_column_name_cannot_break_the_line(folder: Path) -> None:
    write(folder / "a.parquet", pa.table({"jp\ng": [b"1"], "caption": ["x"]}))
    assert r"'jp\ng', caption" in line_about(folder)


@pytest.mark.parametrize("role", ["image", "caption", "uid"])
def test_a_column_that_the_recipe_names_must_be_there(folder: Path, role: str) -> None:
    path = write(folder / "a.parquet")
    line = line_about(folder, **{role: "nope"})
    assert line.startswith(f"{path}: expected the {role} column 'nope', found jpg, caption; ")
    assert f"pool.{role}" in line


# --- shards that cannot be used ----------------------------------------------------------------------------------


def broken(table: pa.Table = PAIRS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:start] + b"\xff" * 40 + data[start + 40 :]


BAD = {
    "zero bytes": (b"", ["found 0 bytes", "remove or replace"]),
    "not Parquet": (b"<html>404 Not Found</html>", ["expected a Parquet file", "broken footer", "remove or replace"]),
    "cut": (broken()[:-10], ["expected a Parquet file", "broken footer", "remove or replace"]),
    "footer": (broken(), ["expected a Parquet file", "broken footer", "remove or replace"]),
    "no caption": (PAIRS.select(["jpg"]), ["expected the caption column 'caption'", "found jpg", "pool.caption"]),
    "no image": (PAIRS.select(["caption"]), ["expected the image column 'jpg'", "found caption", "pool.image"]),
    "caption type": (
        pa.table({"jpg": [b"1"], "caption": [1]}),
        ["caption column 'caption': expected string, found int64", "convert it"],
    ),
    "image type": (
        pa.table({"jpg": ["1"], "caption": ["x"]}),
        ["image column 'jpg': expected binary or struct", "found string", "convert it"],
    ),
    "nested image": (pa.table({"jpg": [[b"1"]], "caption": ["x"]}), ["image column 'jpg'", "found list<", "convert"]),
    "struct image": (
        pa.table({"jpg": [{"path": "1.jpg"}], "caption": ["x"]}),
        ["image column 'jpg'", "found struct<path: string>", "convert it"],
    ),
    "image as struct": (
        pa.table({"jpg": [{"bytes": b"1"}], "caption": ["x"]}),
        ["expected the column types of the shards before it", "Field jpg", "binary", "one type in all shards"],
    ),
    "type drift": (
        PAIRS.append_column("width", pa.array(["1", "2"])),
        ["expected the column types of the shards before it", "Field width", "int64 vs string", "one type"],
    ),
    "our name": (PAIRS.append_column("curate", pa.array([1, 2])), ["has a column 'curate' already", "rename or drop"]),
    "repeated": (
        pa.Table.from_arrays([PAIRS["jpg"], PAIRS["caption"], PAIRS["jpg"]], names=["jpg", "caption", "jpg"]),
        ["expected each column once, found 'jpg' twice", "rename or drop"],
    ),
    "repeated extra": (
        pa.Table.from_arrays([*PAIRS.columns, PAIRS["jpg"], PAIRS["jpg"]], names=["jpg", "caption", "k", "k"]),
        ["expected each column once, found 'k' twice", "rename or drop"],
    ),
}


def write_any(path: Path, content: bytes | pa.Table) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
        return path
    return write(path, content)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_one_line(folder: Path, name: str) -> None:
    content, words = BAD[name]
    write(folder / "a.parquet", PAIRS.append_column("width", pa.array([1, 2])))
    path = write_any(folder / "b.parquet", content)
    line = line_about(folder)
    assert line.startswith(f"{path}: ")
    for word in words:
        assert word in line, line


def test_all_bad_shards_are_reported_together(folder: Path) -> None:
    write(folder / "00.parquet", PAIRS.append_column("width", pa.array([1, 2])))
    paths = [write_any(folder / f"{i:02d}.parquet", content) for i, (content, _) in enumerate(BAD.values(), 1)]
    found = {line.split(": ")[0] for line in lines_about(folder)}
    assert found == {str(path) for path in paths}
    assert len(lines_about(folder)) == len(paths)


def test_skipped_shards_are_left_out_and_listed(folder: Path) -> None:
    write(folder / "00.parquet", PAIRS.append_column("width", pa.array([1, 2])))
    for i, (content, _) in enumerate(BAD.values(), 1):
        write_any(folder / f"{i:02d}.parquet", content)
    reported = lines_about(folder)
    write(folder / "99.parquet")
    pool = inventory(folder, on_bad_shard="skip")
    assert [(shard.index, shard.name) for shard in pool.shards] == [(0, "00.parquet"), (1, "99.parquet")]
    assert pool.skipped == reported
    assert pool.schema.names == ["jpg", "caption", "width"]
    assert pool.rows == len(pairs_of(pool)) == 4


@pytest.mark.parametrize("on_bad_shard", ["fail", "skip"])
@pytest.mark.parametrize("contents", [[b""], [b"junk" * 9, b""], [PAIRS.append_column("curate", pa.array([1, 2]))]])
def test_a_pool_of_bad_shards_alone_is_refused(folder: Path, on_bad_shard: str, contents: list[Any]) -> None:
    for i, content in enumerate(contents):
        write_any(folder / f"{i}.parquet", content)
    lines = lines_about(folder, on_bad_shard=on_bad_shard)
    assert all(any(f"{i}.parquet" in line for line in lines) for i in range(len(contents)))


def test_missing_folders_are_reported_together(tmp_path: Path) -> None:
    lines = lines_about([str(tmp_path / "no"), str(tmp_path / "nope")])
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "no"), str(tmp_path / "nope")]


def test_an_empty_folder_is_refused(folder: Path) -> None:
    assert re.fullmatch(rf"{folder}: expected \*.parquet, .*; found nothing; .*", line_about(folder))


def test_only_shards_are_shards_and_the_rest_is_listed(folder: Path) -> None:
    others = ["_tmp.parquet", ".x.parquet", "a.parquet.tmp", "extensionless", "_SUCCESS", "README.md"]
    for name in [*others, "a.parquet"]:
        write(folder / name)
    pool = inventory(folder)
    assert [shard.name for shard in pool.shards] == ["a.parquet"]
    assert sorted(Path(name).name for name in pool.ignored) == sorted(others)


def test_symlink_loops_and_double_mentions_count_once(folder: Path) -> None:
    write(folder / "deep" / "a.parquet")
    write(folder / "b.parquet")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "again.parquet").symlink_to(folder / "b.parquet")
    assert inventory(folder).rows == 4
    twice = inventory([str(folder), str(folder / "b.parquet"), f"{folder}/*.parquet"])
    assert twice.rows == 4
    assert twice.fingerprint == inventory(folder).fingerprint


def test_a_list_of_paths_is_one_pool_whatever_its_order(folder: Path) -> None:
    write(folder / "x" / "a.parquet")
    write(folder / "y" / "a.parquet")
    pool = inventory([str(folder / "y"), str(folder / "x")])
    assert [shard.name for shard in pool.shards] == ["x/a.parquet", "y/a.parquet"]
    assert pool == inventory([str(folder / "x"), str(folder / "y")])


ODD_NAMES = ["two words", "ünïcödé 日本", "a#b", "100%", "%41", "what?", "a=b&c", "[1]", "{x}", "-rf", "quote'\"", "*"]


def test_odd_names_are_read_like_any_other(folder: Path) -> None:
    for i, name in enumerate(ODD_NAMES):
        write(folder / name / f"{name}.parquet", pa.table({"jpg": [b"%d" % i], "caption": [name]}))
    pool = inventory(folder)
    assert {caption.decode() for _, caption in pairs_of(pool) if caption} == set(ODD_NAMES)
    assert len({shard.key for shard in pool.shards}) == len(ODD_NAMES)
    for name in ODD_NAMES:
        if not set(name) & set("*?["):  # which are wildcards where a pool is named
            assert inventory(folder / name).rows == 1


@pytest.mark.parametrize("name", [b"\xff.parquet", b"a\nb.parquet"])
def test_a_name_that_no_message_could_carry_is_refused(folder: Path, name: bytes) -> None:
    os.rename(write(folder / "a.parquet"), os.fsencode(folder) + b"/" + name)
    line = line_about(folder)
    assert "expected a name in UTF-8 without control characters; rename the file" in line
    line.encode()


def test_footers_that_an_earlier_inventory_tells_of_are_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = PAIRS.append_column("more", pa.array([1, 2]))
    for name in "abc":
        write(folder / f"{name}.parquet", wider if name == "b" else PAIRS)
    first = Pool.from_bytes(inventory(folder).to_bytes(), "pool.json")
    assert len(first.schemas) == 2
    (folder / "b.parquet").unlink()
    write(folder / "a.parquet", PAIRS.slice(0, 1))  # another file by this name
    write(folder / "d.parquet", wider)
    read: list[str] = []
    whole = inventory_module._read_footer
    monkeypatch.setattr(
        inventory_module, "_read_footer", lambda file, how: read.append(Path(file.path).name) or whole(file, how)
    )
    found = take_inventory(PoolSection(path=str(folder)), known=first)
    assert sorted(read) == ["a.parquet", "d.parquet"]
    assert found == inventory(folder)


def test_progress_sees_every_footer(folder: Path) -> None:
    for i in range(3):
        write(folder / f"{i}.parquet")
    seen = []

    def progress(footers: Any, total: int) -> Any:
        for footer in footers:
            seen.append(total)
            yield footer

    take_inventory(PoolSection(path=str(folder)), progress=progress)
    assert seen == [3, 3, 3]


# --- row groups that are too large, and the way out --------------------------------------------------------------


def large(rows: int = 40, row_bytes: int = 100_000) -> pa.Table:
    noise = np.random.default_rng(0)
    return pa.table(
        {
            "jpg": [noise.bytes(row_bytes) for _ in range(rows)],
            "caption": pa.array([f"caption {i % 7}" for i in range(rows)]).dictionary_encode(),
            "width": pa.array(range(rows), pa.int16()),
        }
    ).replace_schema_metadata({"huggingface": "{}"})


def test_the_command_that_a_huge_row_group_is_answered_with_works(folder: Path, tmp_path: Path) -> None:
    path = write(folder / "it's large.parquet", large())
    line = line_about(folder, max_row_group_bytes=2**20)
    assert line.startswith(f"{path}: largest row group is 4,0")
    assert "the limit 1,048,576 (pool.max_row_group_bytes)" in line
    verb, *arguments = shlex.split(line.partition("run: curate ")[2])
    assert verb == "reshard"
    out = tmp_path / "out"
    command = [sys.executable, "-m", "curate.jobs.cli", verb, *arguments, "--rows", "15"]
    command[command.index("FOLDER")] = str(out)
    ended = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True)
    pool = inventory(out, max_row_group_bytes=2**20)
    assert ended.stdout.splitlines() == [shard.path for shard in pool.shards]
    assert [shard.rows for shard in pool.shards] == [15, 15, 10]
    assert pa.concat_tables([pq.read_table(shard.path) for shard in pool.shards]).equals(pq.read_table(path))
    assert pool.schema.metadata[b"huggingface"] == b"{}"


@pytest.mark.parametrize(("rows", "per_shard", "expected"), [(0, 5, [0]), (5, 5, [5]), (6, 5, [5, 1]), (700, 600, 0)])
def test_resharding_keeps_every_row(tmp_path: Path, rows: int, per_shard: int, expected: list[int] | int) -> None:
    table = large(rows, row_bytes=3)
    source = write(tmp_path / "a.parquet", table)
    made = list(reshard_file(str(source), tmp_path / "out", rows_per_shard=per_shard))
    assert [pq.read_metadata(path).num_rows for path in made] == (expected or [600, 100])
    assert pa.concat_tables([pq.read_table(path) for path in made]).equals(pq.read_table(source))
    footers = [pq.read_metadata(path) for path in made]
    assert all(footer.row_group(i).num_rows <= 256 for footer in footers for i in range(footer.num_row_groups))
    with pytest.raises(UserError, match="exists already; choose an empty folder"):
        list(reshard_file(str(source), tmp_path / "out", rows_per_shard=per_shard))


@pytest.mark.parametrize("content", [None, b"junk" * 10, b""])
def test_resharding_what_is_no_parquet_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(reshard_file(str(path), tmp_path / "out", rows_per_shard=5))
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: expected a Parquet file; ")
    assert not (tmp_path / "out").exists()


def test_resharding_what_is_damaged_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", large(40, 100), row_group_size=10)
    damage_page(path, "caption", 2)
    with pytest.raises(
        UserError, match=r"a\.parquet: expected readable rows, found a damaged page \(.*; replace"
    ) as caught:
        list(reshard_file(str(path), tmp_path / "out", rows_per_shard=10))
    assert len(caught.value.lines) == len(str(caught.value).splitlines()) == 1


# --- what the inventory remembers --------------------------------------------------------------------------------


def test_an_inventory_survives_storage(folder: Path, tmp_path: Path) -> None:
    write(folder / "ünï.parquet", PAIRS.append_column("k", pa.array([1, 2])))
    write(folder / "b.parquet", PAIRS.replace_schema_metadata({"huggingface": "{}"}))
    (folder / "c.parquet").write_bytes(b"")
    (folder / "README").write_text("x")
    pool = inventory(folder, uid="k", on_bad_shard="skip")
    assert pool.skipped
    assert pool.ignored
    assert Pool.from_bytes(pool.to_bytes(), "pool") == pool
    assert Pool.from_bytes(pool.to_bytes(), "pool").schema.equals(pool.schema, check_metadata=True)
    store = Store(str(tmp_path / "root"))
    store.put_bytes(f"pools/{pool.fingerprint}.json", pool.to_bytes())
    assert load_pool(store, pool.fingerprint).fingerprint == pool.fingerprint
    with pytest.raises(FileNotFoundError):
        load_pool(store, "other")


def test_the_fingerprint_changes_with_size_time_shards_and_columns(folder: Path) -> None:
    path = write(folder / "a.parquet", PAIRS.append_column("other", PAIRS["caption"]))
    os.utime(path, ns=(1, 1))
    prints = [inventory(folder).fingerprint]
    assert inventory(folder).fingerprint == prints[0]
    prints.append(inventory(folder, caption="other").fingerprint)
    os.utime(path, ns=(2, 2))
    prints.append(inventory(folder).fingerprint)
    write(path, PAIRS.append_column("another", PAIRS["caption"]))
    os.utime(path, ns=(1, 1))
    prints.append(inventory(folder).fingerprint)
    write(folder / "b.parquet")
    prints.append(inventory(folder).fingerprint)
    assert len(set(prints)) == len(prints)


def test_keys_of_shards_are_distinct_and_change_with_the_file(folder: Path) -> None:
    for name in ("a/x.parquet", "b/x.parquet", "c/x.parquet"):
        os.utime(write(folder / name), ns=(5, 5))
    shards = inventory(folder).shards
    assert len({shard.key for shard in shards}) == 3
    assert all(shard.key.startswith("x-") for shard in shards)
    os.utime(folder / "a/x.parquet", ns=(6, 6))
    changed = inventory(folder).shards
    assert [a.key == b.key for a, b in zip(shards, changed, strict=True)] == [False, True, True]


@pytest.mark.parametrize("name", ["日" * 80 + ".parquet", "x" * 247 + ".parquet", ".hidden.parquet"])
def test_a_key_names_a_file_that_can_be_written_and_listed(folder: Path, tmp_path: Path, name: str) -> None:
    shard = inventory(write(folder / name)).shards[0]  # named itself, a hidden file is a shard too
    store = Store(str(tmp_path / "root"))
    store.put_bytes(f"x/{shard.key}.parquet", b"")
    assert store.list("x") == [f"x/{shard.key}.parquet"]


# --- columns in the names of folders ------------------------------------------------------------------------------


def folders_of(folder: Path) -> Path:
    """A pool in three folders, one of whose files has the column itself."""
    own = PAIRS.append_column("lang", pa.array(["fr", "it"]))
    for name, table in {
        "lang=en/year=2024/a": PAIRS,
        "lang=K%C3%B6ln/year=__HIVE_DEFAULT_PARTITION__/a": PAIRS,
        "lang=xx/b": own,
        "=/plain=c": PAIRS,
    }.items():
        write(folder / f"{name}.parquet", table)
    return folder


def test_folders_give_columns(folder: Path) -> None:
    pool = inventory(folders_of(folder))
    expected = {
        "=/plain=c.parquet": [(None, None)] * 2,
        "lang=K%C3%B6ln/year=__HIVE_DEFAULT_PARTITION__/a.parquet": [("Köln", None)] * 2,
        "lang=en/year=2024/a.parquet": [("en", "2024")] * 2,
        "lang=xx/b.parquet": [("fr", None), ("it", None)],
    }
    assert [shard.name for shard in pool.shards] == sorted(expected)
    assert {pool.schema.field(name).type for name in ("lang", "year")} == {pa.string()}
    for shard in pool.shards:
        rows = [row for batch in read_batches(shard, None, batch_rows=1) for row in batch.to_pylist()]
        assert [(row.get("lang"), row.get("year")) for row in rows] == expected[shard.name]
        (batch,) = read_batches(shard, ["year", "caption"], batch_rows=9)
        assert set(batch.schema.names) <= {"year", "caption"}
        chosen = pieces_of(pool, picks_of(pool, [[(shard.index, 1), (shard.index, 0)]]))
        found = [(row["lang"], row["year"]) for piece in chosen for row in piece.to_pylist()]
        assert found == expected[shard.name]


def test_one_folder_alone_gives_its_column_too(folder: Path) -> None:
    folders_of(folder)
    for path in ("lang=en", "lang=en/year=2024/a.parquet", "lang=e*/**/*.parquet"):
        assert inventory(folder / path).schema.names[-2:] == ["lang", "year"]


def test_a_folder_cannot_have_the_name_of_our_column(folder: Path) -> None:
    assert "has a column 'curate' already" in line_about(write(folder / "curate=1/a.parquet").parent)


# --- files that change under us ----------------------------------------------------------------------------------


def read_all(shard: Shard) -> list[pa.RecordBatch]:
    return list(read_batches(shard, ["jpg"], batch_rows=1))


def test_batches_come_in_order_and_size(folder: Path) -> None:
    write(folder / "a.parquet", large(10, row_bytes=4), row_group_size=3)
    (shard,) = inventory(folder).shards
    batches = list(read_batches(shard, None, batch_rows=4))
    assert sum(batch.num_rows for batch in batches) == 10
    assert max(batch.num_rows for batch in batches) <= 4
    assert [row for batch in batches for row in batch.column("width").to_pylist()] == list(range(10))


def test_a_file_that_changed_since_the_inventory_is_not_read(folder: Path) -> None:
    path = write(folder / "a.parquet")
    (shard,) = inventory(folder).shards
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(InputChangedError, match=r"a\.parquet: expected .* bytes, version .*, found .*begin it anew"):
        read_all(shard)
    write(path, large(3))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputChangedError, match=r"expected .* bytes"):
        read_all(shard)
    path.unlink()
    with pytest.raises(InputChangedError, match="found no file"):
        read_all(shard)


def test_a_damaged_page_is_not_read_as_data(folder: Path) -> None:
    path = write(folder / "a.parquet", large(4, 50_000), compression="zstd", use_dictionary=False, row_group_size=2)
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[start : start + 4000] = b"\x55" * 4000
    path.write_bytes(data)
    pool = inventory(folder)  # the footer is intact
    with pytest.raises(InputChangedError) as caught:
        read_all(pool.shards[0])
    message = str(caught.value)
    assert f"{path}: expected 4 readable rows, found a damaged page in column 'jpg' after row 2 (" in message
    assert "replace the file, or move it out of the pool" in message
    assert "\n" not in message


@pytest.mark.parametrize("column", ["caption", "width"])
def test_the_column_that_is_damaged_is_named(folder: Path, column: str) -> None:
    path = write(folder / "a.parquet", large(40, 100), row_group_size=10)
    damage_page(path, column, 2)
    pool = inventory(folder, on_bad_shard="skip")
    assert Pool.from_bytes(pool.to_bytes(), "name") == pool
    assert pool.on_bad_shard == "skip"
    (shard,) = pool.shards
    with pytest.raises(ShardDamagedError, match=f"a damaged page in column '{column}' after row 20") as caught:
        for _ in read_batches(shard, None, batch_rows=10):
            pass
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.found) == (str(caught.value), caught.value.found)
    other = {"caption": "width", "width": "caption"}[column]
    assert sum(batch.num_rows for batch in read_batches(shard, ["jpg", other], batch_rows=10)) == 40


def test_a_footer_that_promises_other_rows_is_found_out(folder: Path) -> None:
    write(folder / "a.parquet")
    (shard,) = inventory(folder).shards
    lying = Shard(**(shard.__dict__ | {"rows": 3}))
    with pytest.raises(ShardDamagedError, match="expected 3 readable rows, found 2; replace the file"):
        read_all(lying)


# --- fuzzed files ------------------------------------------------------------------------------------------------

INSPECT = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from pathlib import Path
import pyarrow.parquet as pq
from curate.errors import CurateError, UserError
from curate.pool.inventory import take_inventory
from curate.pool.shards import read_batches
from curate.recipe import PoolSection
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps(path.name), end=" ", flush=True)
    sections = [PoolSection(path=str(path))]
    try:
        names = pq.read_schema(path).names  # any two columns, so that more than the names are looked at
        sections.append(PoolSection(path=str(path), image=names[0], caption=names[-1]))
    except Exception:
        pass
    for section in sections:
        try:
            pool = take_inventory(section)
            print("inventoried", end=" ")
            assert all(0 <= shard.rows for shard in pool.shards)
            for shard in pool.shards:
                for batch in read_batches(shard, None, batch_rows=1024):
                    pass
        except UserError as error:
            assert error.lines
            assert all(str(path) in line and "\\n" not in line and line.encode() for line in error.lines), error.lines
            print("refused", end=" ")
        except CurateError as error:
            assert str(path) in str(error) and "\\n" not in str(error), str(error)
            print("unreadable", end=" ")
    print(flush=True)
print("peak MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.skipif(not ODD.is_dir(), reason="needs the odd Parquet files")
def test_a_fuzzed_file_is_inventoried_or_one_line(tmp_path: Path) -> None:
    # In a process of its own, because what we exclude is its death.
    ended = subprocess.run(
        [sys.executable, "-c", INSPECT, str(ODD)], cwd=HOUSE, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-300:] + ended.stderr[-3000:]
    *files, peak = ended.stdout.splitlines()
    assert len(files) == len(list(ODD.iterdir()))
    assert all(line.endswith(("inventoried ", "refused ", "unreadable ")) for line in files)
    assert int(peak.split()[-1]) < 4096


def test_some_rows_are_read_from_the_row_groups_that_hold_them(tmp_path: Path) -> None:
    table = pa.table({"jpg": [b"%d" % i for i in range(100)], "caption": [str(i) for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    (shard,) = take_inventory(PoolSection(path=str(tmp_path))).shards
    for rows in ([], [0], [99], [6, 7], [3, 20, 21, 22, 98], list(range(100))):
        assert read_rows(shard, rows, ["caption"])["caption"].to_pylist() == [str(row) for row in rows]


@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view(), "struct"], ids=str)
@pytest.mark.parametrize("caption", [pa.string(), pa.large_string(), pa.string_view(), pa.binary_view()], ids=str)
def test_some_rows_of_any_type_are_read(tmp_path: Path, image: pa.DataType | str, caption: pa.DataType) -> None:
    """Of views, as Polars and arrow-rs write them, Arrow cannot take rows."""
    images = pa.array([b"a", None, b"c"])
    columns = {
        "jpg": pa.StructArray.from_arrays([images.cast(pa.binary_view())], ["bytes"])
        if image == "struct"
        else images.cast(image),
        "caption": pa.array(["x", "y", None]).cast(caption),
    }
    (shard,) = inventory(write(tmp_path / "a.parquet", pa.table(columns))).shards
    found = read_rows(shard, [1, 2], ["jpg", "caption"])
    assert image_bytes(found["jpg"].combine_chunks()).to_pylist() == [None, b"c"]
    assert caption_bytes(found["caption"].combine_chunks()).to_pylist() == [b"y", None]
