"""Select: from the candidates of one super-batch to the rows of one sub-batch, with what was known at the pick."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from curate.errors import UserError
from curate.jest import Embeddings, diagonal_losses, jointly_sample_batch, sub_batch_learnability, sub_batch_loss
from curate.logits import TIE
from curate.recipe import SelectionSection
from curate.seeds import derive_seed
from curate.select.files import SELECTED_SCHEMA, SubBatchStats
from curate.select.standing import Standing
from curate.select.windows import Rows, key_order
from curate.tally import Tally

Vectors = npt.NDArray[np.float16]


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

    def finite_rows(self) -> npt.NDArray[np.int64]:
        """Positions of the candidates whose vectors are all there."""
        finite = np.ones(len(self.rows), bool)
        for vectors in (*self.reference, *(self.learner or ())):
            finite &= np.isfinite(vectors).all(axis=1)
        return np.flatnonzero(finite)

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


def needs_learner(selection: SelectionSection) -> bool:
    """Easy-reference and uniform selection never look at the learner, so it need not be run; `auto` has to ask it."""
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
        candidates: of the super-batch, B of them, in any order.
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
        UserError: if fewer than b candidates have finite embeddings, or a model's scale is not finite.
    """
    ordered = candidates.take(key_order(candidates.rows))
    B, b = len(ordered.rows), selection.sub_batch_size
    assert not selection.is_open, "decided once a round, before anything is drawn"
    assert selection.super_batch_size == B, (B, selection.super_batch_size)
    # Whatever the criterion looks at: the sub-batch is reported, and later trained on, by both models.
    pool = ordered.take(ordered.finite_rows())
    where = f"round {round_number}, sub-batch {sub_batch}"
    if len(pool.rows) < b:
        raise UserError(
            f"{where}: expected {b} candidates with finite embeddings, found {len(pool.rows)} of {B}; look at the "
            "learner's weights, and publish a sound one under the next number"
        )
    try:
        ref = embeddings_of(pool.reference, reference, device)
        own = embeddings_of(pool.learner, learner, device) if pool.learner is not None and learner is not None else None
        drawn = jointly_sample_batch(
            own,
            ref,
            sub_batch_size=b,
            n_chunks=selection.n_chunks,
            loss=selection.loss,
            criterion="easy_reference" if selection.criterion == "auto" else selection.criterion,
            method=selection.method,
            gain=selection.gain,
            generator=_generator(seed, "draw", round_number, sub_batch),
        )
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error

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
            "content_low": chosen["content_low"],
            "content_high": chosen["content_high"],
        },
        schema=SELECTED_SCHEMA,
    )
    tally = Tally(
        step="select",
        rows_in=B,
        kept=b,
        dropped={"not_selected": len(pool.rows) - b, "embedding_nonfinite": B - len(pool.rows)},
    )
    reference_loss = sub_batch_loss(ref, drawn.positions, loss=selection.loss)
    learnability = uniform = None
    if own is not None:
        learnability = sub_batch_loss(own, drawn.positions, loss=selection.loss) - reference_loss
        some = torch.randperm(len(pool.rows), generator=_generator(seed, "uniform", round_number, sub_batch))
        uniform = sub_batch_learnability(own, ref, some[:b].to(device), loss=selection.loss)
    return table, SubBatchStats(
        sub_batch=sub_batch,
        tally=tally,
        learnability=learnability,
        uniform_learnability=uniform,
        reference_loss=reference_loss,
    )


def measure_standing(learner: Embeddings, reference: Embeddings) -> Standing:
    """Measure where a learner stands beside the reference: see `curate.select.standing`.

    >>> right = torch.eye(40)
    >>> swapped = right[[*range(30), *reversed(range(30, 40))]]
    >>> found = measure_standing(Embeddings(right, swapped, 1.0), Embeddings(right, right, 1.0))
    >>> found.reference, found.learner, found.lead, found.decided
    (1.0, 0.75, 0.25, 'learnability')

    Args:
        learner: Embeddings [n, D] of a sample of the pool.
        reference: Of the same pairs.
    """
    own, fixed = (_hits(model) for model in (learner, reference))
    hits = int(fixed.sum())
    return Standing(
        pairs=len(learner),
        learner=float(own.double().mean()) if len(own) else 0.0,
        reference=float(fixed.double().mean()) if len(fixed) else 0.0,
        shared=int((own & fixed).sum()) / hits if hits else 1.0,
    )


def embeddings_of(vectors: tuple[Vectors, Vectors], scale: Scale, device: torch.device) -> Embeddings:
    """Stored vectors as selection takes them.

    On CUDA they stay in float16, which its tensor cores multiply as it is and sum in float32; a CPU is faster once they
    are widened.
    """
    zimg, ztxt = (torch.from_numpy(v).to(device) for v in vectors)
    if device.type == "cpu":
        zimg, ztxt = zimg.float(), ztxt.float()
    return Embeddings(zimg, ztxt, scale.logit_scale, scale.logit_bias)


def _generator(seed: int, purpose: str, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *parts))


def _hits(model: Embeddings) -> Tensor:
    """Bool [2 n]: whether each picture's caption, and each caption's picture, is nearer than all others."""
    cosines = model.zimg.float() @ model.ztxt.float().T
    own = cosines.diagonal() - TIE
    rivals = cosines.clone().fill_diagonal_(-torch.inf)
    # Of no rows there is no largest one.
    return torch.cat([own > rivals.amax(dim) for dim in (1, 0)]) if len(own) else own > 0
