"""Selected files: the rows of one sub-batch in the order drawn, with what was known at the pick."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
        return json.dumps(
            {
                "sub_batch": self.sub_batch,
                "tally": self.tally.to_json(),
                "learnability": self.learnability,
                "uniform_learnability": self.uniform_learnability,
                "reference_loss": self.reference_loss,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SubBatchStats":
        """The inverse of `to_bytes`."""
        record: dict[str, Any] = json.loads(data)
        return cls(**record | {"tally": Tally(**record["tally"])})


def selected_name(steps: str, sub_batch: int) -> str:
    """Name, within the root, of a sub-batch's selected file; `steps` is the folder of the round's steps."""
    return f"{steps}/selected-{sub_batch:06d}.parquet"


def write_selected(store: Store, name: str, table: pa.Table, stats: SubBatchStats) -> None:
    """Write a selected file: rows and, in its metadata, their statistics."""
    with store.local_scratch() as scratch:
        path = Path(scratch) / "selected.parquet"
        pq.write_table(table.replace_schema_metadata({"stats": stats.to_bytes()}), path, compression="zstd")
        store.put_file(path, name)


def read_selected(store: Store, name: str) -> tuple[pa.Table, SubBatchStats]:
    """The inverse of `write_selected`."""
    with store.open_input(name) as file:
        table = pq.read_table(file)
    return table, SubBatchStats.from_bytes(table.schema.metadata[b"stats"])
