"""Draw a sub-batch jointly out of a super-batch: JEST, without ever building its B × B matrices.

Evans, Parthasarathy, Merzic, Hénaff, "Data curation via joint example selection further accelerates
multimodal learning", arXiv 2406.17711v1: Algorithm 1 (sigmoid loss) and Algorithm 3 (softmax loss).

    B  rows of the super-batch (candidates)      b  rows of the sub-batch
    D  width of one encoder's embeddings         c  rows of one chunk, b = sum of n_chunks such sizes

A candidate's score, given the rows C drawn so far, is what it would add to the batch's loss: its own pair and
its pairs with C in both directions, learner minus reference. After each chunk only that chunk's c columns are
new: thin ``[rows, c]`` tiles update running sums (sigmoid) or running log-sum-exps (softmax). Memory is
O(B·D + B + tile), time 8·B·b·D operations. `tests/oracles/jest_literal.py` is the slow literal form.

Where we differ from the printed pseudo-code: a draw is Gumbel-top-k in log space without replacement (``exp``
of the scores overflows or underflows, and numpy's ``choice`` repeats rows); chunk sizes are exact integers
(``int(B * (1 - f) / n)`` is 2,047, not 2,048, at B = 163,840); Algorithm 3 scores the reference with the
reference's own embeddings; logit = scale · cosine + bias, as in Algorithm 2 and open_clip, not - beta.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad, softplus

from curate.criteria import CRITERIA, LOSSES, METHODS, Criterion, Loss, Method
from curate.logits import accumulator, add_logsumexp_, add_softplus_, diagonal_cosines

COLUMNS_PER_TILE = 1024  # of sub_batch_learnability, where no chunk sets the width of a tile


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What one model made of a super-batch.

    Attributes:
        zimg: Float [B, D], L2-normalised image embeddings; bfloat16, float16, float32 or float64.
        ztxt: Float [B, D], L2-normalised text embeddings of the same pairs.
        logit_scale: The factor on the cosine, not its logarithm (open_clip's parameter is the logarithm).
        logit_bias: Added to every logit of the sigmoid loss. The softmax loss ignores it: there it cancels.

    Raises:
        ValueError: If the two arrays are not alike, or the scale or bias is not a finite number.
    """

    zimg: Tensor
    ztxt: Tensor
    logit_scale: float
    logit_bias: float = 0.0

    def __post_init__(self) -> None:
        zimg, ztxt = self.zimg, self.ztxt
        if zimg.ndim != 2 or zimg.shape != ztxt.shape:
            raise ValueError(
                f"zimg and ztxt must both be [B, D]: found {list(zimg.shape)} and {list(ztxt.shape)}; "
                "row i of each must embed pair i"
            )
        if not zimg.is_floating_point() or zimg.dtype != ztxt.dtype or zimg.device != ztxt.device:
            raise ValueError(
                "zimg and ztxt must share one floating dtype and one device: found "
                f"{zimg.dtype} on {zimg.device} and {ztxt.dtype} on {ztxt.device}; convert one with .to()"
            )
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0 and math.isfinite(self.logit_bias)):
            raise ValueError(
                "logit_scale must be finite and above 0, logit_bias finite: found "
                f"{self.logit_scale} and {self.logit_bias}; pass the factor, exp() of open_clip's parameter"
            )

    def __len__(self) -> int:
        return len(self.zimg)


@dataclass(frozen=True, eq=False)
class SubBatch:
    """Rows of a super-batch, in the order drawn, on the device of the embeddings.

    Attributes:
        positions: Int64 [b], distinct row numbers of the super-batch.
        chunks: Int64 [b], the draw that took each row, 0 to n_chunks - 1; 0 unless the method is joint.
        scores: Float [b], the row's score given all chunks before its own, without gain and noise. Float32,
            or float64 for float64 embeddings; zeros if the method is uniform, which scores nothing.
    """

    positions: Tensor
    chunks: Tensor
    scores: Tensor


_Models = Sequence[tuple[int, Embeddings]]  # (sign of this model's loss in the score, its embeddings)


