"""A file of the pool, whatever its format: its columns, and its rows by groups. One file a format, each beside this."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate import storage
from curate.formats.arrow import ARROW, open_arrow
from curate.formats.listing import LISTED, open_listing
from curate.formats.parquet import PARQUET, open_shard
from curate.formats.tar import TAR, open_tar
from curate.storage import FileInfo

_PICTURES = "write a metadata.csv beside them with the columns file_name and caption"
OTHER_FORMATS = {
    **dict.fromkeys((".gz", ".zstd"), "unpack it"),
    ".lance": "write its rows as Parquet, as docs/formats.md has it",
    ".mds": "write its samples as Parquet or tars",
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), f"pictures alone are no pool: {_PICTURES}"),
    **dict.fromkeys(LISTED, "name the file itself, if its rows name pictures"),
    ".json": "write it as JSON lines, metadata.jsonl, if it names pictures",
}
"""What people keep pools in as well, and the way from there."""
EXPECTED = "*.parquet, *.tar, *.arrow or a metadata.jsonl or .csv that names pictures"
LISTINGS = tuple(f"metadata{suffix}" for suffix in LISTED)
"""Names by which a table of pictures is known in a folder: as `imagefolder` has it."""
CACHED = "cache-"
"""How `datasets` begins the names of what it computed, beside what was saved."""


class Source(Protocol):
    """An opened file."""

    schema: pa.Schema
    groups: npt.NDArray[np.int64]
    """Rows of each part of the file that is read whole, if any of it is."""
    largest_group: int
    """Bytes, uncompressed."""

    def batches(
        self, groups: Sequence[int] | None, columns: Sequence[str] | None, batch_rows: int
    ) -> Iterator[pa.RecordBatch]:
        """Rows of some groups, in order; of all if None.

        Args:
            groups: their numbers, ascending.
            columns: their names; those that the file has not are left out. All if None.
            batch_rows: of a batch at most.
        """


def open_source(path: str, *, index: str = "", side_car: str = "") -> contextlib.AbstractContextManager[Source]:
    """Open a file of the pool by its suffix; as Parquet if that tells nothing.

    Args:
        path: local path or URL.
        index: where the index of a tar is.
        side_car: the Parquet file beside a tar.
    """
    match PurePosixPath(path).suffix.lower():
        case suffix if suffix == TAR:
            return open_tar(path, index=index, side_car=side_car)
        case suffix if suffix == ARROW:
            return open_arrow(path)
        case suffix if suffix in LISTED:
            return open_listing(path)
        case _:
            return open_shard(path)


def format_of(path: str) -> str:
    """What the file of a path is called in messages."""
    names = {TAR: "a tar", ARROW: "an Arrow file"} | dict.fromkeys(LISTED, "a table of pictures")
    return names.get(PurePosixPath(path).suffix.lower(), "a Parquet file")


def list_shards(url: str) -> tuple[list[FileInfo], list[str]]:
    """List the shards of one file, a folder (recursively) or a glob, and the paths passed over.

    The Parquet file of a tar's name beside it is no shard but the tar's side-car. A table that names pictures is one
    only in a folder where no file holds any: beside such files it may say anything of them.

    Raises:
        UserError: as `storage.list_files`.
    """
    found, ignored = storage.list_files(url, taken=_is_shard, expected=EXPECTED, way_out=of_other_format)
    folders = {file.path.rpartition("/")[0] for file in found if not _is_listing(file.path)}
    beside = {file.path for file in found if _is_listing(file.path) and file.path.rpartition("/")[0] in folders}
    return [file for file in found if file.path not in beside], sorted([*ignored, *beside])


def _is_listing(path: str) -> bool:
    return path.rpartition("/")[2] in LISTINGS


def side_cars(files: Sequence[FileInfo]) -> dict[str, FileInfo]:
    """The Parquet file of the same name beside each tar that has one, by the tar's path.

    If none was listed, as by the glob `*.tar`, one is looked for beside the first tar, and then beside all.
    """
    by_path = {file.path: file for file in files}
    beside = {path: path.removesuffix(TAR) + PARQUET for path in by_path if path.endswith(TAR)}
    found = {path: by_path[other] for path, other in beside.items() if other in by_path}
    if beside and not found and _there(next(iter(beside.values()))) is not None:
        looked_for = {path: _there(other) for path, other in beside.items()}
        return {path: file for path, file in looked_for.items() if file is not None}
    return found


def _there(path: str) -> FileInfo | None:
    try:
        return storage.file_info(path)
    except FileNotFoundError:
        return None


def _is_shard(name: str) -> bool:
    name = name.rpartition("/")[2]
    if name.endswith(ARROW):
        return not name.startswith(CACHED)
    return name.endswith((PARQUET, TAR)) or name in LISTINGS


def of_other_format(name: str) -> str | None:
    """What to do with a pool of files of this name; None where nobody keeps a pool in such files."""
    base = name.rpartition("/")[2]
    if base == "index.json":  # of MDS, and no table
        return None
    return OTHER_FORMATS.get(os.path.splitext(base)[1].lower())


def cache_folder() -> str:
    """Where indices of tars are kept that no root is there for."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.path.join(base, "curate", "indices")
