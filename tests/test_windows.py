"""Windows: uniform keys from content, runs of shards that lose none, and ranges that never overlap."""

import bisect
import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.pool.columns import Columns
from curate.pool.shards import Shard
from curate.select.windows import (
    END,
    EpochRange,
    UInt64s,
    Window,
    cut_name,
    key_order,
    keyed_rows,
    next_range,
    read_cut,
    row_keys,
    stretches,
    super_batch_of,
    windows_of,
    write_cut,
)
from curate.storage import Store

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
    keys = row_keys(content, seed=0, epoch=0)
    assert len(np.unique(keys)) == n
    counts = np.bincount(((keys >> np.uint64(shift)) & np.uint64(cells - 1)).astype(int), minlength=cells)
    chi2 = ((counts - n / cells) ** 2 / (n / cells)).sum()
    # 255 degrees of freedom: mean 255, standard deviation 22.6; far below is as suspicious as far above.
    assert 150 < chi2 < 370


def test_neighbouring_keys_are_independent() -> None:
    keys = row_keys(counted(100_000), seed=3, epoch=1) / float(END)
    assert abs(np.corrcoef(keys[1:], keys[:-1])[0, 1]) < 0.015


def test_equal_content_has_equal_keys_and_either_half_changes_them() -> None:
    content = np.array([[1, 2], [1, 2], [2, 1], [1, 3], [0, 2]], np.uint64)
    keys = row_keys(content, seed=0, epoch=0)
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 4
    assert np.array_equal(keys[[3, 0]], row_keys(content[[3, 0]], seed=0, epoch=0))  # whatever stands beside it


