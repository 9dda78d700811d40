"""Laying the walk on a real Ray: exact boundaries and the same bytes, whatever the buckets, groups and shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embeddings import content_hash, embedding_name, embedding_schema
from curate.errors import UserError
from curate.pool import Columns, Pool, Shard
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.walk import END, Walk, super_batch_of, walk_folder, walk_keys
from pipelines import cluster
from pipelines import walk as walk_step
from pipelines.walk import lay_walk

pytestmark = pytest.mark.usefixtures("ray_local")

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
    return [int(key) for key in walk_keys(halves, seed=seed, epoch=epoch)]


def boundaries_literally(shards: Sequence[Sequence[Row]], size: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    keys = sorted(keys_of(list(originals(shards)), seed=seed, epoch=epoch))
    held = len(keys) // size
    found = [([0, *keys[1:], END])[i * size] for i in range(held + 1)]
    return tuple(found) if held else ()


def duplicates(store: Store, pool: Pool, *, seed: int, epoch: int, size: int) -> Iterator[tuple[Place, Place]]:
    folder = walk_folder(pool, SPEC, seed=seed, epoch=epoch, super_batch_size=size)
    for name in store.list(folder):
        if name.endswith(".parquet"):
            with store.open_input(name) as file:
                for row in pq.read_table(file).to_pylist():
                    yield (row["shard"], row["row"]), (row["duplicate_of_shard"], row["duplicate_of_row"])


@pytest.mark.parametrize(
    ("rows_per_bucket", "group_rows", "size"), [(2_000_000, 65_536, 7), (23, 40, 7), (10, 65_536, 1), (1, 1, 30)]
)
def test_every_super_batch_holds_b_distinct_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_bucket: int, group_rows: int, size: int
) -> None:
    monkeypatch.setattr(walk_step, "ROWS_PER_BUCKET", rows_per_bucket)
    monkeypatch.setattr(cluster, "GROUP_ROWS", group_rows)
    shards = crowded(1)
    store, pool = world(tmp_path, shards)
    walk = lay_walk(store, pool, SPEC, seed=3, epoch=2, super_batch_size=size)

    pairs = originals(shards)
    usable = sum(len(places) for places in pairs.values())
    assert walk.epoch == 2
    assert walk.candidates == len(pairs)
    assert walk.boundaries == boundaries_literally(shards, size, seed=3, epoch=2)
    assert walk.embedded.rows_in == pool.rows == sum(map(len, shards))
    assert walk.embedded.kept == walk.deduplicated.rows_in == usable
    assert walk.embedded.dropped == {
        reason: sum(status == reason for rows in shards for status, _ in rows)
        for reason in ("caption_missing", "image_empty")
    }
    assert walk.deduplicated.dropped == {"duplicate_exact": usable - len(pairs)}

    held = len(pairs) // size
    numbers = super_batch_of(np.array(keys_of(list(pairs), seed=3, epoch=2), np.uint64), walk.boundaries)
    assert np.bincount(numbers[numbers >= 0]).tolist() == [size] * held
    assert (numbers < 0).sum() == len(pairs) - held * size

    expected = {place: places[0] for places in pairs.values() for place in places[1:]}
    found = list(duplicates(store, pool, seed=3, epoch=2, size=size))
    assert len(found) == len(expected)
    assert dict(found) == expected


def test_buckets_and_groups_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid: set[bytes] = set()
    pointed: set[tuple[tuple[Place, Place], ...]] = set()
    for rows_per_bucket, group_rows in [(2_000_000, 65_536), (40, 1), (9, 50)]:
        monkeypatch.setattr(walk_step, "ROWS_PER_BUCKET", rows_per_bucket)
        monkeypatch.setattr(cluster, "GROUP_ROWS", group_rows)
        store, pool = world(tmp_path / str(rows_per_bucket), crowded(2))
        laid.add(lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=11).to_bytes())
        pointed.add(tuple(sorted(duplicates(store, pool, seed=0, epoch=0, size=11))))
    assert len(laid) == len(pointed) == 1


def test_the_order_of_the_shards_decides_originals_and_nothing_else(tmp_path: Path) -> None:
    shards = crowded(3)
    walks: list[Walk] = []
    for name, order in (("a", shards), ("b", shards[::-1])):
        store, pool = world(tmp_path / name, order)
        walks.append(lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=5))
        expected = {place: places[0] for places in originals(order).values() for place in places[1:]}
        assert dict(duplicates(store, pool, seed=0, epoch=0, size=5)) == expected
    assert walks[0] == walks[1]


def test_a_walk_that_is_laid_is_read_and_not_laid_again(tmp_path: Path) -> None:
    store, pool = world(tmp_path, crowded(4, (20, 20)))
    walk = lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=5)
    for shard in pool.shards:
        (tmp_path / embedding_name(SPEC.sha, shard)).unlink()
    assert lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=5) == walk


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
    walk = lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=size)
    assert len(walk.boundaries) == boundaries
    if boundaries:
        assert walk.boundaries == (0, END)


# --- uids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_bucket", [2_000_000, 2])
def test_uids_that_tell_pairs_apart_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_bucket: int) -> None:
    monkeypatch.setattr(walk_step, "ROWS_PER_BUCKET", rows_per_bucket)
    store, pool = world(tmp_path, [[("ok", 1), ("ok", 1)], [("ok", 2)]], uids=[["a", "b"], ["c"]])
    assert lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=1).candidates == 2


@pytest.mark.parametrize("rows_per_bucket", [2_000_000, 2])
def test_a_uid_that_two_rows_share_is_refused_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_bucket: int
) -> None:
    monkeypatch.setattr(walk_step, "ROWS_PER_BUCKET", rows_per_bucket)
    # An unusable row's uid counts as well: a dropped pair, too, is looked up by it.
    shards = [[("ok", 1), ("ok", 2)], [("image_empty", 3), ("ok", 4)]]
    store, pool = world(tmp_path, shards, uids=[["a", "b"], ["b", "c"]])
    with pytest.raises(UserError) as caught:
        lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=1)
    place, way_out = caught.value.lines
    assert place == "/pool/1.parquet: row 0: key is that of row 1 of /pool/0.parquet too"
    assert way_out == "pool.uid = 'key': 1 rows repeat a uid; name a column that tells pairs apart, or none"
    assert not store.list("walks")


def test_of_many_clashes_a_few_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    store, pool = world(tmp_path, [[("ok", i) for i in range(30)]], uids=[["same"] * 20 + [f"u{i}" for i in range(10)]])
    with pytest.raises(UserError) as caught:
        lay_walk(store, pool, SPEC, seed=0, epoch=0, super_batch_size=1)
    assert len(caught.value.lines) == walk_step.SHOWN_CLASHES + 1
    assert "19 rows repeat a uid" in caught.value.lines[-1]
