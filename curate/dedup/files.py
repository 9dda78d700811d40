"""Dedup files: what a deduplication was asked for, which rows it dropped, and where they are found.

dedup/<settings>/<pool>/parent.json      whose decisions it starts from
dedup/<settings>/<pool>/cells.npy        the mean and the centroids; counts.json: rows by status, tasks
dedup/<settings>/<pool>/pairs-*.parquet  near-duplicates that this pool adds; nodes-*.parquet: what ranks them
dedup/<settings>/<pool>/grouping-*       what the tasks that group have for one another, while they do
dedup/<settings>/<pool>/dropped-*        one row per row that leaves, in the order of the pool; a file for 64 shards
dedup/<settings>/<pool>/dedup.json       the account; written last
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curate.errors import CommitConflictError, DamagedError, UserError
from curate.models.spec import EncoderSpec
from curate.parquet import open_table, read_table, write_table
from curate.pool.shards import Pool, Shard, load_pool
from curate.recipe import DedupSection
from curate.sealed import seal, unseal
from curate.storage import Store

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        # Numbers of evaluation sets' shards follow those of the pool's.
        pa.field("duplicate_of_shard", pa.int32(), nullable=False),
        pa.field("duplicate_of_row", pa.int64(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("representative_shard", pa.int32(), nullable=False),
        pa.field("representative_row", pa.int64(), nullable=False),
    ]
)

LAYOUT = 2
"""Of the dropped rows' files. Version 1 wrote them as one, and what it left lies in other folders."""
DROPPED_SHARDS = 64
"""Shards whose dropped rows lie in one file: a reader that knows its shard knows the file."""
SHA256_BYTES = 32
ROW_GROUP = 65_536
"""Rows: who wants those of one shard reads one row group or two."""


