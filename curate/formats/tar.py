"""WebDataset tars, as img2dataset and DataComp leave them: groups are samples, so that no neighbour is read with one.

Consecutive members that share a name up to its first dot are one sample, a row:

    key      string         that name
    image    binary         the first member that is a picture by its suffix
    txt      string         a column for each other suffix; text if the suffix is one of text, else binary
    json     string         as it is: `pool.caption = "json.caption"` takes a caption out of it

Of a tar with img2dataset's Parquet file of the same name beside it, that file's rows are the rows, in its order, and
its columns come first: it tells of what was not downloaded, too.

A tar has no index. Where its members begin is looked up once, header by header, and kept in a file (`index_url`).
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curate import access
from curate.errors import UserError
from curate.parquet import open_parquet
from curate.storage import Store

TAR = ".tar"
KEY, IMAGE = "key", "image"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "ppm")
"""Suffixes of members that are pictures, whether or not they can be decoded: those that cannot are rows as well."""
TEXTS = ("txt", "text", "caption", "cls", "json", "url")
GAP_BYTES = 2**16
"""That are read and thrown away between two members rather than sought over."""
RUN_BYTES = 2**25
"""That are read at once, at most, but for one member that is larger."""
HELD_INDICES = 256
"""About a megabyte each, of a tar of ten thousand samples."""
DIGEST_BYTES = 32
"""SHA-256 of the index, a Parquet file, before it."""
END_BYTES = 2**20
"""Of zeros at the end of a tar, at most, in which something else is looked for."""

Ints = npt.NDArray[np.int64]


def index_url(folder: str, path: str, size: int, version: str) -> str:
    """Where the index of a tar, as it and its side-car are now, is kept in a folder of indices."""
    identity = hashlib.blake2b(json.dumps([path, size, version]).encode(), digest_size=12).hexdigest()
    return f"{folder}/{identity}.index"


class TarSource:
    """A `Source` of an opened tar.

    Args:
        path: of the tar.
        file: the same, opened.
        index: of `make_index`.
        beside: the rows of the side-car.
        order: the sample of each of them, -1 if the tar has none.
    """

    def __init__(
        self, path: str, file: io.BufferedIOBase, index: pa.Table, beside: pa.Table | None, order: Ints | None
    ) -> None:
        self._path = path
        self._file = file
        members = [name.removeprefix("offset:") for name in index.schema.names if name.startswith("offset:")]
        order = np.arange(len(index)) if order is None else order
        # One more at the end of each, for the rows whose place is -1.
        self._where = {
            name: tuple(np.append(index[f"{part}:{name}"].to_numpy(), -1)[order] for part in ("offset", "size"))
            for name in members
        }
        """Offset and size of each row's member, by column; -1 where it has none."""
        self._beside = index.select([KEY]) if beside is None else beside
        self._own = [name for name in members if name not in self._beside.schema.names]
        fields = [pa.field(name, _type_of(name)) for name in self._own]
        self.schema: pa.Schema = pa.schema([*self._beside.schema, *fields])
        self.groups: Ints = np.ones(len(order), np.int64)
        sizes = sum((np.maximum(size, 0) for _, size in self._where.values()), np.zeros(len(order), np.int64))
        self.largest_group: int = int(sizes.max(initial=0))

    def batches(
        self, groups: Sequence[int] | None, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """As `Source` has it."""
        rows = np.arange(len(self.groups)) if groups is None else np.asarray(groups, np.int64)
        schema = pa.schema([field for field in self.schema if columns is None or field.name in columns])
        beside = self._beside.select([name for name in schema.names if name not in self._own])
        for start in range(0, len(rows), batch_rows):
            some = rows[start : start + batch_rows]
            yield self._batch(some, beside.take(pa.array(some)).combine_chunks(), schema)

    def _batch(self, rows: Ints, beside: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
        own = [name for name in schema.names if name in self._own]
        extents = [(*self._where[name], name) for name in own]
        wanted = [
            (int(offsets[row]), int(sizes[row]), name, place)
            for place, row in enumerate(rows.tolist())
            for offsets, sizes, name in extents
            if offsets[row] >= 0
        ]
        found: dict[str, list[bytes | None]] = {name: [None] * len(rows) for name in own}
        runs = list(_runs(sorted(wanted)))
        ranges = [(run[0][0], max(offset + size for offset, size, _, _ in run)) for run in runs]
        for run, (begin, _), data in zip(runs, ranges, self._read(ranges), strict=True):
            for offset, size, name, place in run:
                found[name][place] = data[offset - begin : offset - begin + size]
        arrays = [
            _array(found[field.name], field.type) if field.name in found else beside[field.name].combine_chunks()
            for field in schema
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _read(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Some ranges of the tar. From an object store these alone, at once: its file is read ahead by megabytes."""
        if not access.is_local(self._path):
            yield from access.read_ranges(self._path, ranges)
            return
        for begin, end in ranges:
            self._file.seek(begin)
            yield self._file.read(end - begin)


@contextlib.contextmanager
def open_tar(path: str, *, index: str = "", side_car: str = "") -> Iterator[TarSource]:
    """Open a tar.

    Args:
        path: of the tar.
        index: where its index is, or will be looked for; it is made anew where it is not there.
        side_car: its Parquet file, if it has one.

    Raises:
        ValueError, tarfile.TarError, OSError: it is no tar, or is cut off, or is not what its side-car tells of.
    """
    with access.open_input(path) as file:
        beside, order = _side_car(side_car, path, index) if side_car else (None, None)
        yield TarSource(path, file, _index(path, index), beside, order)


@functools.lru_cache(HELD_INDICES)
def _index(path: str, url: str) -> pa.Table:
    """The index of a tar, from its file, else made, as where the file is damaged; held by this process."""
    if url:
        folder, _, name = url.rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            data = Store(folder).read_bytes(name)
            if hashlib.sha256(data[DIGEST_BYTES:]).digest() == data[:DIGEST_BYTES]:
                return pq.read_table(pa.BufferReader(data[DIGEST_BYTES:]))
    return make_index(path)


def keep_index(path: str, url: str, near: str) -> None:
    """Make the index of a tar, if it is not there yet, and keep it for others.

    Args:
        path: of the tar.
        url: where it is kept.
        near: the folder of this machine's user, where `curate check` may have left it. That it cannot be written to is
            no mistake: the index is made again by whoever needs it.
    """
    folder, _, name = url.rpartition("/")
    with contextlib.suppress(*((OSError, UserError) if folder == near else ())):
        store = Store(folder)
        if not store.exists(name):
            sink = pa.BufferOutputStream()
            table = _index(path, f"{near}/{name}")
            pq.write_table(table, sink, compression="zstd", use_dictionary=False)
            data = sink.getvalue().to_pybytes()
            store.put_bytes(name, hashlib.sha256(data).digest() + data)


@functools.lru_cache(HELD_INDICES)
def _side_car(path: str, index_path: str, index: str) -> tuple[pa.Table, Ints]:
    """The rows beside a tar, and for each the sample of its key; held by this process, for a version of the two."""
    with open_parquet(access.open_for_arrow(path)) as parquet:
        table = parquet.read()
    if KEY not in table.schema.names:
        raise ValueError(f"the Parquet file beside it, {path}, has no column {KEY!r}")
    return table, _placed(_index(index_path, index)[KEY], table)


def make_index(path: str) -> pa.Table:
    """Where the members of a tar are: a row for each sample, `key` and, for each column, offset and size, -1 if none.

    Raises:
        ValueError, tarfile.TarError: it is no tar, or is cut off; members of one name.
    """
    keys: list[str] = []
    places: dict[str, dict[int, tuple[int, int]]] = {}
    with access.open_input(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = ((_split(member.name), member) for member in _members(tar))
        named = ((key, suffix, member) for (key, suffix), member in members if suffix)
        for key, sample in itertools.groupby(named, key=lambda found: found[0]):
            for _, suffix, member in sample:
                column = IMAGE if suffix in PICTURES else suffix
                there = places.setdefault(column, {})
                if len(keys) in there and column != IMAGE:
                    raise ValueError(f"the sample {key!r} has two members .{suffix}")
                there.setdefault(len(keys), (member.offset_data, member.size))
            keys.append(key)
        # To tarfile a header that is damaged, or cut off, is the end like any other.
        file.seek(tar.offset)
        if file.read(END_BYTES).strip(b"\0"):
            raise ValueError(f"a damaged header at byte {tar.offset}, or more after the end, after {len(keys)} samples")
    # A name that is not UTF-8 is a key with a mark in it, and not the end of its tar.
    texts = [key.encode("utf-8", "surrogateescape").decode(errors="replace") for key in keys]
    columns: dict[str, pa.Array] = {KEY: pa.array(texts, pa.string())}
    for column in sorted(places, key=lambda name: (name != IMAGE, name)):
        extents = np.full((len(keys), 2), -1, np.int64)
        extents[list(places[column])] = list(places[column].values())
        columns |= {f"offset:{column}": pa.array(extents[:, 0]), f"size:{column}": pa.array(extents[:, 1])}
    return pa.table(columns)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Plain files, one after the other; tarfile would hold all that it has passed."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg():
            yield member


def _split(name: str) -> tuple[str, str]:
    """A member's sample and suffix; no suffix for what webdataset passes over, and the droppings of macOS.

    >>> _split("./a.b/000.seg.PNG")
    ('a.b/000', 'seg.png')
    """
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    if not stem or "__MACOSX" in path.parts or (stem.startswith("__") and path.name.endswith("__")):
        return "", ""
    return str(path.with_name(stem)), suffix.lower()


def _type_of(column: str) -> pa.DataType:
    return pa.string() if column.rpartition(".")[2] in TEXTS else pa.binary()


def _placed(keys: pa.ChunkedArray, beside: pa.Table) -> Ints:
    """For each row of the side-car the sample of its key, -1 if the tar has none."""
    samples = {key: number for number, key in enumerate(keys.to_pylist())}
    if repeated := len(keys) - len(samples):
        raise ValueError(
            f"{repeated} of its {len(keys)} samples have the key of another, so that rows beside it fit both"
        )
    # img2dataset's keys are the names of members; DataComp's tars lie in a folder each.
    names = {str(PurePosixPath(key).name): number for key, number in samples.items()}
    asked = [str(key) for key in beside[KEY].to_pylist()]
    order = np.array([samples.get(key, names.get(key, -1)) for key in asked], np.int64)
    if unnamed := len(samples) - len(np.unique(order[order >= 0])):
        raise ValueError(f"the Parquet file beside it has no row for {unnamed} of its {len(samples)} samples")
    return order


def _runs(wanted: Sequence[tuple[int, int, str, int]]) -> Iterator[list[tuple[int, int, str, int]]]:
    """Extents in the order of the file, those together that are read at once."""
    run: list[tuple[int, int, str, int]] = []
    for extent in wanted:
        if run and (extent[0] - (run[-1][0] + run[-1][1]) > GAP_BYTES or extent[0] + extent[1] - run[0][0] > RUN_BYTES):
            yield run
            run = []
        run.append(extent)
    if run:
        yield run


def _array(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """Bytes as a column; as text without a check, or one invalid caption would take its whole tar with it."""
    array = pa.array(values, pa.binary())
    return array if kind == pa.binary() else array.view(kind)
