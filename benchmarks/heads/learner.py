"""A learner of two small towers on frozen features, trained on batches that the product's selection draws.

The towers are two layers each, 64 → 256 → 32, as in LiT (arXiv 2111.07991) with a head on both sides. Draws are
`curate.jest`'s, on embeddings rounded to float16, as `curate round` stores them; `tests/test_heads.py` holds that the
rows are those that the product's selection picks from the same super-batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

from benchmarks.acceleration.variants import draw_by_scores, super_batch_losses
from benchmarks.heads.draws import Terms, draw_jointly
from benchmarks.heads.worlds import WIDTH, Pairs
from curate.criteria import Criterion, Decided, Loss
from curate.jest import Embeddings, jointly_sample_batch
from curate.pipelines.wanted import SAMPLE_ROWS
from curate.seeds import derive_seed
from curate.select.draw import measure_standing

HIDDEN, D = 256, 32
START_STEPS, START_BATCH, START_RATE = 3000, 64, 1e-3
"""Of uniform training, at a constant rate, that a learner has behind it when it is past its start."""
FORWARD, TRAIN = 1, 3
"""Operations of one pair, in forward passes (arXiv 2406.17711, A.4)."""
DECIDED_EVERY = 100
"""Steps between two decisions of `auto`, which rest on as many pairs of the pool as a round's."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of choosing batches, with all that it is trained with."""

    method: Literal["uniform", "independent", "super_batch", "joint"] = "uniform"
    """`super_batch` draws by each pair's part of the super-batch's loss: the other reading of independent selection."""
    criterion: Criterion | Literal["auto"] = "learnability"
    """`auto` is the product's (`curate.select.standing`), decided anew each `DECIDED_EVERY` steps."""
    terms: Terms = "all"
    """Of joint selection."""
    gain: float = 10.0
    filter_ratio: float = 0.975
    n_chunks: int = 16
    batch: int = 32
    steps: int = 1000
    rate: float = 1e-3
    """At its highest; a cosine to 0, after a warm-up of 2 %."""
    loss: Loss = "sigmoid"
    round_steps: int = 1
    """Steps between two scorings by the learner."""
    shuffled: bool = False
    """The rows of a round are dealt anew to its batches."""
    uniform_share: float = 0.0
    """Of batches that are drawn uniformly."""
    easy_steps: int = 0
    """Steps at the beginning that are chosen by easy-reference."""
    start: Literal["trained", "random"] = "trained"
    reference: Literal["strong", "weak", "start"] = "strong"
    """`start` is the learner as it begins: a control, for it knows nothing that the learner does not."""
    rows: Literal["all", "filtered", "reference's"] = "all"
    """`filtered`: what the reference likes most, once; `reference's`: the clean pairs that it was trained on."""
    kept: float = 1.0
    """Share of the pool that is left, where it is filtered."""

    @property
    def super_batch(self) -> int:
        """B."""
        return round(self.batch / (1 - self.filter_ratio)) if self.selects else self.batch

    @property
    def selects(self) -> bool:
        """Whether anything is scored."""
        return self.method != "uniform"


class Heads(nn.Module):
    """Two towers, a scale and a bias."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.image, self.text = (
                nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)) for _ in range(2)
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [n, D] of both views."""
        return normalize(self.image(image), dim=1), normalize(self.text(text), dim=1)

    def loss(self, image: Tensor, text: Tensor, loss: Loss) -> Tensor:
        """Of a batch: SigLIP's or CLIP's, as `open_clip`'s losses have them."""
        zimg, ztxt = self(image, text)
        logits = self.log_scale.exp() * zimg @ ztxt.T
        if loss == "softmax":
            own = torch.arange(len(logits))
            return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        logits = logits + self.bias
        total: Tensor = softplus(logits).sum() - logits.diagonal().sum()
        return total / len(logits)

    @torch.inference_mode()
    def embed(self, image: Tensor, text: Tensor) -> Embeddings:
        """As selection reads them from a root: rounded to float16."""
        zimg, ztxt = (z.half().float() for z in self(image, text))
        return Embeddings(zimg, ztxt, float(self.log_scale.exp()), float(self.bias))