@dataclass(frozen=True, kw_only=True)
class LargeGroup:
    """One of the largest groups: whether near-duplicates chain, so that its ends are no duplicates of each other."""

    size: int
    """Rows."""
    measured: int
    """Of these, the best-ranked, between which cosines were measured."""
    lowest_cosine: float
    """Between two of them: the diameter."""
    lowest_to_representative: float
    shard: int
    row: int
    """Of the group's best-ranked row."""


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """A deduplication that is complete."""

    folder: str
    chain: tuple[str, ...]
    """Folders whose pairs it uses, the oldest first, its own last."""
    evaluation: tuple[str, ...]
    """Fingerprints of the evaluation sets' inventories."""
    generations: tuple[int, ...]
    """Of each shard of the pool: number, in the chain, of the deduplication that it came in with."""
    statuses: Mapping[str, int]
    """Rows of the pool by the status of their embedding."""
    evaluation_statuses: Mapping[str, int]
    """Likewise of the evaluation sets: an image without an embedding keeps nothing out of the pool."""
    unsound: int
    """Rows whose vectors are not finite or zero though their status is ok: they were compared with nothing."""
    dropped: Mapping[str, int]
    """Rows by reason."""
    pairs: int
    groups: int
    cells: int
    largest_cell: int
    """Rows."""
    beyond: int
    """Rows that may have further near-duplicates, the most in one of the chain; 0 proves that none has."""
    largest: tuple[LargeGroup, ...]

    def to_bytes(self) -> bytes:
        """JSON for the root."""
        return seal(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Dedup":
        """The inverse of `to_bytes`; `name` is for messages."""
        record = unseal(data, name)
        record |= {name: tuple(record[name]) for name in ("chain", "evaluation", "generations")}
        return cls(**record | {"largest": tuple(LargeGroup(**group) for group in record["largest"])})


def dedup_folder(section: DedupSection, reference: EncoderSpec, pool: Pool, evaluation: Sequence[Pool]) -> str:
    """Folder of a deduplication within the root; the folder above is that of all that were asked for alike."""
    asked = section.model_dump(mode="json", exclude={"evaluation", "max_dropped_share"})
    identity = json.dumps([LAYOUT, reference.sha, asked, [seen.fingerprint for seen in evaluation]], sort_keys=True)
    return f"dedup/{hashlib.sha256(identity.encode()).hexdigest()[:16]}/{pool.fingerprint}"


def pin_parent(store: Store, folder: str, pool: Pool) -> Dedup | None:
    """The largest earlier deduplication, asked for alike, of shards that the pool still holds; the same ever after.

    Raises:
        UserError: it was pinned, and is gone.
    """
    name = f"{folder}/parent.json"
    if not store.exists(name):
        held = {shard.key for shard in pool.shards}
        candidates = []
        for other in store.list(folder.rpartition("/")[0]):
            if read_dedup(store, other) is not None:
                earlier = load_pool(store, other.rpartition("/")[2])
                if held.issuperset(shard.key for shard in earlier.shards):
                    candidates.append((earlier.rows, other))
        chosen = max(candidates)[1] if candidates else None
        with contextlib.suppress(CommitConflictError):  # somebody else began it: theirs
            store.put_if_absent(name, seal({"parent": chosen}))
    parent = unseal(store.read_bytes(name), name)["parent"]
    if parent is None:
        return None
    if (found := read_dedup(store, parent)) is None:
        raise _broken(f"{parent}/dedup.json", folder)
    return found


def _broken(name: str, folder: str) -> UserError:
    return UserError(
        f"{name}: expected the earlier deduplication that {folder} starts from, found no such file; restore it, or "
        f"delete {folder} to decide anew"
    )


def pairs_name(folder: str, task: int) -> str:
    """Name of a file of pairs by id."""
    return f"{folder}/pairs-{task:06d}.parquet"


def nodes_name(folder: str, task: int) -> str:
    """Name of the file of the nodes of these pairs."""
    return f"{folder}/nodes-{task:06d}.parquet"


def write_records(store: Store, name: str, records: npt.NDArray[np.void], **facts: int) -> None:
    """Write a structured array [n], and some numbers with it."""
    names = records.dtype.names or ()
    columns = {column: pa.array(np.ascontiguousarray(records[column])) for column in names}
    _write_table(store, name, pa.table(columns).replace_schema_metadata({"facts": seal(facts)}))


def read_records(store: Store, name: str, dtype: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """The array of a file that `write_records` wrote."""
    schema = pa.schema([(column, pa.from_numpy_dtype(dtype[column])) for column in dtype.names or ()])
    table = read_table(store, name, schema=schema)
    records = np.empty(len(table), dtype)
    for column in dtype.names or ():
        records[column] = table[column].to_numpy()
    return records


def describe_records(store: Store, name: str) -> tuple[int, dict[str, int]]:
    """How many records a file holds, and the numbers that were written with them, by its footer."""
    with open_table(store, name) as parquet:
        return int(parquet.metadata.num_rows), unseal(parquet.schema_arrow.metadata[b"facts"], name)


def write_cells(store: Store, folder: str, array: npt.NDArray[np.float32], counts: Mapping[str, Any]) -> None:
    """Pin the cells, and the rows as they were counted; those that somebody else pinned stay."""
    store.put_bytes(f"{folder}/counts.json", seal(counts))
    data = io.BytesIO()
    np.save(data, array)
    data.write(hashlib.sha256(data.getvalue()).digest())  # after the end of the array, where numpy does not look
    with contextlib.suppress(CommitConflictError):
        store.put_if_absent(f"{folder}/cells.npy", data.getvalue())


def read_cells(store: Store, folder: str) -> npt.NDArray[np.float32] | None:
    """The mean and the centroids [K + 1, D]; None if they are not pinned yet.

    Raises:
        DamagedError: they are not what was pinned.
    """
    name = f"{folder}/cells.npy"
    try:
        data = store.read_bytes(name)
    except FileNotFoundError:
        return None
    array, digest = data[:-SHA256_BYTES], data[-SHA256_BYTES:]
    if hashlib.sha256(array).digest() != digest:
        raise DamagedError(name, "another sha256")
    return np.asarray(np.load(io.BytesIO(array)))


def read_counts(store: Store, folder: str) -> dict[str, Any]:
    """The counts that were written before the cells."""
    name = f"{folder}/counts.json"
    return unseal(store.read_bytes(name), name)


def chain_files(store: Store, chain: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Of each deduplication of a chain its folder, its pairs files and its nodes files.

    Raises:
        UserError: one of them is gone: without it rows that were dropped would come back.
    """
    found = []
    for folder in chain:
        there = set(store.list(folder))
        if f"{folder}/counts.json" not in there:
            raise _broken(f"{folder}/counts.json", chain[-1])
        tasks = range(read_counts(store, folder)["tasks"])
        pairs, nodes = ([name(folder, task) for task in tasks] for name in (pairs_name, nodes_name))
        if missing := [name for name in pairs + nodes if name not in there]:
            raise _broken(missing[0], chain[-1])
        found.append((folder, pairs, nodes))
    return found


def dropped_files(shards: int) -> int:
    """How many files hold what was dropped of so many shards."""
    return -(-shards // DROPPED_SHARDS)


def dropped_name(folder: str, number: int) -> str:
    """Name of the file of what was dropped of a run of `DROPPED_SHARDS` shards."""
    return f"{folder}/dropped-{number:06d}.parquet"


def write_dropped(store: Store, folder: str, number: int, table: pa.Table) -> None:
    """Write what was dropped of a run of shards, a table of `DROPPED_SCHEMA` in the order of the pool."""
    _write_table(store, dropped_name(folder, number), table)


def _write_table(store: Store, name: str, table: pa.Table) -> None:
    write_table(store, name, table, row_group_size=ROW_GROUP)


def read_dedup(store: Store, folder: str) -> Dedup | None:
    """The account of a deduplication, or None if it is not complete."""
    try:
        name = f"{folder}/dedup.json"
        return Dedup.from_bytes(store.read_bytes(name), name)
    except FileNotFoundError:
        return None


def read_dropped(store: Store, folder: str, shard: Shard) -> pa.Table:
    """What was dropped of one shard of the pool, by row: a table of `DROPPED_SCHEMA`.

    Raises:
        UserError: the file is gone, or a version that wrote others made the folder.
    """
    name = dropped_name(folder, shard.index // DROPPED_SHARDS)
    try:
        return read_table(store, name, schema=DROPPED_SCHEMA, filters=[("shard", "=", shard.index)])
    except FileNotFoundError:
        raise UserError(
            f"{name}: expected the rows that a deduplication dropped, found no such file; restore it, or, if an older "
            f"version made {folder}, which wrote one dropped.parquet, deduplicate anew"
        ) from None


def kept_rows(store: Store, folder: str | None, shard: Shard, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Those of some rows of a shard that a deduplication left; all if there was none."""
    if folder is None:
        return rows
    return rows[~np.isin(rows, read_dropped(store, folder, shard)["row"].to_numpy())]


def made_with(store: Store, name: str) -> list[str]:
    """What goes with a file if it is to be made again, in the order in which it must go: as a rule the file alone.

    With one of a deduplication its account, which says that all is there; with the cells, all that was found by them;
    with nodes, their pairs, whose file says that both are there; with any of these, what was grouped so far.
    """
    if not name.startswith("dedup/"):
        return [name]
    folder, _, own = name.rpartition("/")
    account = f"{folder}/dedup.json"
    if own.startswith(("grouping-", "dropped-")):
        return [account, name]
    there = [(other, other.rpartition("/")[2]) for other in store.list(folder)]
    grouped = [other for other, file in there if file.startswith("grouping-")]
    if own.startswith("nodes-"):
        return [account, *grouped, f"{folder}/{own.replace('nodes-', 'pairs-')}", name]
    cells = own in ("cells.npy", "counts.json")
    parts = [other for other, file in there if cells and file.startswith(("pairs-", "nodes-"))]
    return [account, *grouped, *parts, *([f"{folder}/cells.npy"] if parts else []), name]


def compared_shards(store: Store, pool: Pool, evaluation: Sequence[str]) -> tuple[Shard, ...]:
    """The shards that dropped rows number: the pool's, then those of the evaluation sets."""
    return pool.shards + tuple(shard for print_ in evaluation for shard in load_pool(store, print_).shards)


def why_dropped(
    store: Store, pool: Pool, folder: str, evaluation: Sequence[str], shard: Shard, row: int
) -> dict[str, Any] | None:
    """Why a row was dropped: reason, which row it duplicates, similarity, who represents it; None if it stays."""
    here = read_dropped(store, folder, shard).filter(pc.field("row") == row).to_pylist()
    if not here:
        return None
    found, shards = here[0], compared_shards(store, pool, evaluation)
    return {
        "outcome": found["reason"],
        "duplicate_of": {"shard": shards[found["duplicate_of_shard"]].name, "row": found["duplicate_of_row"]},
        "similarity": round(found["similarity"], 4),
        "representative": {"shard": shards[found["representative_shard"]].name, "row": found["representative_row"]},
    }
