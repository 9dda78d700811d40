"""Selected files: the rows of one sub-batch in the order drawn, with what was known at the pick."""

from dataclasses import dataclass

import pyarrow as pa

from curate.errors import UserError
from curate.parquet import damage_told, open_table, read_table, write_table
from curate.sealed import seal, unseal
from curate.storage import Store
from curate.tally import Tally

SELECTED_SCHEMA = pa.schema(
    [
        pa.field("sub_batch", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("chunk", pa.int16(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("learner_loss", pa.float32()),
        pa.field("reference_loss", pa.float32()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("content_low", pa.uint64(), nullable=False),
        pa.field("content_high", pa.uint64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SubBatchStats:
    """What one selection did, for the manifest. Learnability is per example; null without a learner."""

    sub_batch: int
    tally: Tally
    learnability: float | None
    uniform_learnability: float | None
    """Of a uniform sub-batch of the same super-batch: what selection is to be compared with."""
    reference_loss: float
    """Of the whole sub-batch, per example: what the learner's loss in training is to be compared with."""

    def to_bytes(self) -> bytes:
        """JSON, for the metadata of the selected file."""
        return seal(
            {
                "sub_batch": self.sub_batch,
                "tally": self.tally.to_json(),
                "learnability": self.learnability,
                "uniform_learnability": self.uniform_learnability,
                "reference_loss": self.reference_loss,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "SubBatchStats":
        """The inverse of `to_bytes`; `name` is for messages."""
        record = unseal(data, name)
        return cls(**record | {"tally": Tally(**record["tally"])})


def selected_name(steps: str, sub_batch: int) -> str:
    """Name, within the root, of a sub-batch's selected file; `steps` is the folder of the round's steps."""
    return f"{steps}/selected-{sub_batch:06d}.parquet"


def write_selected(store: Store, name: str, table: pa.Table, stats: SubBatchStats) -> None:
    """Write a selected file: rows and, in its metadata, their statistics."""
    write_table(store, name, table.replace_schema_metadata({"stats": stats.to_bytes()}))


def read_selected(store: Store, name: str) -> tuple[pa.Table, SubBatchStats]:
    """The inverse of `write_selected`.

    Raises:
        DamagedError: it is not what was written.
    """
    table = read_table(store, name, schema=SELECTED_SCHEMA)
    with damage_told(name):
        return table, SubBatchStats.from_bytes(table.schema.metadata[b"stats"], name)


def selected_rows(store: Store, steps: str, sub_batch: int) -> pa.Table:
    """The rows of a sub-batch of a committed round.

    Raises:
        UserError: the file is gone.
        DamagedError: it is not what was written.
    """
    name = selected_name(steps, sub_batch)
    try:
        return read_selected(store, name)[0]
    except FileNotFoundError:
        raise UserError(f"{name}: expected what the round selected, found nothing; restore it") from None


def read_stats(store: Store, name: str) -> SubBatchStats:
    """The statistics of a selected file; its rows are not read. Raises as `read_selected`."""
    with open_table(store, name) as parquet:
        return SubBatchStats.from_bytes((parquet.schema_arrow.metadata or {})[b"stats"], name)