@torch.no_grad()
def jointly_sample_batch(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    sub_batch_size: int,
    n_chunks: int = 16,
    loss: Loss = "sigmoid",
    criterion: Criterion = "learnability",
    method: Method = "joint",
    gain: float = 1.0,
    generator: torch.Generator,
    group: distributed.ProcessGroup | None = None,
) -> SubBatch:
    """Draw the rows to train on together, better scores more probably (arXiv 2406.17711, Algorithms 1, 3).

    Row 1 has the caption of row 2, so a reference that knows leaves row 1 out:

    >>> reference = Embeddings(torch.eye(3), torch.eye(3)[[0, 2, 2]], logit_scale=10.0, logit_bias=-5.0)
    >>> drawn = jointly_sample_batch(
    ...     None, reference, sub_batch_size=2, n_chunks=2, criterion="easy_reference", gain=1e3,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> sorted(drawn.positions.tolist()), drawn.chunks.tolist()
    ([0, 2], [0, 1])

    Rows with a non-finite embedding or score are never drawn and do not touch the scores of others. Equal
    keys go to the lower row. The noise is drawn on the CPU in float64, B values per draw: one seed is one
    noise on every device, in every precision (yet rows may differ: one flipped pick changes later scores).

    Args:
        learner: Embeddings of the model in training; may be None, and is not read, under ``easy_reference``.
        reference: Embeddings of the fixed model; may be None, and is not read, under ``hard_learner``. Its D
            may differ from the learner's; B and the device may not.
        sub_batch_size: b, at most B.
        n_chunks: Draws of a joint sub-batch, at most b; the first ``b % n_chunks`` of them take one row more.
            One chunk is the independent method. The other methods ignore it.
        loss: The pairwise loss that both models are scored with.
        criterion: loss(learner) - loss(reference), or one of the two alone with that sign.
        method: ``joint`` scores each row given the rows before it, ``independent`` by its own pair alone,
            ``uniform`` not at all: it needs only B, from either model, and passes over non-finite rows too.
        gain: Factor on the whole score of either loss (``softmax_score_gain``, 100 in Algorithm 2): at 0 the
            draw is uniform, at high gain it is the top c of each chunk.
        generator: CPU generator; advanced by B values per draw.
        group: Processes that share the super-batch, each calling this with its own rows, all else alike and
            generators in one state: its rows are numbered after those of the ranks before it, B is all of them,
            and every rank draws the same sub-batch, the one that a single process would draw of all rows.

    Returns:
        The b distinct rows, in the order drawn.

    Raises:
        ValueError: If an argument breaks a rule above, or fewer than b rows can be scored; the latter is found
            once all draws are made.
    """
    _require_choice("loss", loss, LOSSES)
    _require_choice("criterion", criterion, CRITERIA)
    _require_choice("method", method, METHODS)
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(f"gain must be finite and at least 0: found {gain}; 0 is uniform, 100 the paper's")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU: found {generator.device}; use torch.Generator()")
    if method == "uniform":  # signs have no meaning here; any model tells B and which rows are sound
        models: _Models = [(1, model) for model in (learner, reference) if model is not None]
    else:
        models = _signed_models(learner, reference, criterion)
    share = _Share(_shared_rows(models), models[0][1].zimg.device, group)
    B = share.B
    if not 1 <= sub_batch_size <= B:
        raise ValueError(f"sub_batch_size must be 1 to B = {B}: found {sub_batch_size}; embed more rows")
    sizes = _chunk_sizes(sub_batch_size, n_chunks) if method == "joint" else [sub_batch_size]

    conditional = _Conditional(models, None if method == "uniform" else loss, share)
    return _draw(conditional, share, sizes, gain, generator)


@torch.no_grad()
def diagonal_losses(embeddings: Embeddings, loss: Loss) -> Tensor:
    """Give the loss of each pair alone: its unconditional, empty-batch loss (arXiv 2406.17711, A.6).

    Args:
        embeddings: One model's embeddings of B pairs.
        loss: ``sigmoid``: log(1 + exp(-logit)); ``softmax``: -scale · cosine, without normaliser, as there is
            no negative yet.

    Returns:
        Float [B], float32, or float64 for float64 embeddings.

    Raises:
        ValueError: If ``loss`` is none of `LOSSES`.
    """
    _require_choice("loss", loss, LOSSES)
    logits = _diagonal_logits(embeddings, loss)
    return softplus(-logits) if loss == "sigmoid" else -logits


