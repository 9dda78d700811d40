"""The walk: uniform keys from content, an order that a plain sort agrees with, and ranges that never overlap."""

import bisect
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.pool import Columns, Pool, Shard
from curate.spec import EncoderSpec
from curate.storage import Store
from curate.tally import Tally
from curate.walk import (
    END,
    ROW,
    Rows,
    UInt64s,
    Walk,
    WalkRange,
    in_walk_order,
    next_range,
    read_walk,
    super_batch_of,
    walk_folder,
    walk_keys,
    walk_rows,
)
from pipelines.keys import KeyRange

SPEC = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=4, logit_scale=10.0, logit_bias=0.0)
GOLDEN = ["d048df9fbbea3ab1", "483651459155626d", "a0e9091e24a2f9c2", "78f3fa84836205fb"]
KEYS = st.one_of(st.integers(0, END - 1), st.sampled_from([0, 1, 2**63 - 1, 2**63, END - 2, END - 1]))


def counted(n: int) -> UInt64s:
    """Contents that differ in few bits: the hardest for a hash to spread."""
    return np.stack([np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)], axis=1)


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("shift", [0, 20, 56])
def test_keys_are_uniform_even_if_contents_are_not(half: int, shift: int) -> None:
    n, cells = 200_000, 256
    content = np.zeros((n, 2), np.uint64)
    content[:, half] = np.arange(n, dtype=np.uint64)
    keys = walk_keys(content, seed=0, epoch=0)
    assert len(np.unique(keys)) == n
    counts = np.bincount(((keys >> np.uint64(shift)) & np.uint64(cells - 1)).astype(int), minlength=cells)
    chi2 = ((counts - n / cells) ** 2 / (n / cells)).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6; far below is as suspicious as far above.
    assert 150 < chi2 < 370


def test_neighbouring_keys_are_independent() -> None:
    keys = walk_keys(counted(100_000), seed=3, epoch=1) / float(END)
    assert abs(np.corrcoef(keys[1:], keys[:-1])[0, 1]) < 0.015


def test_equal_content_has_equal_keys_and_either_half_changes_them() -> None:
    content = np.array([[1, 2], [1, 2], [2, 1], [1, 3], [0, 2]], np.uint64)
    keys = walk_keys(content, seed=0, epoch=0)
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 4
    assert np.array_equal(keys[[3, 0]], walk_keys(content[[3, 0]], seed=0, epoch=0))  # whatever stands beside it


