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
from torch import Tensor
from torch.nn.functional import softplus

from curate.criteria import CRITERIA, LOSSES, METHODS, Criterion, Loss, Method

# Logits of one tile. On a CPU it stays in the second-level cache between product and reduction (512 kB in
# float32; of 2^15 to 2^20 the fastest at D = 512, c = 256). On CUDA, 128 MiB spread launches: not measured.
TILE_LOGITS = {"cpu": 1 << 17, "cuda": 1 << 25}
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

    Returns:
        The b distinct rows, in the order drawn.

    Raises:
        ValueError: If an argument breaks a rule above, or fewer than b rows can be scored.
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
    B = _shared_rows(models)
    if not 1 <= sub_batch_size <= B:
        raise ValueError(f"sub_batch_size must be 1 to B = {B}: found {sub_batch_size}; embed more rows")
    sizes = _chunk_sizes(sub_batch_size, n_chunks) if method == "joint" else [sub_batch_size]

    conditional = _Conditional(models, None if method == "uniform" else loss)
    return _draw(conditional, sizes, gain, generator)


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
    logits = _diagonal_logits(embeddings, loss, _accumulator(embeddings.zimg))
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
    dtype = _accumulator(batch.zimg)
    own = _diagonal_logits(batch, loss, dtype)
    buffer = _tile_buffer(own, COLUMNS_PER_TILE)
    if loss == "sigmoid":
        # All pairs as negatives, then the b positives put right: softplus(-x) = softplus(x) - x.
        total = -own.sum(dtype=torch.float64)
        for columns in _blocks(batch.ztxt, COLUMNS_PER_TILE):
            for _, tile in _logit_tiles(batch.zimg, columns, model.logit_scale, model.logit_bias, buffer):
                total += softplus(tile).sum(dtype=torch.float64)
        return float(total) / len(positions)
    lse = own.new_full((2, len(own)), -math.inf)
    for d, (rows, others) in enumerate(((batch.zimg, batch.ztxt), (batch.ztxt, batch.zimg))):
        for columns in _blocks(others, COLUMNS_PER_TILE):
            for at, tile in _logit_tiles(rows, columns, model.logit_scale, 0.0, buffer):
                _add_logsumexp_(lse[d, at], tile)
    return float((0.5 * lse.sum(0) - own).mean(dtype=torch.float64))


class _Conditional:
    """Score of every candidate given the rows drawn so far.

    Attributes:
        scores: Float [B], NaN for a row that must never be drawn.
    """

    def __init__(self, models: _Models, loss: Loss | None) -> None:
        self._models, self._loss = models, loss
        B, device = len(models[0][1]), models[0][1].zimg.device
        dtype = _accumulator(*(model.zimg for _, model in models))
        self._diagonal = torch.zeros(B, dtype=dtype, device=device)
        for sign, model in models:
            if loss is not None:
                self._diagonal.add_(diagonal_losses(model, loss), alpha=sign)
            for z in (model.zimg, model.ztxt):
                # A sum is finite only if all its terms are (unit rows cannot overflow): no [B, D] temporary.
                self._diagonal.masked_fill_(~z.sum(1).isfinite(), math.nan)
        self.scores = self._diagonal.clone()
        # Softmax only: log-sum-exp over the rows drawn so far, [model, image to text | text to image, B].
        self._lse = self.scores.new_full((len(models), 2, B if loss == "softmax" else 0), -math.inf)

    def extend(self, new: Tensor) -> None:
        """Bring the scores up to date with the rows ``new`` [c], just drawn."""
        buffer = _tile_buffer(self.scores, len(new))
        for m, (sign, model) in enumerate(self._models):
            bias = model.logit_bias if self._loss == "sigmoid" else 0.0
            # Algorithm 1's ji, images of candidates × texts drawn; then its ij, the other way round.
            for d, (rows, columns) in enumerate(((model.zimg, model.ztxt), (model.ztxt, model.zimg))):
                for at, tile in _logit_tiles(rows, columns[new], model.logit_scale, bias, buffer):
                    if self._loss == "sigmoid":
                        # As log Π(1 + e^-|x|) + Σ relu(x), 32 factors to a log, it was no faster.
                        self.scores[at].add_(softplus(tile).sum(1), alpha=sign)
                    else:
                        _add_logsumexp_(self._lse[m, d, at], tile)
        if self._loss == "softmax":
            # The normaliser belongs to the whole set, so it is added afresh each time (A.6). The candidate's
            # own pair is not in it: Algorithm 3 masks all but the rows drawn.
            self.scores.copy_(self._diagonal)
            for (sign, _), lse in zip(self._models, self._lse, strict=True):
                self.scores.add_(lse.sum(0), alpha=0.5 * sign)