@torch.no_grad()
def sub_batch_learnability(learner: Embeddings, reference: Embeddings, positions: Tensor, *, loss: Loss) -> float:
    """Measure l(batch | learner) - l(batch | reference), the mean per example of the loss one trains with.

    Equations 1 (softmax) and 2 (sigmoid) of arXiv 2406.17711 over all b × b pairs, computed in tiles.

    Args:
        learner: Embeddings of the super-batch by the model in training.
        reference: The same rows embedded by the fixed model.
        positions: Int64 [b], the rows of the batch.
        loss: Which of the two equations.

    Returns:
        The difference per example; NaN if a row of the batch is not finite.

    Raises:
        ValueError: If ``positions`` is empty or not one-dimensional, the models' B or device differ, or
            ``loss`` is none of `LOSSES`.
    """
    _require_choice("loss", loss, LOSSES)
    _shared_rows([(1, learner), (-1, reference)])
    return sub_batch_loss(learner, positions, loss=loss) - sub_batch_loss(reference, positions, loss=loss)


@torch.no_grad()
def sub_batch_loss(model: Embeddings, positions: Tensor, *, loss: Loss) -> float:
    """Compute one model's loss of a batch, the mean per example, as open_clip's losses of these pairs give it.

    Args:
        model: Embeddings of the super-batch.
        positions: Int64 [b], the rows of the batch.
        loss: Equation 1 (softmax) or 2 (sigmoid) of arXiv 2406.17711, b × b pairs in tiles, summed in float64.

    Raises:
        ValueError: If ``positions`` is empty or not one-dimensional, or ``loss`` is none of `LOSSES`.
    """
    _require_choice("loss", loss, LOSSES)
    if positions.ndim != 1 or not len(positions):
        found = list(positions.shape)
        raise ValueError(f"positions must be [b], b at least 1: found {found}; pass SubBatch.positions")
    batch = Embeddings(model.zimg[positions], model.ztxt[positions], model.logit_scale, model.logit_bias)
    own = _diagonal_logits(batch, loss)
    if loss == "sigmoid":
        # All pairs as negatives, then the b positives put right: softplus(-x) = softplus(x) - x.
        totals = -own.double()
        for columns in _blocks(batch.ztxt):
            add_softplus_(totals, batch.zimg, columns, scale=model.logit_scale, bias=model.logit_bias)
        return float(totals.mean())
    lse = own.new_full((2, len(own)), -math.inf)
    for running, rows, others in zip(lse, (batch.zimg, batch.ztxt), (batch.ztxt, batch.zimg), strict=True):
        for columns in _blocks(others):
            add_logsumexp_(running, rows, columns, scale=model.logit_scale)
    return float((0.5 * lse.sum(0) - own).mean(dtype=torch.float64))


