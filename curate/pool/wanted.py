"""Which rows of the pool are wanted at all: `pool.where`, on the user's own columns, and `pool.keep`, a list of uids.

A row that is not wanted has the status `filtered`; neither its picture nor its caption is read.

A list of uids is a NumPy file: DataComp's, of uids of 32 hexadecimal digits as two halves each (`u8,u8`), or an array
of texts or of integers.
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curate import access
from curate.errors import InputChangedError, UserError
from curate.messages import one_line
from curate.pool.column_types import is_image
from curate.pool.columns import Columns

FILTERED = "filtered"
HALVES = np.dtype("u8,u8")
"""Of DataComp's subsets: a uid's digits 0 to 15 and 16 to 31."""

Mask = npt.NDArray[np.bool_]


def columns_asked(where: str, schema: pa.Schema) -> list[str]:
    """Columns that an expression may name: those whose names are words of its text. Pictures are none of them."""
    return sorted(
        field.name
        for field in schema
        if re.search(rf"(?<!\w){re.escape(field.name)}(?!\w)", where, re.IGNORECASE) and not is_image(field.type)
    )


def check_where(where: str, schema: pa.Schema) -> None:
    """Check that an expression is a condition on single rows, the same whenever it is asked.

    Args:
        where: `pool.where`.
        schema: of the columns that it may name.

    Raises:
        UserError: as `fulfils`; or it looks at other rows (a window, a subquery) or at chance or the clock.
    """
    fulfils(where, pa.RecordBatch.from_pylist([], schema))
    cursor = _database().cursor()
    (text,) = cursor.execute("SELECT json_serialize_sql(?)", [f"SELECT ({where}\n)"]).fetchone()
    found = list(_nodes(json.loads(text)))
    kinds = {str(node.get("class")) for node in found}
    volatile = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    inconstant = {name for (name,) in cursor.execute(volatile).fetchall()}
    asked = {str(node.get("function_name")) for node in found} & inconstant
    if refused := [*sorted(kinds & {"WINDOW", "SUBQUERY"}), *sorted(asked)]:
        raise UserError(
            f"pool.where = {where!r}: expected a condition on each row by itself, the same at any time, found "
            f"{refused[0].lower()}; write it without, or prepare a column"
        )


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """The mappings in a tree of JSON."""
    if isinstance(tree, dict):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(branch)


def fulfils(where: str, batch: pa.RecordBatch) -> Mask:
    """Which rows fulfil an expression of SQL, as DuckDB understands it; one that is null does not.

    Raises:
        UserError: it is no such expression, names columns that are not there, is about all rows together, or cannot be
            computed of a row.
    """
    import duckdb  # noqa: PLC0415 only where somebody asks

    for place, field in enumerate(batch.schema):
        if pa.types.is_float16(field.type):  # which DuckDB does not know
            batch = batch.set_column(place, field.name, batch.column(place).cast(pa.float32()))
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
        self._halves = uids.dtype == HALVES
        # 16 bytes, the larger half first, have the order of their digits, and are compared as fast as bytes are.
        flat = _digits(uids) if self._halves else uids
        self._uids = flat if bool((flat[:-1] <= flat[1:]).all()) else np.sort(flat)

    def __len__(self) -> int:
        return len(self._uids)

    def __call__(self, uids: Sequence[str | None]) -> Mask:
        """Which of some uids are in the list; one of another kind than the list's is not."""
        listed = [self._as_listed(uid) for uid in uids]
        known = np.array([one is not None for one in listed], bool)
        mask: Mask = np.zeros(len(uids), bool)
        if known.any() and len(self._uids):
            asked = [one for one in listed if one is not None]
            # Texts in a type of their own: that of the list would cut off longer ones.
            kind = None if self._uids.dtype.kind == "U" else self._uids.dtype
            values = _digits(np.array(asked, HALVES)) if self._halves else np.array(asked, kind)
            at = np.minimum(np.searchsorted(self._uids, values), len(self._uids) - 1)
            mask[known] = self._uids[at] == values
        return mask

    def _as_listed(self, uid: str | None) -> Any:
        """A uid as the list has it; None if the list can have none such."""
        if uid is None or self._uids.dtype.kind == "U":
            return uid
        if self._halves:
            return halves_of(uid)
        if not uid.removeprefix("-").isdecimal():
            return None
        bounds = np.iinfo(self._uids.dtype)
        return number if bounds.min <= (number := int(uid)) <= bounds.max else None


def _digits(uids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Halves as 16 bytes each, in the order of their digits."""
    names = uids.dtype.names or ()
    flat = np.stack([uids[name] for name in names], axis=1).astype(">u8")
    return np.ascontiguousarray(flat).view("V16").reshape(-1).view("S16")


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
def load_kept(url: str, sha: str | None) -> Kept:
    """A list of uids, held by this process: 16 bytes each of DataComp's, 2 GB of them at 128 million.

    Raises:
        UserError: there is none, or it is no array of uids.
        InputChangedError: it is not the one that the inventory was taken with.
    """
    uids, found = read_uids(url)
    if found != sha:
        raise InputChangedError(
            f"pool.keep = {url!r}: the list changed while the round was running; restore it, or delete the round's "
            "folder to begin it anew"
        )
    return Kept(uids)


def read_uids(url: str) -> tuple[npt.NDArray[Any], str]:
    """The array of a list of uids, and a hash of its contents.

    Raises:
        UserError: there is none, or it is no array of uids.
    """
    fs, path = access.filesystem(url)
    try:
        data = access.persist(url, lambda: fs.cat_file(path))
        if not data.startswith(np.lib.format.MAGIC_PREFIX):  # which `np.load` would take for a pickle
            raise ValueError("found another kind of file")
        uids: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"pool.keep = {url!r}: expected a NumPy file of uids; found nothing; correct it") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"pool.keep = {url!r}: expected a NumPy file of uids; {one_line(error)}") from None
    if uids.ndim != 1 or not (uids.dtype == HALVES or uids.dtype.kind in "iuU"):
        raise UserError(
            f"pool.keep = {url!r}: expected an array of uids [n], as u8,u8, texts or integers, found "
            f"{uids.dtype} {list(uids.shape)}; convert it"
        )
    return uids, hashlib.sha256(data).hexdigest()[:32]


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
