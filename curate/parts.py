"""Parts: what one task has for each of many others, in one file of which each of them reads its own range.

    entries  [n]: where the part for destination i starts, its size, its CRC-32, and that of the entry
    parts    one after the other

A task that runs again finds its file, and the others read it whoever wrote it: no row passes through memory that the
driver owns.
"""

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.errors import DamagedError
from curate.parquet import damage_told
from curate.storage import Store

ENTRY = np.dtype([("start", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("own", "<u4")])
READERS = 8
"""Files that are read at once: on an object store a small read is all waiting."""


def write_parts(store: Store, name: str, parts: Iterable[bytes], *, count: int) -> None:
    """Write the parts for `count` destinations, in their order, as they come."""
    entries = np.zeros(count, ENTRY)
    with store.local_scratch() as scratch:
        path = scratch / "parts"
        with path.open("wb") as file:
            file.write(entries.tobytes())
            for entry, part in zip(entries, parts, strict=True):
                entry["start"], entry["size"], entry["crc"] = file.tell(), len(part), zlib.crc32(part)
                entry["own"] = _crc_of(entry)
                file.write(part)
            file.seek(0)
            file.write(entries.tobytes())
        store.put_file(path, name)


def read_part(store: Store, name: str, destination: int) -> bytes:
    """The part of a file for one destination.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it is not what was written.
    """
    entry = np.frombuffer(_range(store, name, destination * ENTRY.itemsize, ENTRY.itemsize), ENTRY)[0]
    if _crc_of(entry) != entry["own"]:
        raise DamagedError(name, f"the entry of part {destination} has another CRC-32")
    part = _range(store, name, int(entry["start"]), int(entry["size"])) if entry["size"] else b""
    if zlib.crc32(part) != entry["crc"]:
        raise DamagedError(name, f"part {destination} has another CRC-32")
    return part


def read_parts(store: Store, names: Sequence[str], destination: int) -> Iterator[bytes]:
    """The parts for one destination, in the order of the files; empty ones are left out. Raises as `read_part`."""
    with ThreadPoolExecutor(READERS) as threads:
        yield from filter(None, threads.map(lambda name: read_part(store, name, destination), names))


def remove_parts(store: Store, prefix: str) -> None:
    """Remove the files whose names begin so and go on with a dash: all who wanted their parts have read them."""
    for name in store.list(prefix.rpartition("/")[0]):
        if name.startswith(f"{prefix}-"):
            store.delete(name)


def by_destination(
    numbers: npt.NDArray[np.int64], count: int, pack: Callable[[npt.NDArray[np.int64]], bytes]
) -> Iterator[bytes]:
    """For each destination its part.

    Args:
        numbers: [n] of each row its destination; rows whose number is negative go nowhere.
        count: of destinations.
        pack: makes a part of the rows at some positions, which ascend.
    """
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(count + 1))
    for start, stop in pairwise(ends):
        yield pack(order[start:stop]) if stop > start else b""


def pack_arrays(*arrays: npt.NDArray[np.generic]) -> bytes:
    """Arrays as bytes, of whatever shape and dtype without objects."""
    data = io.BytesIO()
    for array in arrays:
        np.lib.format.write_array(data, np.ascontiguousarray(array), allow_pickle=False)
    return data.getvalue()


def unpack_arrays(part: bytes) -> list[npt.NDArray[Any]]:
    """The inverse of `pack_arrays`."""
    data = io.BytesIO(part)
    found: list[npt.NDArray[Any]] = []
    while data.tell() < len(part):
        found.append(np.lib.format.read_array(data, allow_pickle=False))
    return found


def pack_table(table: pa.Table) -> bytes:
    """A table as bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpack_table(part: bytes) -> pa.Table:
    """The inverse of `pack_table`; its columns are views of the part."""
    return pa.ipc.open_stream(part).read_all()


def _crc_of(entry: np.void) -> int:
    return zlib.crc32(entry.tobytes()[: ENTRY.fields["own"][1]])  # type: ignore[index]


def _range(store: Store, name: str, start: int, size: int) -> bytes:
    with damage_told(name):
        data = store.read_range(name, start, start + size)
    if len(data) != size:
        raise DamagedError(name, f"{len(data)} of {size} bytes from {start} on")
    return data