class _Share:
    """The rows of the super-batch that this process holds: all, or of a group's those after the ranks before it."""

    def __init__(self, rows: int, device: torch.device, group: distributed.ProcessGroup | None) -> None:
        self._group, self.rows = group, rows
        held = [rows]
        if group is not None:
            held = self._gather(torch.tensor([rows], device=device)).flatten().tolist()
            if not all(held):
                raise ValueError(f"every rank must hold a row of the super-batch: found {held}; divide it evenly")
        rank = 0 if group is None else distributed.get_rank(group)
        self.start, self.B = sum(held[:rank]), sum(held)

    def of(self, whole: Tensor) -> Tensor:
        """This process's part of something [B]."""
        return whole[self.start : self.start + self.rows]

    def local(self, positions: Tensor) -> Tensor:
        """Where rows lie here; what lies elsewhere lies at ``rows``."""
        if self._group is None:
            return positions
        at = positions - self.start
        return at.where((at >= 0) & (at < self.rows), self.rows)

    def take(self, z: Tensor, positions: Tensor) -> Tensor:
        """Rows [c, D] of z, whoever holds them."""
        if self._group is None:
            return z[positions]
        at = self.local(positions)
        taken = z[at.clamp(max=self.rows - 1)].masked_fill_((at == self.rows)[:, None], 0)
        distributed.all_reduce(taken, group=self._group)  # one rank's row and zeros: exact in every precision
        return taken

    def largest(self, keys: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Positions [c] of the largest of all processes' keys, equal ones from the lower row, and their scores."""
        order = torch.sort(keys, descending=True, stable=True).indices[:count]
        if self._group is None:
            return order, scores[order]
        short = count - len(order)
        best = self._gather(pad(keys[order], (0, short), value=-math.inf)).flatten()
        # Rank after rank, each from its best to its worst, equal ones by row: a stable sort leaves them so.
        at = torch.sort(best, descending=True, stable=True).indices[:count]
        positions, found = (pad(own, (0, short)) for own in (order + self.start, scores[order]))
        return self._gather(positions).flatten()[at], self._gather(found).flatten()[at]

    def total(self, counts: Tensor) -> Tensor:
        """Sum over all processes."""
        return counts if self._group is None else self._gather(counts).sum(0)

    def _gather(self, own: Tensor) -> Tensor:
        """Everyone's [ranks, …] of something of one shape, by rank."""
        found = [torch.empty_like(own) for _ in range(distributed.get_world_size(self._group))]
        distributed.all_gather(found, own, group=self._group)
        return torch.stack(found)


class _Conditional:
    """Score of every candidate of this process's share, given the rows drawn so far.

    Attributes:
        scores: Float [rows], NaN for a row that must never be drawn.
    """

    def __init__(self, models: _Models, loss: Loss | None, share: _Share) -> None:
        self._models, self._loss, self._share = models, loss, share
        rows, device = share.rows, models[0][1].zimg.device
        dtype = accumulator(*(model.zimg for _, model in models))
        self._diagonal = torch.zeros(rows, dtype=dtype, device=device)
        for sign, model in models:
            if loss is not None:
                self._diagonal.add_(diagonal_losses(model, loss), alpha=sign)
            for z in (model.zimg, model.ztxt):
                # A sum is finite only if all its terms are (unit rows cannot overflow): no [B, D] temporary.
                self._diagonal.masked_fill_(~z.sum(1).isfinite(), math.nan)
        self.scores = self._diagonal.clone()
        # Softmax only: log-sum-exp over the rows drawn so far, [model, image to text | text to image, rows].
        self._lse = self.scores.new_full((len(models), 2, rows if loss == "softmax" else 0), -math.inf)

    def extend(self, new: Tensor) -> None:
        """Bring the scores up to date with the rows ``new`` [c], just drawn."""
        for m, (sign, model) in enumerate(self._models):
            # Algorithm 1's ji, images of candidates × texts drawn; then its ij, the other way round.
            for d, (rows, others) in enumerate(((model.zimg, model.ztxt), (model.ztxt, model.zimg))):
                columns = self._share.take(others, new)
                if self._loss == "sigmoid":
                    scale, bias = model.logit_scale, model.logit_bias
                    add_softplus_(self.scores, rows, columns, scale=scale, bias=bias, sign=sign)
                else:
                    add_logsumexp_(self._lse[m, d], rows, columns, scale=model.logit_scale)
        if self._loss == "softmax":
            # The normaliser belongs to the whole set, so it is added afresh each time (A.6). The candidate's
            # own pair is not in it: Algorithm 3 masks all but the rows drawn.
            self.scores.copy_(self._diagonal)
            for (sign, _), lse in zip(self._models, self._lse, strict=True):
                self.scores.add_(lse.sum(0), alpha=0.5 * sign)


def _draw(
    conditional: _Conditional, share: _Share, sizes: list[int], gain: float, generator: torch.Generator
) -> SubBatch:
    """Draw ``sizes`` rows chunk by chunk, each chunk given those before it.

    Nothing here waits for the device: while it brings the scores up to date, the noise of the next draw is made.
    """
    b, device = sum(sizes), conditional.scores.device
    scores = conditional.scores.new_empty(b)
    order = positions = torch.empty(b, dtype=torch.int64, device=device)
    gone = torch.zeros(share.rows + 1, dtype=torch.bool, device=device)  # the last one for rows that lie elsewhere
    left = torch.empty(len(sizes), dtype=torch.int64, device=device)  # rows that could be drawn, at each draw
    drawn = 0
    for number, size in enumerate(sizes):
        if drawn:  # brought up to date only when another draw follows
            conditional.extend(order)
        # Gumbel-top-k: the largest of gain · score + noise are drawn with p ∝ exp(gain · score), none twice.
        noise = share.of(_gumbel(share.B, generator).to(scores.dtype))
        if device.type == "cuda":
            noise = noise.pin_memory()
        keys = noise.to(device, non_blocking=True).add_(conditional.scores * gain)
        keys.masked_fill_(~keys.isfinite() | gone[:-1], -math.inf)
        left[number] = keys.isfinite().sum()
        order, scores[drawn : drawn + size] = share.largest(keys, conditional.scores, size)
        positions[drawn : drawn + size] = order
        gone.index_fill_(0, share.local(order), True)
        drawn += size
    _require_enough(share.total(left).tolist(), sizes, share.B)
    return SubBatch(positions, torch.repeat_interleave(torch.tensor(sizes)).to(device), scores)


def _require_enough(left: list[int], sizes: list[int], B: int) -> None:
    """Raise if a draw found too few rows; what was drawn then and later is void."""
    b, drawn = sum(sizes), 0
    for found, size in zip(left, sizes, strict=True):
        if drawn + found < b:
            raise ValueError(
                f"sub_batch_size needs as many rows with finite embeddings and scores: expected {b}, "
                f"found {drawn + found} of {B}; drop the broken rows first, or lower sub_batch_size or gain"
            )
        drawn += size


def _gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` standard Gumbel values, float64 on the CPU, all finite: -log(-log(u))."""
    u = torch.rand(size, generator=generator, dtype=torch.float64)  # multiples of 2^-53 in [0, 1)
    return u.clamp_(min=2.0**-54).log_().neg_().log_().neg_()


def _diagonal_logits(model: Embeddings, loss: Loss) -> Tensor:
    """Logit [B] of each pair with itself."""
    cosines = diagonal_cosines(model.zimg, model.ztxt)
    return cosines.mul_(model.logit_scale).add_(model.logit_bias if loss == "sigmoid" else 0.0)


def _blocks(z: Tensor) -> Iterator[Tensor]:
    return (z[start : start + COLUMNS_PER_TILE] for start in range(0, len(z), COLUMNS_PER_TILE))


def _chunk_sizes(sub_batch_size: int, n_chunks: int) -> list[int]:
    """Split b into n_chunks integers as evenly as they allow, the larger ones first."""
    if not 1 <= n_chunks <= sub_batch_size:
        law = f"n_chunks must be 1 to sub_batch_size = {sub_batch_size}"
        raise ValueError(f"{law}: found {n_chunks}; each chunk draws at least one row")
    size, longer = divmod(sub_batch_size, n_chunks)
    return [size + 1] * longer + [size] * (n_chunks - longer)


def _signed_models(learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion) -> _Models:
    models = []
    for sign, name, model, unused_by in (
        (1, "learner", learner, "easy_reference"),
        (-1, "reference", reference, "hard_learner"),
    ):
        if criterion == unused_by:
            continue
        if model is None:
            raise ValueError(f"{criterion} needs the {name}: found None; pass its embeddings, or {unused_by}")
        models.append((sign, model))
    return models


def _shared_rows(models: _Models) -> int:
    """Give B, after checking that all models embed the same rows on one device."""
    if not models:
        raise ValueError("uniform needs the embeddings of either model for B: found None twice; pass one")
    rows, devices = {len(model) for _, model in models}, {model.zimg.device for _, model in models}
    if len(rows) > 1 or len(devices) > 1:
        found = f"found B = {sorted(rows)} on {sorted(map(str, devices))}"
        raise ValueError(f"models must embed the same rows on one device: {found}; align by uid, or move one")
    return rows.pop()


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: found {value!r}")
