"""Embeddings as other tools leave them, by pair: uid and caption.

clip-retrieval     metadata/metadata_N.parquet (image_path, caption, …), img_emb/img_emb_N.npy, text_emb/text_emb_N.npy
DataComp's pools   X.parquet (uid, text, …) and X.npz (b32_img, b32_txt, l14_img, l14_txt)

Line i of a table is row i of its arrays, [n, D]. Neither says which model made them, nor from which pictures: whoever
takes some over has to embed some of the pairs anew, and compare.
"""

import functools
import re
import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate.embed.files import CONTENT_BYTES, content_hash, halves, uid_texts
from curate.errors import DamagedError, UserError
from curate.messages import one_line
from curate.parquet import batches_of, open_table
from curate.pool.column_types import is_caption, is_uid
from curate.pool.columns import Columns
from curate.pool.shards import READ_ROWS, caption_bytes
from curate.storage import Store

UIDS = ("uid", "image_path")
CAPTIONS = ("caption", "text")
"""What the two call their columns, where these are not called as the pool's are."""
EXPECTED = (
    "embeddings.json of curate embeddings export, metadata/metadata_*.parquet of clip-retrieval or DataComp's *.npz"
)
OPEN_PARTS = 64
"""At a time, of two open files each."""
NO_KEY = bytes(CONTENT_BYTES)
UNREADABLE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What NumPy and zipfile raise of a file that is not what it should be."""

F16 = npt.NDArray[np.float16]


def pair_key(uid: str | None, caption: bytes | None) -> bytes:
    """What a pair is found by: the same uid under another caption is another pair. A pair without a uid has none."""
    return NO_KEY if uid is None else content_hash(uid.encode(), caption)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A table, and the files of its embeddings: two, or one archive of them."""

    table: str
    files: tuple[str, ...]


