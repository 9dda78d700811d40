"""Rows are conserved: a tally that does not close cannot be built, a chain that does not join cannot be committed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import RowsLostError
from curate.tally import Tally, check_chain

REASONS = st.sampled_from(["image_empty", "caption_missing", "duplicate_exact"])
DROPPED = st.dictionaries(REASONS, st.integers(0, 10**12))


def tally(step: str, kept: int, dropped: dict[str, int]) -> Tally:
    return Tally(step=step, rows_in=kept + sum(dropped.values()), kept=kept, dropped=dropped)


@given(kept=st.integers(0, 10**12), dropped=DROPPED, lost=st.integers(-5, 5))
def test_a_tally_closes_or_cannot_be_built(kept: int, dropped: dict[str, int], lost: int) -> None:
    rows_in = kept + sum(dropped.values()) + lost
    if lost == 0:
        assert Tally(step="embed", rows_in=rows_in, kept=kept, dropped=dropped).rows_in == rows_in
        return
    with pytest.raises(RowsLostError) as caught:
        Tally(step="embed", rows_in=rows_in, kept=kept, dropped=dropped)
    for words in ("step embed", str(rows_in), str(rows_in - lost), str(dropped)):
        assert words in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 10**9), DROPPED), min_size=1, max_size=6))
def test_the_sum_of_tallies_is_the_tally_of_all_rows(parts: list[tuple[int, dict[str, int]]]) -> None:
    total = tally("embed", *parts[0])
    for kept, dropped in parts[1:]:
        total += tally("embed", kept, dropped)
    assert total.rows_in == sum(kept + sum(dropped.values()) for kept, dropped in parts)
    assert total.kept == sum(kept for kept, _ in parts)
    for reason in ("image_empty", "caption_missing", "duplicate_exact"):
        assert total.dropped.get(reason, 0) == sum(dropped.get(reason, 0) for _, dropped in parts)


def test_steps_are_not_mixed() -> None:
    with pytest.raises(AssertionError):
        tally("embed", 1, {}) + tally("dedup", 1, {})


@given(st.lists(st.tuples(st.sampled_from(["ok", "image_empty", "not_scored"]), st.integers(0, 99))))
def test_statuses_become_a_tally(statuses: list[tuple[str, int]]) -> None:
    found = Tally.of("embed", statuses)
    assert found.rows_in == sum(rows for _, rows in statuses)
    assert found.kept == sum(rows for status, rows in statuses if status == "ok")
    assert list(found.dropped) == sorted({status for status, _ in statuses} - {"ok"})
    for reason, rows in found.dropped.items():
        assert rows == sum(r for status, r in statuses if status == reason)


def test_json_is_the_same_whatever_the_order_of_reasons() -> None:
    a, b = tally("embed", 1, {"x": 1, "a": 2}), tally("embed", 1, {"a": 2, "x": 1})
    assert list(a.to_json()["dropped"]) == list(b.to_json()["dropped"]) == ["a", "x"]
    assert Tally(**a.to_json()) == a


# --- chains ------------------------------------------------------------------------------------------------------


@given(rows=st.integers(0, 10**9), drops=st.lists(st.integers(0, 10**6), max_size=5), data=st.data())
def test_a_chain_joins_or_is_refused(rows: int, drops: list[int], data: st.DataObject) -> None:
    chain, left = [], rows
    for i, drop in enumerate(drops):
        dropped = min(drop, left)
        chain.append(tally(f"step {i}", left - dropped, {"why": dropped}))
        left -= dropped
    check_chain(chain, rows=rows)
    if not chain:
        return
    broken = data.draw(st.integers(0, len(chain) - 1))
    shift = data.draw(st.integers(1, 5))
    chain[broken] = tally(f"step {broken}", chain[broken].kept + shift, dict(chain[broken].dropped))
    before = f"step {broken - 1}" if broken else "inventory"
    with pytest.raises(RowsLostError, match=rf"step {before} passed on .* step step {broken} took in"):
        check_chain(chain, rows=rows)


def test_an_empty_chain_accounts_for_nothing_and_is_no_mistake() -> None:
    check_chain([], rows=5)