def test_another_seed_or_epoch_is_another_order() -> None:
    content = counted(1000)
    order = {
        (seed, epoch): tuple(np.argsort(walk_keys(content, seed=seed, epoch=epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(order.values())) == 4


def test_keys_never_change_between_versions() -> None:
    # A root outlives the program that began it: other keys would walk through the same pairs again.
    keys = walk_keys(np.array([[0, 0], [1, 0], [0, 1], [END - 1, END - 1]], np.uint64), seed=7, epoch=3)
    assert [f"{key:016x}" for key in keys.tolist()] == GOLDEN


# --- order and representatives -----------------------------------------------------------------------------------


def order_literally(rows: Rows) -> tuple[list[int], list[int]]:
    """The same by Python's own sort and a dictionary."""
    order = sorted(
        range(len(rows)), key=lambda i: [int(rows[name][i]) for name in ("key", "low", "high", "shard", "row")]
    )
    first: dict[tuple[int, int], int] = {}
    representative = []
    for place, i in enumerate(order):
        representative.append(first.setdefault((int(rows["low"][i]), int(rows["high"][i])), place))
    return order, representative


@given(data=st.data(), contents=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_the_order_agrees_with_a_literal_sort(data: st.DataObject, contents: list[tuple[int, int]]) -> None:
    places = data.draw(st.permutations([(i % 4, i // 4) for i in range(len(contents))]))
    halves = np.array(contents, np.uint64).reshape(-1, 2)
    rows = walk_rows(halves, 0, np.array([row for _, row in places], np.int64), seed=1, epoch=0)
    rows["shard"] = [shard for shard, _ in places]
    if data.draw(st.booleans()):
        rows["key"] &= np.uint64(1)  # contents that share a key, which 64 bits make rare
    order, representative = in_walk_order(rows)
    assert (order.tolist(), representative.tolist()) == order_literally(rows)
    walked = rows[order]
    for place, first in enumerate(representative.tolist()):
        same = [r for r in rows.tolist() if r[1:3] == walked[place].tolist()[1:3]]
        # the original of a duplicate is the first of the inventory
        assert walked[first].tolist()[3:] == min(r[3:] for r in same)
    # and the same whatever order the rows were found in
    mixed = data.draw(st.permutations(range(len(rows))))
    again = rows[list(mixed)]
    assert again[in_walk_order(again)[0]].tolist() == walked.tolist()


def test_two_contents_with_one_key_stay_two() -> None:
    rows = np.zeros(4, ROW)
    rows["low"] = [1, 2, 1, 2]
    rows["row"] = np.arange(4)
    order, representative = in_walk_order(rows)
    assert order.tolist() == [0, 2, 1, 3]
    assert representative.tolist() == [0, 0, 2, 2]


def test_no_rows_are_in_order() -> None:
    order, representative = in_walk_order(np.empty(0, ROW))
    assert order.tolist() == representative.tolist() == []


# --- which super-batch -------------------------------------------------------------------------------------------


def number_literally(key: int, boundaries: Sequence[int]) -> int:
    number = bisect.bisect_right(boundaries, key) - 1
    return number if number < len(boundaries) - 1 else -1


@given(keys=st.lists(KEYS, max_size=20), inner=st.sets(KEYS, max_size=6), closing=st.booleans(), data=st.data())
def test_super_batches_agree_with_bisection(
    keys: list[int], inner: set[int], closing: bool, data: st.DataObject
) -> None:
    boundaries = sorted(inner) + ([END] if closing else [])
    keys += inner
    found = super_batch_of(np.array(keys, np.uint64), boundaries)
    assert found.tolist() == [number_literally(key, boundaries) for key in keys]
    # A round holds a part of the walk's boundaries, and its numbers begin at 0.
    if len(boundaries) > 1:
        start = data.draw(st.integers(0, len(boundaries) - 2))
        part = boundaries[start:]
        expected = [max(-1, number - start) for number in found.tolist()]
        assert super_batch_of(np.array(keys, np.uint64), part).tolist() == expected


def test_nothing_is_in_no_super_batch() -> None:
    assert super_batch_of(np.array([0, 5], np.uint64), ()).tolist() == [-1, -1]
    assert super_batch_of(np.array([], np.uint64), (0, 5, END)).tolist() == []


@given(contents=st.lists(st.tuples(KEYS, KEYS), min_size=1, max_size=20), ends=st.sets(KEYS, min_size=2, max_size=2))
def test_what_a_key_range_wants_is_what_falls_into_its_super_batches(
    contents: list[tuple[int, int]], ends: set[int]
) -> None:
    halves = np.array(contents, np.uint64)
    for low, high in (sorted(ends), (min(ends), END), (0, END)):
        wanted = KeyRange(seed=5, epoch=2, low=low, high=high).wanted(halves)
        numbers = super_batch_of(walk_keys(halves, seed=5, epoch=2), (low, high))
        assert wanted.tolist() == (numbers == 0).tolist()


def test_key_ranges_at_a_key_itself() -> None:
    halves = counted(3)
    key = int(walk_keys(halves, seed=0, epoch=0)[1])
    at = {
        (low, high): KeyRange(seed=0, epoch=0, low=low, high=high).wanted(halves)[1]
        for low, high in [(key, key + 1), (0, key), (key + 1, END), (key, END)]
    }
    assert list(at.values()) == [True, False, False, True]
    scopes = {KeyRange(seed=s, epoch=e, low=low, high=END).scope for s in (0, 1) for e in (0, 1) for low in (0, 1)}
    assert len(scopes) == 8


# --- where the next round walks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("previous", "candidates", "super_batches", "same_pool", "expected"),
    [
        (None, 100, 3, True, (0, 0, 3)),  # the first round
        (None, 100, None, True, (0, 0, 10)),  # all that the pool holds
        (None, 109, None, True, (0, 0, 10)),  # whole super-batches only
        ((0, 0, 3), 100, 3, True, (0, 3, 3)),  # on
        ((0, 3, 3), 100, 4, True, (0, 6, 4)),  # to the very end
        ((0, 6, 3), 100, 3, True, (1, 0, 3)),  # one is left, three are wanted: a new epoch
        ((0, 0, 10), 100, None, True, (1, 0, 10)),  # used up
        ((4, 7, 3), 100, 1, True, (5, 0, 1)),
        ((0, 0, 3), 100, 2, True, (0, 3, 2)),  # a round of another length
        ((0, 0, 3), 100, 3, False, (1, 0, 3)),  # another pool or B: its keys cut elsewhere
        ((2, 3, 3), 40, 3, False, (3, 0, 3)),  # a smaller pool
        (None, 9, None, True, None),  # not one super-batch
        (None, 0, None, True, None),
        (None, 100, 11, True, None),  # more than an epoch holds
        ((0, 0, 3), 29, 3, True, None),
        ((0, 0, 3), 9, None, False, None),
    ],
)
def test_next_range(
    previous: tuple[int, int, int] | None,
    candidates: int,
    super_batches: int | None,
    same_pool: bool,
    expected: tuple[int, int, int] | None,
) -> None:
    def as_range(place: tuple[int, int, int] | None) -> WalkRange | None:
        return place and WalkRange(epoch=place[0], start=place[1], super_batches=place[2])

    found = next_range(
        as_range(previous), candidates=candidates, super_batch_size=10, super_batches=super_batches, same_pool=same_pool
    )
    assert found == as_range(expected)


@given(held=st.integers(1, 30), wishes=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_rounds_walk_without_replacement(held: int, wishes: list[int]) -> None:
    seen: set[tuple[int, int]] = set()
    at = None
    for wish in wishes:
        found = next_range(at, candidates=held * 7 + 3, super_batch_size=7, super_batches=wish)
        if wish > held:
            assert found is None
            continue
        assert found is not None
        assert found.super_batches == wish
        assert found.stop <= held
        taken = {(found.epoch, number) for number in range(found.start, found.stop)}
        assert not taken & seen
        if at is not None and found.epoch > at.epoch:
            assert at.stop + wish > held, "a new epoch before the old one was used up"
        seen |= taken
        at = found


# --- what is stored ----------------------------------------------------------------------------------------------


def pool_of(*names: str) -> Pool:
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = [Shard(index=i, name=n, path=n, size=1, version="1", rows=1, columns=columns) for i, n in enumerate(names)]
    return Pool(shards=tuple(shards), columns=columns, schema=pa.schema([]), ignored=(), skipped=())


def test_a_walk_survives_storage(tmp_path: object) -> None:
    store = Store(str(tmp_path))
    walk = Walk(
        epoch=3,
        embedded=Tally(step="embed", rows_in=5, kept=4, dropped={"image_empty": 1}),
        deduplicated=Tally(step="dedup", rows_in=4, kept=3, dropped={"duplicate_exact": 1}),
        boundaries=(0, 2**63 + 1, END),
    )
    assert read_walk(store, "walks/x") is None
    store.put_bytes("walks/x/walk.json", walk.to_bytes())
    assert read_walk(store, "walks/x") == walk
    assert walk.candidates == 3
    assert WalkRange(**json.loads(json.dumps(WalkRange(epoch=1, start=2, super_batches=3).to_json()))).stop == 5


def test_whatever_decides_a_walk_names_its_folder() -> None:
    other = EncoderSpec(**(SPEC.to_json() | {"model": "n"}))
    settings = {"seed": 0, "epoch": 0, "super_batch_size": 10}
    folders = [
        walk_folder(pool_of("a"), SPEC, **settings),
        walk_folder(pool_of("b"), SPEC, **settings),
        walk_folder(pool_of("a"), other, **settings),
        *(walk_folder(pool_of("a"), SPEC, **(settings | {name: 77})) for name in settings),
    ]
    assert len(set(folders)) == len(folders)
    assert walk_folder(pool_of("a"), SPEC, **settings) == folders[0]