def test_another_seed_or_epoch_is_another_order() -> None:
    content = counted(1000)
    order = {
        (seed, epoch): tuple(np.argsort(row_keys(content, seed=seed, epoch=epoch)).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(order.values())) == 4


def test_keys_never_change_between_versions() -> None:
    # A root outlives the program that began it: other keys would draw the same pairs again.
    keys = row_keys(np.array([[0, 0], [1, 0], [0, 1], [END - 1, END - 1]], np.uint64), seed=7, epoch=3)
    assert [f"{key:016x}" for key in keys.tolist()] == GOLDEN


# --- order ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), contents=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60, unique=True))
def test_the_order_agrees_with_a_literal_sort(data: st.DataObject, contents: list[tuple[int, int]]) -> None:
    rows = keyed_rows(np.array(contents, np.uint64).reshape(-1, 2), 3, np.arange(len(contents)), seed=1, epoch=0)
    if data.draw(st.booleans()):
        rows["key"] &= np.uint64(1)  # contents that share a key, which 64 bits make rare
    expected = sorted(rows.tolist())
    assert rows[key_order(rows)].tolist() == expected
    again = rows[data.draw(st.permutations(range(len(rows))))]  # and the same in whatever order the rows came
    assert again[key_order(again)].tolist() == expected


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
    # A round holds a part of a window's boundaries, and its numbers begin at 0.
    if len(boundaries) > 1:
        start = data.draw(st.integers(0, len(boundaries) - 2))
        part = boundaries[start:]
        expected = [max(-1, number - start) for number in found.tolist()]
        assert super_batch_of(np.array(keys, np.uint64), part).tolist() == expected


def test_nothing_is_in_no_super_batch() -> None:
    assert super_batch_of(np.array([0, 5], np.uint64), ()).tolist() == [-1, -1]
    assert super_batch_of(np.array([], np.uint64), (0, 5, END)).tolist() == []


# --- windows --------------------------------------------------------------------------------------------------------


def shards_of(names: Sequence[str]) -> list[Shard]:
    columns = Columns(image="jpg", caption="caption", uid=None)
    return [Shard(index=i, name=n, path=n, size=1, version="1", rows=1, columns=columns) for i, n in enumerate(names)]


@given(
    candidates=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    window_rows=st.integers(1, 300),
    least=st.integers(1, 6),
)
def test_windows_hold_each_shard_once_and_enough_of_them(candidates: list[int], window_rows: int, least: int) -> None:
    shards = shards_of([f"{i}" for i in range(len(candidates))])
    windows = windows_of(shards, candidates, seed=1, epoch=2, window_rows=window_rows, least_shards=least)
    assert sorted(i for window in windows for i in window.shards) == list(range(len(shards)))
    assert [window.candidates for window in windows] == [sum(candidates[i] for i in w.shards) for w in windows]
    if len(windows) > 1:
        assert all(window.candidates >= window_rows and len(window.shards) >= least for window in windows)
        # No longer than they must be, but for the last, which takes what is left.
        for window in windows[:-1]:
            smallest = min(candidates[i] for i in window.shards)
            assert window.candidates - smallest < window_rows + max(candidates) or len(window.shards) == least


def test_a_window_of_the_whole_pool() -> None:
    (window,) = windows_of(shards_of("abc"), [3, 0, 5], seed=0, epoch=0, window_rows=None)
    assert window == Window(shards=(0, 1, 2), candidates=8)


def test_every_epoch_and_seed_orders_the_shards_anew_and_listing_does_not_matter() -> None:
    names = [f"{i:02}" for i in range(12)]

    def runs(names: Sequence[str], seed: int, epoch: int) -> list[set[str]]:
        found = windows_of(shards_of(names), [1] * 12, seed=seed, epoch=epoch, window_rows=3, least_shards=1)
        return [{names[i] for i in window.shards} for window in found]

    orders = [runs(names, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert runs(names[::-1], 0, 0) == orders[0]


@given(
    candidates=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    size=st.integers(1, 9),
    data=st.data(),
)
def test_stretches_are_what_a_range_takes_of_each_window(candidates: list[int], size: int, data: st.DataObject) -> None:
    windows = [Window(shards=(i,), candidates=rows) for i, rows in enumerate(candidates)]
    # One after the other: which window, and which super-batch of it.
    literal = [(i, number) for i, rows in enumerate(candidates) for number in range(rows // size)]
    start = data.draw(st.integers(0, len(literal)))
    stop = data.draw(st.integers(start, len(literal)))
    found = stretches(windows, EpochRange(epoch=0, start=start, super_batches=stop - start), size)
    taken = [(s.window.shards[0], number) for s in found for number in range(s.start, s.start + s.super_batches)]
    assert taken == literal[start:stop]
    assert [s.first for s in found] == [sum(s.super_batches for s in found[:i]) for i in range(len(found))]


# --- where the next round is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("previous", "candidates", "super_batches", "same", "expected"),
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
    same: bool,
    expected: tuple[int, int, int] | None,
) -> None:
    def as_range(place: tuple[int, int, int] | None) -> EpochRange | None:
        return place and EpochRange(epoch=place[0], start=place[1], super_batches=place[2])

    found = next_range(as_range(previous), held=candidates // 10, super_batches=super_batches, same=same)
    assert found == as_range(expected)


@given(held=st.integers(1, 30), wishes=st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_rounds_take_each_super_batch_of_an_epoch_once(held: int, wishes: list[int]) -> None:
    seen: set[tuple[int, int]] = set()
    at = None
    for wish in wishes:
        found = next_range(at, held=held, super_batches=wish)
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


def test_a_cut_survives_storage(tmp_path: object) -> None:
    store = Store(str(tmp_path))
    assert read_cut(store, "windows/x/cut.json") is None
    write_cut(store, "windows/x/cut.json", (0, 2**63 + 1, END))
    assert read_cut(store, "windows/x/cut.json") == (0, 2**63 + 1, END)
    assert EpochRange(**json.loads(json.dumps(EpochRange(epoch=1, start=2, super_batches=3).to_json()))).stop == 5


def test_whatever_decides_a_cut_names_it() -> None:
    settings = {"seed": 0, "epoch": 0, "super_batch_size": 10}
    names = [
        cut_name("index/a", shards_of("ab"), **settings),
        cut_name("index/b", shards_of("ab"), **settings),
        cut_name("index/a", shards_of("ac"), **settings),
        *(cut_name("index/a", shards_of("ab"), **(settings | {name: 77})) for name in settings),
    ]
    assert len(set(names)) == len(names)
    assert cut_name("index/a", shards_of("ab"), **settings) == names[0]
