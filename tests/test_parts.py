"""Files of parts: each destination reads its own, no bit of it is believed that was not written."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.errors import DamagedError
from curate.parts import (
    by_destination,
    pack_arrays,
    pack_table,
    read_part,
    read_parts,
    remove_parts,
    unpack_arrays,
    unpack_table,
    write_parts,
)
from curate.storage import Store


def test_each_destination_reads_what_was_meant_for_it(root: str) -> None:
    store = Store(root)
    write_parts(store, "steps/x-0", [b"ab", b"", b"cde"], count=3)
    write_parts(store, "steps/x-1", [b"", b"", b"f"], count=3)
    assert [read_part(store, "steps/x-0", i) for i in range(3)] == [b"ab", b"", b"cde"]
    names = ["steps/x-0", "steps/x-1"]
    assert [list(read_parts(store, names, i)) for i in range(3)] == [[b"ab"], [], [b"cde", b"f"]]
    with pytest.raises(FileNotFoundError):
        read_part(store, "steps/x-2", 0)
    store.put_bytes("steps/other.json", b"")
    remove_parts(store, "steps/x")
    assert store.list("steps") == ["steps/other.json"]


def test_as_many_parts_as_destinations(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_parts(Store(str(tmp_path)), "x", [b"a"], count=2)
    assert Store(str(tmp_path)).list() == []


@settings(deadline=None, max_examples=40)
@given(
    parts=st.lists(st.binary(max_size=20), min_size=1, max_size=5), place=st.integers(0, 10**6), bit=st.integers(0, 7)
)
def test_a_flipped_bit_is_told_by_whoever_reads_it(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], place: int, bit: int
) -> None:
    store = Store(str(tmp_path_factory.mktemp("root")))
    write_parts(store, "x", parts, count=len(parts))
    data = bytearray(store.read_bytes("x"))
    data[place % len(data)] ^= 1 << bit
    store.put_bytes("x", bytes(data))
    found = [part_of(store, i) for i in range(len(parts))]
    assert sum(part is None for part in found) == 1
    assert [part or own for part, own in zip(found, parts, strict=True)] == parts


def part_of(store: Store, destination: int) -> bytes | None:
    """None if it is told that the part is damaged."""
    try:
        return read_part(store, "x", destination)
    except DamagedError:
        return None


@pytest.mark.parametrize("left", [0, 10, 24, 49])
def test_a_file_that_was_cut_is_told(tmp_path: object, left: int) -> None:
    store = Store(str(tmp_path))
    write_parts(store, "x", [b"ab", b"c"], count=2)
    store.put_bytes("x", store.read_bytes("x")[:left])
    with pytest.raises(DamagedError):
        [read_part(store, "x", i) for i in range(2)]


@given(numbers=st.lists(st.integers(-1, 4), max_size=30))
def test_rows_go_to_their_destinations_in_order(numbers: list[int]) -> None:
    found = list(by_destination(np.array(numbers, np.int64), 5, lambda at: bytes(at.astype(np.uint8))))
    assert [list(part) for part in found] == [[i for i, n in enumerate(numbers) if n == d] for d in range(5)]


def test_arrays_and_tables_come_back() -> None:
    arrays = [
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.zeros((2, 0), np.uint64),
        np.array([(1, 2.0), (3, 4.0)], [("a", "<i4"), ("b", "<f8")]),
    ]
    found = unpack_arrays(pack_arrays(*arrays))
    assert [array.dtype for array in found] == [array.dtype for array in arrays]
    assert [array.tolist() for array in found] == [array.tolist() for array in arrays]
    with pytest.raises(ValueError, match="Object arrays"):
        pack_arrays(np.array([object()]))
    table = pa.table({"jpg": [b"x", None], "n": [1, 2]})
    assert unpack_table(pack_table(table)) == table
