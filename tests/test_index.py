"""The index of a pool and the cuts of its windows: exact, and the same bytes whatever buckets, groups and shards."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embed.files import content_hash, embedding_name, embedding_schema
from curate.errors import UserError
from curate.models.spec import EncoderSpec
from curate.pipelines import index as index_step
from curate.pipelines import windows as windows_step
from curate.pipelines.index import index_pool
from curate.pipelines.records import Placed
from curate.pipelines.windows import cut_window
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.select.index import (
    Index,
    bucket_name,
    index_folder,
    look_up,
    read_duplicates,
    read_entries,
    read_index,
    uid_digest,
)
from curate.select.windows import END, Window, row_keys, super_batch_of
from curate.storage import Store
from tests.stand_in import without_ray

__all__ = ["without_ray"]
pytestmark = pytest.mark.usefixtures("without_ray")

SPEC = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=4, logit_scale=10.0, logit_bias=0.0)
Row = tuple[str, int]  # status, and which picture and caption: equal numbers are equal pairs
Place = tuple[int, int]  # shard, row


def contents_of(numbers: Sequence[int]) -> list[bytes]:
    return [content_hash(b"image %d" % number, b"caption") for number in numbers]


def world(
    folder: Path, shards: Sequence[Sequence[Row]], uids: Sequence[Sequence[str]] | None = None
) -> tuple[Store, Pool]:
    """A root that holds the embedding files of some shards; the shards themselves are not needed any more."""
    store = Store(str(folder))
    made = []
    for index, rows in enumerate(shards):
        shard = Shard(
            index=index,
            name=f"{index}.parquet",
            path=f"/pool/{index}.parquet",
            size=1,
            version="1",
            rows=len(rows),
            columns=Columns(image="jpg", caption="caption", uid=None),
        )
        made.append(shard)
        vectors = pa.array(
            [[1.0, 0, 0, 0] if status == "ok" else None for status, _ in rows], pa.list_(pa.float16(), 4)
        )
        digests = contents_of([number for _, number in rows])
        columns = {
            "uid": pa.array(uids[index] if uids else [digest.hex() for digest in digests], pa.string()),
            "status": pa.array([status for status, _ in rows], pa.string()),
            "error": pa.array([None] * len(rows), pa.string()),
            "content": pa.array(digests, pa.binary(16)),
            "picture": pa.array(digests, pa.binary(16)),
            "width": pa.nulls(len(rows), pa.int32()),
            "height": pa.nulls(len(rows), pa.int32()),
            "zimg": vectors,
            "ztxt": vectors,
        }
        with store.local_scratch() as scratch:
            pq.write_table(pa.table(columns, embedding_schema(4)), scratch / "x.parquet")
            store.put_file(scratch / "x.parquet", embedding_name(SPEC.sha, shard))
    columns_used = Columns(image="jpg", caption="caption", uid="key" if uids else None)
    return store, Pool(shards=tuple(made), columns=columns_used, schema=pa.schema([]), ignored=(), skipped=())


def crowded(seed: int, lengths: Sequence[int] = (40, 0, 61, 1, 58)) -> list[list[Row]]:
    """Shards, one of them empty, with duplicates within and across them and with unusable rows."""
    random = np.random.default_rng(seed)
    statuses = ["ok"] * 8 + ["image_empty", "caption_missing"]
    return [[(str(random.choice(statuses)), int(random.integers(90))) for _ in range(length)] for length in lengths]


def originals(shards: Sequence[Sequence[Row]]) -> dict[int, list[Place]]:
    """Usable places by pair, in the order of the inventory."""
    found: dict[int, list[Place]] = {}
    for shard, rows in enumerate(shards):
        for row, (status, number) in enumerate(rows):
            if status == "ok":
                found.setdefault(number, []).append((shard, row))
    return found


def keys_of(numbers: Sequence[int], *, seed: int, epoch: int) -> list[int]:
    halves = np.frombuffer(b"".join(contents_of(numbers)), "<u8").reshape(-1, 2)
    return [int(key) for key in row_keys(halves, seed=seed, epoch=epoch)]


def boundaries_literally(shards: Sequence[Sequence[Row]], size: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    keys = sorted(keys_of(list(originals(shards)), seed=seed, epoch=epoch))
    held = len(keys) // size
    found = [([0, *keys[1:], END])[i * size] for i in range(held + 1)]
    return tuple(found) if held else ()


def duplicates(store: Store, pool: Pool, index: Index) -> dict[Place, Place]:
    found = {}
    for shard in pool.shards:
        for row in read_duplicates(store, index, shard).to_pylist():
            found[row["shard"], row["row"]] = row["duplicate_of_shard"], row["duplicate_of_row"]
    return found


def expected_duplicates(shards: Sequence[Sequence[Row]]) -> dict[Place, Place]:
    return {place: places[0] for places in originals(shards).values() for place in places[1:]}


def whole(pool: Pool, index: Index) -> Window:
    return Window(shards=tuple(range(len(pool.shards))), candidates=sum(index.candidates))


def check_window(tmp_path: Path, rows_per_bucket: int, size: int) -> None:
    shards = crowded(1)
    store, pool = world(tmp_path, shards)
    index = index_pool(store, pool, SPEC, None, rows_per_bucket=rows_per_bucket)
    boundaries = cut_window(
        store,
        pool,
        SPEC,
        index,
        whole(pool, index),
        seed=3,
        epoch=2,
        super_batch_size=size,
        rows_per_bucket=rows_per_bucket,
    )
    pairs = originals(shards)
    usable = sum(len(places) for places in pairs.values())
    assert sum(index.candidates) == len(pairs)
    assert boundaries == boundaries_literally(shards, size, seed=3, epoch=2)
    placed = Placed(index=index, dedup=None)
    assert placed.embedded.rows_in == pool.rows == sum(map(len, shards))
    assert placed.embedded.kept == placed.deduplicated.rows_in == usable
    assert placed.embedded.dropped == {
        reason: sum(status == reason for rows in shards for status, _ in rows)
        for reason in ("caption_missing", "image_empty")
    }
    assert placed.deduplicated.dropped == {"duplicate_exact": usable - len(pairs)}

    held = len(pairs) // size
    numbers = super_batch_of(np.array(keys_of(list(pairs), seed=3, epoch=2), np.uint64), boundaries)
    assert np.bincount(numbers[numbers >= 0]).tolist() == [size] * held
    assert (numbers < 0).sum() == len(pairs) - held * size
    assert duplicates(store, pool, index) == expected_duplicates(shards)
    left = [PurePath(name) for folder in ("index", "windows") for name in tree(store, folder)]
    assert {path.suffix for path in left if len(path.parts) > 3 or "cut" in path.name} <= {".json", ".parquet"}


def tree(store: Store, folder: str) -> list[str]:
    found = store.list(folder)
    return found + [name for inner in found for name in tree(store, inner)]


@pytest.mark.parametrize(
    ("rows_per_bucket", "group_rows", "size"), [(2_000_000, 65_536, 7), (23, 40, 7), (10, 65_536, 1), (1, 1, 30)]
)
def test_every_super_batch_holds_b_distinct_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_bucket: int, group_rows: int, size: int
) -> None:
    monkeypatch.setattr(index_step, "LEAST_ROWS", group_rows)
    monkeypatch.setattr(windows_step, "GROUP_ROWS", group_rows)
    check_window(tmp_path, rows_per_bucket, size)


def test_the_same_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None) -> None:
    monkeypatch.undo()  # the stand-in
    check_window(tmp_path, 23, 7)


def test_buckets_and_groups_change_no_count_and_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows_per_bucket, group_rows in [(2_000_000, 65_536), (40, 1), (9, 50)]:
        monkeypatch.setattr(index_step, "LEAST_ROWS", group_rows)
        store, pool = world(tmp_path / str(rows_per_bucket), crowded(2))
        index = index_pool(store, pool, SPEC, None, rows_per_bucket=rows_per_bucket)
        found.append((index.statuses, index.usable, index.duplicates, duplicates(store, pool, index)))
    assert found[0] == found[1] == found[2]


def test_the_order_of_the_shards_decides_originals_and_nothing_else(tmp_path: Path) -> None:
    shards = crowded(3)
    indices = []
    for name, order in (("a", shards), ("b", shards[::-1])):
        store, pool = world(tmp_path / name, order)
        index = index_pool(store, pool, SPEC, None)
        indices.append(index)
        assert duplicates(store, pool, index) == expected_duplicates(order)
    assert indices[0].statuses == indices[1].statuses
    assert sum(indices[0].candidates) == sum(indices[1].candidates)


@pytest.mark.parametrize("rows_per_bucket", [2_000_000, 20])
def test_the_index_of_a_pool_that_grew_reads_new_shards_alone_and_is_that_from_scratch(
    tmp_path: Path, rows_per_bucket: int
) -> None:
    shards = crowded(5, (30, 20, 40, 25))
    store, grown = world(tmp_path / "grown", shards)
    # The shards that come later stand between the earlier ones, and before them.
    early = [grown.shards[i] for i in (1, 3)]
    first = replace(grown, shards=tuple(replace(shard, index=i) for i, shard in enumerate(early)))
    store.put_bytes(f"pools/{first.fingerprint}.json", first.to_bytes())
    index_pool(store, first, SPEC, None, rows_per_bucket=rows_per_bucket)
    for shard in early:
        (tmp_path / "grown" / embedding_name(SPEC.sha, shard)).unlink()
    found = index_pool(store, grown, SPEC, None, rows_per_bucket=rows_per_bucket)

    other, pool = world(tmp_path / "scratch", shards)
    expected = index_pool(other, pool, SPEC, None, rows_per_bucket=rows_per_bucket)
    assert replace(found, first_shards=expected.first_shards) == expected
    assert duplicates(store, grown, found) == expected_duplicates(shards)
    for number in range(expected.buckets):
        names = [bucket_name(index.folder, "contents", number) for index in (found, expected)]
        assert read_entries(store, names[0]).tolist() == read_entries(other, names[1]).tolist()


def test_an_index_that_is_made_is_read_and_not_made_again(tmp_path: Path) -> None:
    store, pool = world(tmp_path, crowded(4, (20, 20)))
    index = index_pool(store, pool, SPEC, None)
    cut = cut_window(store, pool, SPEC, index, whole(pool, index), seed=0, epoch=0, super_batch_size=5)
    for shard in pool.shards:
        (tmp_path / embedding_name(SPEC.sha, shard)).unlink()
    assert index_pool(store, pool, SPEC, None) == index
    assert cut_window(store, pool, SPEC, index, whole(pool, index), seed=0, epoch=0, super_batch_size=5) == cut


def test_a_content_is_looked_up(tmp_path: Path) -> None:
    shards = crowded(6)
    store, pool = world(tmp_path, shards)
    index = index_pool(store, pool, SPEC, None, rows_per_bucket=30)
    for number in range(95):
        places = [(s, r) for s, rows in enumerate(shards) for r, (_, n) in enumerate(rows) if n == number]
        assert sorted(look_up(store, index, "contents", contents_of([number])[0])) == places


@pytest.mark.parametrize(
    ("shards", "size", "boundaries"),
    [
        ([[("ok", 1), ("ok", 2)], [("ok", 3)]], 4, 0),  # fewer than one super-batch
        ([[("ok", 1), ("ok", 2)], [("ok", 1)]], 2, 2),  # exactly one, its end is the end
        ([[("image_empty", 1)], [("caption_missing", 2)]], 1, 0),  # nothing usable
        ([[]], 1, 0),
    ],
)
def test_small_pools(tmp_path: Path, shards: list[list[Row]], size: int, boundaries: int) -> None:
    store, pool = world(tmp_path, shards)
    index = index_pool(store, pool, SPEC, None)
    cut = cut_window(store, pool, SPEC, index, whole(pool, index), seed=0, epoch=0, super_batch_size=size)
    assert len(cut) == boundaries
    if boundaries:
        assert cut == (0, END)


# --- uids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_bucket", [2_000_000, 2])
def test_uids_that_tell_pairs_apart_pass_and_are_looked_up(tmp_path: Path, rows_per_bucket: int) -> None:
    store, pool = world(tmp_path, [[("ok", 1), ("ok", 1)], [("image_empty", 2)]], uids=[["a", "b"], ["c"]])
    index = index_pool(store, pool, SPEC, None, rows_per_bucket=rows_per_bucket)
    assert index.candidates == [1, 0]
    found = {uid: look_up(store, index, "uids", uid_digest(uid)) for uid in "abcd"}
    assert found == {"a": [(0, 0)], "b": [(0, 1)], "c": [(1, 0)], "d": []}


@pytest.mark.parametrize("rows_per_bucket", [2_000_000, 2])
def test_a_uid_that_two_rows_share_is_refused_with_both_places(tmp_path: Path, rows_per_bucket: int) -> None:
    # An unusable row's uid counts as well: a dropped pair, too, is looked up by it.
    shards = [[("ok", 1), ("ok", 2)], [("image_empty", 3), ("ok", 4)]]
    store, pool = world(tmp_path, shards, uids=[["a", "b"], ["b", "c"]])
    with pytest.raises(UserError) as caught:
        index_pool(store, pool, SPEC, None, rows_per_bucket=rows_per_bucket)
    place, way_out = caught.value.lines
    assert place == "/pool/1.parquet: row 0: key is that of row 1 of /pool/0.parquet too"
    assert way_out == (
        "pool.uid = 'key': 1 rows repeat a uid; name a column that tells pairs apart, or none, and delete the round's "
        "folder to begin it anew"
    )
    assert read_index(store, index_folder(SPEC, None, pool)) is None


def test_of_many_clashes_a_few_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    store, pool = world(tmp_path, [[("ok", i) for i in range(30)]], uids=[["same"] * 20 + [f"u{i}" for i in range(10)]])
    with pytest.raises(UserError) as caught:
        index_pool(store, pool, SPEC, None)
    assert len(caught.value.lines) == index_step.SHOWN_CLASHES + 1
    assert "19 rows repeat a uid" in caught.value.lines[-1]