def train_uniformly(
    model: Heads,
    pairs: Pairs,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    loss: Loss = "sigmoid",
    decays: bool = True,
) -> None:
    """Train on batches drawn by chance."""
    trainer = Trainer(model, rate=rate, steps=steps, decays=decays)
    for rows, _ in zip(super_batches(torch.arange(len(pairs)), batch, seed), range(steps), strict=False):
        trainer.step(pairs.image[rows], pairs.text[rows], loss)


class Trainer:
    """AdamW with beta2 .95 (arXiv 2406.17711, A.1)."""

    def __init__(self, model: Heads, *, rate: float, steps: int, decays: bool = True) -> None:
        self._model, self._rate, self._steps, self._decays = model, rate, steps, decays
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True
        )
        self._done = 0

    def step(self, image: Tensor, text: Tensor, loss: Loss) -> None:
        """One step on one batch."""
        warm = min(1.0, (self._done + 1) / max(1.0, 0.02 * self._steps))
        decay = (1 + math.cos(math.pi * self._done / self._steps)) / 2 if self._decays else 1.0
        self._optimizer.param_groups[0]["lr"] = self._rate * warm * decay
        self._optimizer.zero_grad()
        torch.autograd.backward(self._model.loss(image, text, loss))
        self._optimizer.step()
        self._done += 1


