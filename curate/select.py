"""Select: from the candidates of one super-batch to the rows of one sub-batch, with what was known at the pick."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.errors import UserError
from curate.jest import Embeddings, diagonal_losses, jointly_sample_batch, sub_batch_learnability
from curate.recipe import SelectionSection
from curate.seeds import generator
from curate.storage import Store
from curate.tally import Tally
from curate.walk import Rows, in_walk_order

Vectors = npt.NDArray[np.float16]

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
class Scale:
    """How an encoder turns cosines into logits."""

    logit_scale: float
    logit_bias: float


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows of one super-batch and their vectors by one or two encoders; a vector that is missing is NaN."""

    rows: Rows
    learner: tuple[Vectors, Vectors] | None
    reference: tuple[Vectors, Vectors]

    def take(self, positions: npt.NDArray[np.int64]) -> "Candidates":
        """The candidates at these positions, in this order."""
        return Candidates(
            rows=self.rows[positions],
            learner=self.learner and (self.learner[0][positions], self.learner[1][positions]),
            reference=(self.reference[0][positions], self.reference[1][positions]),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Candidates"]) -> "Candidates":
        """All parts, one after the other."""

        def joined(pairs: Sequence[tuple[Vectors, Vectors]]) -> tuple[Vectors, Vectors]:
            return np.concatenate([zimg for zimg, _ in pairs]), np.concatenate([ztxt for _, ztxt in pairs])

        learners = [part.learner for part in parts if part.learner is not None]
        return cls(
            rows=np.concatenate([part.rows for part in parts]),
            learner=joined(learners) if learners else None,
            reference=joined([part.reference for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class SubBatchStats:
    """What one selection did, for the manifest. Learnability is per example; null without a learner."""

    sub_batch: int
    tally: Tally
    learnability: float | None
    uniform_learnability: float | None
    """Of a uniform sub-batch of the same super-batch: what selection is to be compared with."""

    def to_bytes(self) -> bytes:
        """JSON, for the metadata of the selected file."""
        return json.dumps(
            {
                "sub_batch": self.sub_batch,
                "tally": self.tally.to_json(),
                "learnability": self.learnability,
                "uniform_learnability": self.uniform_learnability,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SubBatchStats":
        """The inverse of `to_bytes`."""
        record: dict[str, Any] = json.loads(data)
        return cls(**record | {"tally": Tally(**record["tally"])})


def needs_learner(selection: SelectionSection) -> bool:
    """Easy-reference and uniform selection never look at the learner, so it need not be run."""
    return selection.method != "uniform" and selection.criterion != "easy_reference"


def select_sub_batch(
    candidates: Candidates,
    selection: SelectionSection,
    *,
    learner: Scale | None,
    reference: Scale,
    seed: int,
    round_number: int,
    sub_batch: int,
    device: torch.device,
) -> tuple[pa.Table, SubBatchStats]:
    """Draw one sub-batch from one super-batch.

    Args:
        candidates: of the super-batch in any order, equal pairs included; B of them are distinct.
        selection: sizes, criterion and method.
        learner: None where `needs_learner` says no.
        reference: always.
        seed: of the recipe.
        round_number: with `seed` and `sub_batch` decides every draw.
        sub_batch: number within the round.
        device: where the products are computed.

    Returns:
        A table of `SELECTED_SCHEMA`, b rows in the order drawn, and its statistics.

    Raises:
        UserError: if fewer than b candidates have finite embeddings.
    """
    order, representative = in_walk_order(candidates.rows)
    pool = candidates.take(order[representative == np.arange(len(order))])
    assert len(pool.rows) == selection.super_batch_size, (len(pool.rows), selection.super_batch_size)

    ref = _embeddings(pool.reference, reference, device)
    own = _embeddings(pool.learner, learner, device) if pool.learner is not None and learner is not None else None
    b = selection.sub_batch_size
    try:
        drawn = jointly_sample_batch(
            own,
            ref,
            sub_batch_size=b,
            n_chunks=selection.n_chunks,
            loss=selection.loss,
            criterion=selection.criterion,
            method=selection.method,
            gain=selection.gain,
            generator=generator(seed, "draw", round_number, sub_batch),
        )
    except ValueError as error:
        raise UserError(f"round {round_number}, sub-batch {sub_batch}: {error}") from error

    positions = drawn.positions.cpu().numpy()
    chosen = pool.rows[positions]
    ref_losses = diagonal_losses(ref, selection.loss).cpu()
    own_losses = diagonal_losses(own, selection.loss).cpu() if own is not None else None
    table = pa.Table.from_pydict(
        {
            "sub_batch": np.full(b, sub_batch),
            "position": np.arange(b),
            "chunk": drawn.chunks.cpu().numpy(),
            "score": drawn.scores.float().cpu().numpy(),
            "learner_loss": own_losses[positions].float().numpy() if own_losses is not None else pa.nulls(b),
            "reference_loss": ref_losses[positions].float().numpy(),
            "shard": chosen["shard"],
            "row": chosen["row"],
            "content_low": chosen["low"],
            "content_high": chosen["high"],
        },
        schema=SELECTED_SCHEMA,
    )
    finite = (
        torch.isfinite(ref_losses) if own_losses is None else torch.isfinite(ref_losses) & torch.isfinite(own_losses)
    )
    unusable = int((~finite).sum())
    tally = Tally(
        step="select",
        rows_in=len(pool.rows),
        kept=b,
        dropped={"not_selected": len(pool.rows) - b - unusable, "embedding_nonfinite": unusable},
    )
    learnability = uniform = None
    if own is not None:
        learnability = sub_batch_learnability(own, ref, drawn.positions, loss=selection.loss)
        some = torch.randperm(len(pool.rows), generator=generator(seed, "uniform", round_number, sub_batch))
        some = some[finite[some]][:b].to(device)
        uniform = sub_batch_learnability(own, ref, some, loss=selection.loss)
    return table, SubBatchStats(
        sub_batch=sub_batch, tally=tally, learnability=learnability, uniform_learnability=uniform
    )


def selected_name(folder: str, sub_batch: int) -> str:
    """Name, within the root, of a sub-batch's selected file; `folder` is the round's."""
    return f"{folder}/steps/selected-{sub_batch:06d}.parquet"


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


def _embeddings(vectors: tuple[Vectors, Vectors], scale: Scale, device: torch.device) -> Embeddings:
    zimg, ztxt = (torch.from_numpy(v).to(device).float() for v in vectors)
    return Embeddings(zimg, ztxt, scale.logit_scale, scale.logit_bias)