class Layout:
    """A folder of such embeddings; several threads may ask it. Of pairs with one uid and one caption the first counts.

    Args:
        source: the folder.
        scratch: where arrays of an object store, or of an archive, are put, each as soon as it is needed, to stay.
        columns: of the pool.
        embed_dim: D; arrays of another width are another model's.

    Raises:
        UserError: it is no such folder, a file of it is missing or damaged, or a table has no uids or no captions.
    """

    def __init__(self, source: Store, scratch: Path, *, columns: Columns, embed_dim: int) -> None:
        if columns.uid is None:
            raise UserError(
                f"{source.url}: expected a pool whose rows have uids, by which these embeddings are found; found none; "
                "name their column in pool.uid"
            )
        self._source, self._scratch, self._columns, self._embed_dim = source, scratch, columns, embed_dim
        self._parts = [*_of_clip_retrieval(source), *_of_datacomp(source)]
        if not self._parts:
            raise UserError(f"{source.url}: expected {EXPECTED}; found none of them; correct the folder")
        # All keys in one process: 24 bytes a pair, 2.4 GB for a hundred million, once per pool.
        keys = [self._keys(part.table) for part in self._parts]
        self._starts = np.cumsum([0, *map(len, keys)])
        found = np.concatenate(keys)
        self._order = np.argsort(found[:, 0], kind="stable")
        self._sorted = found[self._order]
        self._paths: dict[int, list[Path]] = {}
        self._lock = threading.Lock()
        self._arrays = functools.lru_cache(OPEN_PARTS)(self._opened)

    def vectors(self, keys: Sequence[bytes]) -> tuple[F16, npt.NDArray[np.bool_]]:
        """Embeddings of pairs.

        Args:
            keys: n, of `pair_key`.

        Returns:
            Those of pictures and of captions [2, n, D], zeros where there are none; and where there are some [n].

        Raises:
            UserError: an array is damaged, or not as long or as wide as it should be.
        """
        z = np.zeros((2, len(keys), self._embed_dim), np.float16)
        if not keys or not len(self._order):
            return z, np.zeros(len(keys), bool)
        wanted = halves(keys)
        at = np.minimum(np.searchsorted(self._sorted[:, 0], wanted[:, 0]), len(self._order) - 1)
        there = (self._sorted[at] == wanted).all(axis=1) & wanted.any(axis=1)
        rows = self._order[at]
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(parts[there]).tolist():
            here = np.flatnonzero(there & (parts == number))
            with self._lock:
                arrays = self._arrays(number)
            for out, array in zip(z, arrays, strict=True):
                out[here] = array[rows[here] - self._starts[number]]
        return z, there

    def _keys(self, table: str) -> npt.NDArray[np.uint64]:
        """Keys [n, 2] of the lines of a table."""
        where = f"{self._source.url}/{table}"
        uids, captions = (str(self._columns.uid), *UIDS), (self._columns.caption, *CAPTIONS)
        try:
            with open_table(self._source, table) as parquet:
                schema = parquet.schema_arrow
                uid, caption = (next((one for one in some if one in schema.names), None) for some in (uids, captions))
                if uid is None or caption is None:
                    raise UserError(
                        f"{where}: expected a column of uids ({' or '.join(uids)}) and one of captions "
                        f"({' or '.join(captions)}), found {', '.join(schema.names)}; write the pool's own beside the "
                        "embeddings"
                    )
                for name, allowed, kinds in ((uid, is_uid, "texts or integers"), (caption, is_caption, "texts")):
                    if not allowed(found := schema.field(name).type):
                        raise UserError(f"{where}: expected {kinds} in column {name}, found {found}; write it as such")
                return halves(
                    [
                        pair_key(*pair)
                        for batch in batches_of(parquet, READ_ROWS, [uid, caption])
                        for pair in pairs_of(batch.column(uid), batch.column(caption))
                    ]
                )
        except DamagedError as error:
            raise UserError(
                f"{where}: expected a Parquet file, found damage ({error.reason}); fetch it again"
            ) from error

    @property
    def url(self) -> str:
        """Of the folder, for messages."""
        return self._source.url

    def _opened(self, number: int) -> tuple[F16, F16]:
        """The arrays of a part, mapped into memory."""
        part, rows = self._parts[number], int(self._starts[number + 1] - self._starts[number])
        try:
            paths = self._paths[number] = self._paths.get(number) or self._local(part)
            arrays = [np.load(path, mmap_mode="r") for path in paths]
        except UNREADABLE as error:
            raise UserError(
                f"{self._source.url}/{', '.join(part.files)}: expected NumPy's arrays, found damage "
                f"({one_line(error)}); fetch it again"
            ) from error
        for array in arrays:
            if array.shape != (rows, self._embed_dim) or array.dtype.kind != "f":
                raise UserError(
                    f"{self._source.url}/{part.table}: expected embeddings [{rows}, {self._embed_dim}], one for each "
                    f"line, as the recipe's reference makes them; found {list(array.shape)} of {array.dtype}; name the "
                    "model that made them in [reference]"
                )
        return arrays[0], arrays[1]

    def _local(self, part: Part) -> list[Path]:
        """The two arrays of a part as files of this machine."""
        if len(part.files) == 1:
            return self._extracted(*part.files)
        paths = []
        for name in part.files:
            path = self._source.local_path(name)
            if path is None:
                path = self._scratch / name.replace("/", "-")
                self._source.fetch(name, path)
            paths.append(path)
        return paths

    def _extracted(self, name: str) -> list[Path]:
        """The two arrays of an archive that are as wide as they should be."""
        with self._source.open_input(name) as file, zipfile.ZipFile(file) as archive:
            widths = {member: _width(archive, member) for member in archive.namelist() if member.endswith(".npy")}
            for picture in sorted(widths):
                caption = picture.replace("_img.", "_txt.")
                if picture.endswith("_img.npy") and widths[picture] == widths.get(caption) == self._embed_dim:
                    folder = self._scratch / name.replace("/", "-")
                    return [Path(archive.extract(member, folder)) for member in (picture, caption)]
        raise UserError(
            f"{self._source.url}/{name}: expected arrays *_img and *_txt of width {self._embed_dim}, as the recipe's "
            f"reference makes them; found {', '.join(f'{member} of {width}' for member, width in widths.items())}; "
            "name the model that made one of them in [reference]"
        )


def pairs_of(uids: pa.Array, captions: pa.Array) -> Iterator[tuple[str | None, bytes | None]]:
    """Uids and captions of rows, as `pair_key` takes them."""
    return zip(uid_texts(uids), caption_bytes(captions).to_pylist(), strict=True)


def _of_clip_retrieval(source: Store) -> list[Part]:
    """The tables of a run of clip-retrieval.

    Raises:
        UserError: an array is missing.
    """
    parts = []
    for table in source.list("metadata"):
        if match := re.fullmatch(r"metadata/metadata_(\d+)\.parquet", table):
            files = tuple(f"{tower}_emb/{tower}_emb_{match[1]}.npy" for tower in ("img", "text"))
            if missing := [name for name in files if not source.exists(name)]:
                raise UserError(
                    f"{source.url}/{missing[0]}: expected the embeddings of {table}, found no file; let clip-retrieval "
                    "run with both towers, enable_image and enable_text"
                )
            parts.append(Part(table=table, files=files))
    return parts


def _of_datacomp(source: Store) -> list[Part]:
    """The tables of a folder of DataComp's metadata.

    Raises:
        UserError: a table is missing.
    """
    names = set(source.list())
    parts = []
    for archive in sorted(name for name in names if name.endswith(".npz")):
        table = archive.removesuffix(".npz") + ".parquet"
        if table not in names:
            raise UserError(f"{source.url}/{archive}: expected {table} beside it, found no file; fetch both")
        parts.append(Part(table=table, files=(archive,)))
    return parts


def _width(archive: zipfile.ZipFile, member: str) -> int:
    """D of an array [n, D] in an archive; 0 if it is none."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        # From 2.0 on headers are longer, and written only where they must be.
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, _ = read(file)
    return shape[1] if len(shape) == 2 else 0
