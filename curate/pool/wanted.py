"""Which rows of the pool are wanted at all: `pool.where`, on the user's own columns, and `pool.keep`, a list of uids.

A row that is not wanted has the status `filtered`; neither its picture nor its caption is read.

A list of uids is a NumPy file: DataComp's, of uids of 32 hexadecimal digits as two halves each (`u8,u8`), or an array
of texts or of integers.
"""

import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate import access
from curate.errors import UserError
from curate.messages import one_line
from curate.pool.column_types import is_image
from curate.pool.columns import Columns

FILTERED = "filtered"
HALVES = np.dtype("u8,u8")
"""Of DataComp's subsets: a uid's digits 0 to 15 and 16 to 31."""

Mask = npt.NDArray[np.bool_]


def columns_asked(where: str, schema: pa.Schema) -> list[str]:
    """Columns that an expression may name: those whose names are in its text. Pictures are none of them."""
    return [field.name for field in schema if field.name.lower() in where.lower() and not is_image(field.type)]


def fulfils(where: str, batch: pa.RecordBatch) -> Mask:
    """Which rows fulfil an expression of SQL, as DuckDB understands it; one that is null does not.

    Raises:
        UserError: it is no such expression, or names columns that are not there, or is no statement on single rows.
    """
    import duckdb  # noqa: PLC0415 only where somebody asks

    try:
        cursor = _database().cursor()
        cursor.register("pool", batch)
        cursor.execute(f"SELECT coalesce(CAST(({where}\n) AS BOOLEAN), false) AS wanted FROM pool")
        mask: Mask = np.asarray(cursor.fetchnumpy()["wanted"], bool)
    except duckdb.Error as error:
        raise UserError(
            f"pool.where = {where!r}: expected a condition in SQL on the columns {', '.join(batch.schema.names)}, "
            f"found that {one_line(error)}; correct it"
        ) from None
    if len(mask) != batch.num_rows:
        raise UserError(
            f"pool.where = {where!r}: expected a condition on each row, found one on all of them together; write it "
            "without aggregates"
        )
    return mask


@functools.cache
def _database() -> Any:
    """One of this process, that reads no file and keeps none; a cursor of it for each thread."""
    import duckdb  # noqa: PLC0415

    return duckdb.connect(
        config={
            "threads": 1,
            "enable_external_access": False,
            "lock_configuration": True,
            "preserve_insertion_order": True,
        }
    )


class Kept:
    """A list of uids, to be asked which of some are in it."""

    def __init__(self, uids: npt.NDArray[Any]) -> None:
        self._uids = np.sort(uids)
        self._halves = uids.dtype == HALVES

    def __len__(self) -> int:
        return len(self._uids)

    def __call__(self, uids: Sequence[str | None]) -> Mask:
        """Which of some uids are in the list."""
        asked = np.array([self._as_listed(uid) for uid in uids], self._uids.dtype)
        known = np.array([uid is not None for uid in uids], bool)
        at = np.searchsorted(self._uids, asked)
        found = np.zeros(len(asked), bool)
        there = at < len(self._uids)
        found[there] = self._uids[at[there]] == asked[there]
        mask: Mask = found & known
        return mask

    def _as_listed(self, uid: str | None) -> Any:
        if self._halves:
            return halves_of(uid or "") or (0, 0)
        if self._uids.dtype.kind in "iu":
            return int(uid) if uid and uid.removeprefix("-").isdecimal() else 0
        return uid or ""


def halves_of(uid: str) -> tuple[int, int] | None:
    """A uid of 32 hexadecimal digits as DataComp's subsets hold it; None if it is another.

    >>> halves_of("00000000000000010000000000000002")
    (1, 2)
    """
    try:
        return (int(uid[:16], 16), int(uid[16:], 16)) if len(uid) == 32 else None
    except ValueError:
        return None


@functools.lru_cache(4)
def load_kept(url: str, _sha: str | None) -> Kept:
    """A list of uids, held by this process: 16 bytes each of DataComp's, 2 GB of them at 128 million.

    Raises:
        UserError: there is none, or it is no array of uids.
    """
    return Kept(read_uids(url))


def read_uids(url: str) -> npt.NDArray[Any]:
    """The array of a list of uids.

    Raises:
        UserError: there is none, or it is no array of uids.
    """
    fs, path = access.filesystem(url)
    try:
        data = access.persist(url, lambda: fs.cat_file(path))
        uids: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"pool.keep = {url!r}: expected a NumPy file of uids; found nothing; correct it") from None
    except ValueError as error:
        raise UserError(f"pool.keep = {url!r}: expected a NumPy file of uids; {one_line(error)}") from None
    if uids.ndim != 1 or not (uids.dtype == HALVES or uids.dtype.kind in "iuU"):
        raise UserError(
            f"pool.keep = {url!r}: expected an array of uids [n], as u8,u8, texts or integers, found "
            f"{uids.dtype} {list(uids.shape)}; convert it"
        )
    return uids


def wanted_rows(columns: Columns, batch: pa.RecordBatch, uids: Sequence[str | None] | None) -> Mask:
    """Which rows are wanted, by the columns that `where` names, null where the shard has them not, and by their uids.

    Raises:
        UserError: as `fulfils` and `load_kept`.
    """
    mask: Mask = np.ones(batch.num_rows, bool)
    if columns.where is not None:
        for name in columns.where_columns:
            if name not in batch.schema.names:
                batch = batch.append_column(name, pa.nulls(batch.num_rows))
        mask = fulfils(columns.where, batch.select(list(columns.where_columns)))
    if columns.keep is not None and uids is not None:
        mask &= load_kept(columns.keep, columns.keep_sha)(uids)
    return mask