def _draw(conditional: _Conditional, sizes: list[int], gain: float, generator: torch.Generator) -> SubBatch:
    """Draw ``sizes`` rows chunk by chunk, each chunk given those before it."""
    b, B = sum(sizes), len(conditional.scores)
    scores = conditional.scores.new_empty(b)
    order = positions = torch.empty(b, dtype=torch.int64, device=scores.device)
    drawn = 0
    for size in sizes:
        if drawn:  # brought up to date only when another draw follows
            conditional.extend(order)
        # Gumbel-top-k: the largest of gain · score + noise are drawn with p ∝ exp(gain · score), none twice.
        keys = _gumbel(B, generator).to(scores).add_(conditional.scores * gain)
        keys.masked_fill_(~keys.isfinite(), -math.inf).index_fill_(0, positions[:drawn], -math.inf)
        found = drawn + int(keys.isfinite().sum())
        if found < b:
            raise ValueError(
                f"sub_batch_size needs as many rows with finite embeddings and scores: expected {b}, "
                f"found {found} of {B}; drop the broken rows first, or lower sub_batch_size or gain"
            )
        order = torch.sort(keys, descending=True, stable=True).indices[:size]
        positions[drawn : drawn + size] = order
        scores[drawn : drawn + size] = conditional.scores[order]
        drawn += size
    return SubBatch(positions, torch.repeat_interleave(torch.tensor(sizes)).to(positions.device), scores)


def _gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` standard Gumbel values, float64 on the CPU, all finite: -log(-log(u))."""
    u = torch.rand(size, generator=generator, dtype=torch.float64)  # multiples of 2^-53 in [0, 1)
    return u.clamp_(min=2.0**-54).log_().neg_().log_().neg_()


def _logit_tiles(
    rows: Tensor, columns: Tensor, scale: float, bias: float, buffer: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield ``scale · rows @ columns.T + bias`` in blocks of rows; the next tile overwrites this one."""
    bias_term = buffer.new_full((), bias)
    # Half precision: CUDA multiplies it as it is and sums in float32; a CPU is faster once it is widened.
    widen = rows.is_cuda and rows.element_size() == 2 and buffer.dtype == torch.float32
    width, columns = len(columns), columns if widen else columns.to(buffer.dtype)
    block_rows = buffer.numel() // width
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        tile = buffer[: len(block) * width].view(len(block), width)
        if widen:
            torch.mm(block, columns.T, out_dtype=buffer.dtype, out=tile)
        else:
            torch.mm(block.to(buffer.dtype), columns.T, out=tile)
        torch.add(bias_term, tile, alpha=scale, out=tile)  # one pass for both
        yield slice(start, start + len(block)), tile


def _add_logsumexp_(running: Tensor, tile: Tensor) -> None:
    """Add the rows of ``tile`` [rows, c], which is overwritten, to the running log-sum-exps [rows]."""
    peak = tile.amax(1, keepdim=True)
    tile_lse = tile.sub_(peak).exp_().sum(1).log_().add_(peak.squeeze(1))
    torch.logaddexp(running, tile_lse, out=running)


def _diagonal_logits(model: Embeddings, loss: Loss, dtype: torch.dtype) -> Tensor:
    """Logit [B] of each pair with itself, block by block in one buffer: no [B, D] temporary arises."""
    B, D = model.zimg.shape
    cosines = model.zimg.new_empty(B, dtype=dtype)
    buffer = _tile_buffer(cosines, D)
    block_rows = len(buffer) // max(1, D)
    for start in range(0, B, block_rows):
        block = model.zimg[start : start + block_rows]
        products = buffer[: block.numel()].view_as(block).copy_(block).mul_(model.ztxt[start : start + block_rows])
        cosines[start : start + block_rows] = products.sum(1)
    return cosines.mul_(model.logit_scale).add_(model.logit_bias if loss == "sigmoid" else 0.0)


def _blocks(z: Tensor, rows: int) -> Iterator[Tensor]:
    return (z[start : start + rows] for start in range(0, len(z), rows))


def _tile_buffer(like: Tensor, columns: int) -> Tensor:
    return like.new_empty(max(TILE_LOGITS.get(like.device.type, TILE_LOGITS["cuda"]), columns))


def _accumulator(*arrays: Tensor) -> torch.dtype:
    return torch.float64 if any(z.dtype == torch.float64 for z in arrays) else torch.float32


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