def super_batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Disjoint ones of an epoch after the other, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "walk"))
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from torch.split(order[: len(order) // size * size], size)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run."""

    r1: float
    """Recall at 1, the mean of both ways, on held-out pairs."""
    wrong: float
    """Share of the rows trained on with which something is wrong."""
    mates: float
    """Other rows of a batch of a row's own concept, the mean over all rows trained on."""
    unique: int
    """Different rows trained on."""
    operations: int
    """In forward passes of one pair, those of the reference apart."""
    decided: tuple[Decided, ...] = ()
    """By `auto`."""


def run(
    arm: Arm, pool: Pairs, held_out: Pairs, *, start: Heads, reference: Heads, reference_pairs: Pairs, seed: int
) -> Outcome:
    """Train a learner as an arm has it.

    Args:
        arm: how.
        pool: what is chosen from.
        held_out: what the learner is judged by.
        start: the learner as it begins; it is trained in place.
        reference: the fixed model, of which `arm.reference` says.
        reference_pairs: what it was trained on.
        seed: of the walk and of all draws.
    """
    if arm.rows == "reference's":
        pool = reference_pairs
    fixed = reference.embed(pool.image, pool.text)
    rows = torch.arange(len(pool))
    if arm.rows == "filtered":
        own = (fixed.zimg * fixed.ztxt).sum(1)
        rows = own.topk(round(arm.kept * len(pool))).indices
    chooser = _Chooser(arm, pool, start, fixed, seed)
    trainer = Trainer(start, rate=arm.rate, steps=arm.steps)
    batches: list[Tensor] = []
    for batch in chooser.batches(rows):
        trainer.step(pool.image[batch], pool.text[batch], arm.loss)
        batches.append(batch)
    chosen = torch.stack(batches)
    return Outcome(
        r1=recall_at_1(start, held_out),
        wrong=float(pool.wrong[chosen].float().mean()),
        mates=_mates(pool.concept[chosen]),
        unique=len(torch.unique(chosen)),
        operations=TRAIN * arm.batch * arm.steps + FORWARD * chooser.looked_at,
        decided=tuple(chooser.decided),
    )


class _Chooser:
    """Chooses batches for a learner that is trained on each before the next is asked for.

    Attributes:
        looked_at: pairs that the learner embedded for it.
        decided: by `auto`, in turn.
    """

    def __init__(self, arm: Arm, pool: Pairs, learner: Heads, reference: Embeddings, seed: int) -> None:
        self._arm, self._pool, self._learner, self._reference, self._seed = arm, pool, learner, reference, seed
        self.looked_at = 0
        self.decided: list[Decided] = []

    def batches(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows [b], batch after batch."""
        arm = self._arm
        supers = super_batches(rows, arm.super_batch, self._seed)
        for number in range(math.ceil(arm.steps / arm.round_steps)):
            first = number * arm.round_steps
            drawn = [
                self._drawn(next(supers), first + i, number, i) for i in range(min(arm.round_steps, arm.steps - first))
            ]
            if arm.shuffled:
                order = torch.Generator().manual_seed(derive_seed(self._seed, "deal", number))
                dealt = torch.cat(drawn)
                drawn = list(torch.split(dealt[torch.randperm(len(dealt), generator=order)], arm.batch))
            yield from drawn

    def _drawn(self, candidates: Tensor, step: int, number: int, i: int) -> Tensor:
        """The batch of a step, out of its super-batch."""
        if not self._arm.selects:
            return candidates
        criterion = self._criterion(step)
        own = None
        if criterion in ("learnability", "hard_learner"):
            own = self._learner.embed(self._pool.image[candidates], self._pool.text[candidates])
            self.looked_at += len(candidates)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "draw", number, i))
        return candidates[draw(self._arm, criterion, own, _of(self._reference, candidates), generator)]

    def _criterion(self, step: int) -> Criterion | Literal["uniform"]:
        """What a step chooses by."""
        arm = self._arm
        if int((step + 1) * arm.uniform_share) > int(step * arm.uniform_share):
            return "uniform"
        if step < arm.easy_steps:
            return "easy_reference"
        if arm.criterion != "auto":
            return arm.criterion
        if step % DECIDED_EVERY == 0:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "sample"))
            rows = torch.randperm(len(self._pool), generator=generator)[:SAMPLE_ROWS]
            own = self._learner.embed(self._pool.image[rows], self._pool.text[rows])
            self.decided.append(measure_standing(own, _of(self._reference, rows)).decided)
            self.looked_at += len(rows)
        return self.decided[-1]


def draw(
    arm: Arm,
    criterion: Criterion | Literal["uniform"],
    learner: Embeddings | None,
    reference: Embeddings,
    generator: torch.Generator,
) -> Tensor:
    """Positions [b] of a super-batch's rows, by either model's embeddings of it."""
    if criterion == "uniform":
        return jointly_sample_batch(
            None, reference, sub_batch_size=arm.batch, method="uniform", generator=generator
        ).positions
    if arm.method == "super_batch":
        scores = -super_batch_losses(reference)
        if learner is not None:
            scores += super_batch_losses(learner)
        return draw_by_scores(scores, arm.batch, arm.gain, generator)
    if arm.terms != "all":
        assert learner is not None
        return draw_jointly(
            learner,
            reference,
            size=arm.batch,
            n_chunks=arm.n_chunks,
            gain=arm.gain,
            terms=arm.terms,
            generator=generator,
        )
    return jointly_sample_batch(
        learner,
        reference,
        sub_batch_size=arm.batch,
        n_chunks=arm.n_chunks,
        loss=arm.loss,
        criterion=criterion,
        method=arm.method,
        gain=arm.gain,
        generator=generator,
    ).positions


@torch.inference_mode()
def recall_at_1(model: Heads, pairs: Pairs) -> float:
    """Share of pairs whose nearest caption, and picture, is of the same label; the mean of both ways."""
    zimg, ztxt = model(pairs.image, pairs.text)
    found = 0.0
    for queries, others in ((zimg, ztxt), (ztxt, zimg)):
        for start in range(0, len(queries), 1024):
            nearest = (queries[start : start + 1024] @ others.T).argmax(1)
            found += float((pairs.label[nearest] == pairs.label[start : start + 1024]).sum())
    return found / 2 / len(pairs)


def _of(model: Embeddings, rows: Tensor) -> Embeddings:
    return Embeddings(model.zimg[rows], model.ztxt[rows], model.logit_scale, model.logit_bias)


def _mates(concepts: Tensor) -> float:
    """Concepts [steps, b] → other rows of the same concept in the batch."""
    alike = sum(int(torch.bincount(row).square().sum()) for row in concepts)
    return alike / concepts.numel() - 1
