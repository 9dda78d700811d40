"""The loop of curation and training in one process: the product's windows, selection and training step, on arrays.

What `curate round` and `curate train` do through files is done here in memory, so that a run takes minutes:
`tests/test_acceleration.py` holds that the batches are the same.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from benchmarks.acceleration.sets import Pairs
from benchmarks.acceleration.variants import draw_by_scores, super_batch_losses
from curate.errors import UserError
from curate.jobs.approximate import approximate_of, downscaled
from curate.jobs.optimize import Trainee, learning_rate, make_optimizer, take_step
from curate.jobs.ranks import Ranks
from curate.models.encoder import Encoder
from curate.models.spec import EncoderSpec
from curate.pipelines.wanted import SAMPLE_ROWS
from curate.reader.evaluate import count_rivals, recall
from curate.recipe import SelectionSection, TrainSection
from curate.recipe_types import Section
from curate.seeds import derive_seed
from curate.select.draw import (
    Candidates,
    Scale,
    Vectors,
    embeddings_of,
    measure_standing,
    needs_learner,
    select_sub_batch,
)
from curate.select.standing import as_decided
from curate.select.windows import EpochRange, Rows, key_order, keyed_rows, next_range

EMBED_BATCH = 256
CARRIED = ("walk", "account", "step", "selection", "own", "scale")
"""What a loop that is halted knows beside its weights and moments."""


class ArmSection(Section):
    """One way of choosing batches."""

    selection: SelectionSection
    round_steps: int = Field(10, ge=1, description="steps between two learners that selection scores with")
    pool: Literal["all", "wanted", "deduplicated", "filtered", "reference"] = Field(
        "all",
        description="rows that are walked through; filtered: those it likes most, reference: the reference's own pairs",
    )
    kept: float = Field(0.1, gt=0, le=1, description="share of the pool that a filter keeps")
    reference: Literal["clean", "weak"] = Field("clean", description="trained on clean pairs, or on the pool itself")
    super_batch_loss: bool = Field(
        False, description="the other independent selection: each pair by its part of the super-batch's loss"
    )
    shuffled: bool = Field(False, description="the rows of a round are dealt anew to its batches")
    uniform_share: float = Field(0.0, ge=0, lt=1, description="share of batches that are drawn uniformly")
    scoring_resolution: int | None = Field(None, ge=1, description="as learner.scoring_resolution of a recipe")
    approximate_share: float = Field(0.0, ge=0, lt=1, description="as train.approximate_share of a recipe")

    @field_validator("approximate_share")
    @classmethod
    def _smaller_pictures_have_a_size(cls, share: float, info: ValidationInfo) -> float:
        if share and info.data.get("scoring_resolution") is None:
            raise PydanticCustomError("approximate_share", "needs scoring_resolution; add it")
        return share


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The fixed model's embeddings of a pool."""

    vectors: tuple[Vectors, Vectors]
    scale: Scale


@dataclass(kw_only=True)
class Account:
    """What a run has cost so far."""

    trained: int = 0
    trained_smaller: int = 0
    """Those of them that were seen at the lower resolution."""
    learner_scored: int = 0
    candidates: int = 0
    """Rows of all super-batches."""
    train_s: float = 0.0
    score_s: float = 0.0
    select_s: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    decided: Counter[str] = field(default_factory=Counter)
    """Rounds, by what `auto` chose by."""


@dataclass(kw_only=True)
class Walk:
    """Where a loop is in its pool."""

    aged: int
    """Steps since the learner was scored."""
    previous: EpochRange | None = None
    number: int = 0
    """Of the next round."""
    count: int = 0
    """Super-batches so far."""
    pending: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Batches that are chosen and were not asked for."""


class Loop:
    """One learner on one pool."""

    def __init__(
        self,
        pairs: Pairs,
        learner: Any,
        tokenizer: Any,
        spec: EncoderSpec,
        reference: Reference,
        arm: ArmSection,
        training: TrainSection,
        *,
        rows: npt.NDArray[np.int64],
        seed: int,
        device: torch.device,
    ) -> None:
        self.pairs, self.model, self.tokenizer, self.spec = pairs, learner, tokenizer, spec
        self.reference, self.arm, self.training, self.seed, self.device = reference, arm, training, seed, device
        self.account = Account()
        self.step = 0
        self.walk = Walk(aged=arm.round_steps)
        self.selection = arm.selection
        self._keyed: Rows | None = None
        # Of equal pairs the first.
        _, first = np.unique(np.asarray(pairs.content[rows]), axis=0, return_index=True)
        self.rows = np.sort(rows[first])
        self.own: tuple[Vectors, Vectors] | None = None
        self.scale = Scale(logit_scale=spec.logit_scale, logit_bias=spec.logit_bias)
        self.trainee = Trainee(
            model=learner,
            parallel=learner,
            optimizer=make_optimizer(learner, training),
            loss=arm.selection.loss,
            ranks=Ranks(rank=0, world_size=1, device=device),
            normalize=Encoder(spec, copy.deepcopy(learner), tokenizer, device).normalize,
            micro_batch=training.micro_batch,
            grad_clip=training.grad_clip,
            approximate=approximate_of(learner, arm.scoring_resolution, arm.approximate_share, seed=seed),
        )

    def batches(self) -> Iterator[npt.NDArray[np.int64]]:
        """Rows [b] of the pool, batch after batch; ask for the next one once the learner was trained on the last."""
        while True:
            if not self.walk.pending:
                self.walk.pending = self._round()
            yield self.walk.pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches and steps depend on, and what the run has cost so far."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.trainee.optimizer.state_dict(),
            **{name: getattr(self, name) for name in CARRIED},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loop, made alike, was halted."""
        self.model.load_state_dict(state["model"])
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        for name in CARRIED:
            setattr(self, name, state[name])

    def _round(self) -> list[npt.NDArray[np.int64]]:
        """The batches up to the next scoring, or to the end of an epoch."""
        walk, B = self.walk, self.arm.selection.super_batch_size
        held = len(self.rows) // B
        if not held:
            raise UserError(f"a super-batch of {B:,} pairs wants a larger pool than {len(self.rows):,} rows")
        if walk.aged >= self.arm.round_steps:
            walk.aged = 0
        wanted = min(self.arm.round_steps - walk.aged, held)
        found = next_range(walk.previous, held=held, super_batches=wanted)
        assert found is not None, "no more is wanted than an epoch holds"
        if self._keyed is None or walk.previous is None or found.epoch != walk.previous.epoch:
            content = np.asarray(self.pairs.content[self.rows])
            keyed = keyed_rows(content, 0, self.rows, seed=self.seed, epoch=found.epoch)
            self._keyed = keyed[key_order(keyed)]
        walk.previous = found
        supers = [self._keyed[i * B : (i + 1) * B] for i in range(found.start, found.stop)]
        if walk.aged == 0:
            # A round longer than an epoch comes back to the same rows, so that all of them are scored at once.
            whole = self.arm.round_steps > held
            self._begin_round(np.sort(self.rows if whole else np.concatenate([rows["row"] for rows in supers])))
        walk.aged += wanted
        drawn = []
        for i, rows in enumerate(supers):
            is_uniform = int((walk.count + 1) * self.arm.uniform_share) > int(walk.count * self.arm.uniform_share)
            how = self.selection.model_copy(update={"method": "uniform"}) if is_uniform else self.selection
            drawn.append(self._draw(rows, how, walk.number, i))
            walk.count += 1
        if self.arm.shuffled:
            rng = np.random.default_rng(derive_seed(self.seed, "deal", walk.number))
            drawn = list(rng.permutation(np.concatenate(drawn)).reshape(len(drawn), -1))
        walk.number += 1
        return drawn

    def _begin_round(self, rows: npt.NDArray[np.int64]) -> None:
        """Decide what to choose by, where that is left to the learner's standing; score candidates if it is asked."""
        if self.arm.selection.is_open:
            rng = np.random.default_rng(derive_seed(self.seed, "sample"))
            sample = np.sort(rng.permutation(self.rows)[:SAMPLE_ROWS])
            self._score(sample)
            assert self.own is not None
            own, fixed = (
                embeddings_of((vectors[0][sample], vectors[1][sample]), scale, self.device)
                for vectors, scale in ((self.own, self.scale), (self.reference.vectors, self.reference.scale))
            )
            decided = measure_standing(own, fixed).decided
            self.account.decided[decided] += 1
            self.selection = self.arm.selection.model_copy(update=as_decided(decided))
        if needs_learner(self.selection):
            self._score(rows)

    def train(self, rows: npt.NDArray[np.int64]) -> float:
        """One step on a batch; returns its loss."""
        begun = time.perf_counter()
        self.step += 1
        torch.manual_seed(derive_seed(self.seed, "step", self.step, 0))
        loss, norm = take_step(
            self.trainee,
            self._pixels(self.pairs, rows),
            self._texts(self.pairs, rows),
            rate=learning_rate(self.step, self.training),
            number=self.step - 1,
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(f"step {self.step}: the loss is {loss}, its gradient's norm {norm}; lower learning_rate")
        account = self.account
        account.trained += len(rows)
        if self.trainee.approximate is not None:
            account.trained_smaller += int(self.trainee.approximate.rows(len(rows), self.step - 1).sum())
        account.kinds.update(self.pairs.kind[rows].tolist())
        account.seen.update(rows.tolist())
        account.train_s += time.perf_counter() - begun
        return loss

    @torch.inference_mode()
    def retrieve(self, held_out: Pairs) -> dict[str, float]:
        """Recall at 1, the mean of both ways, ties lost; rows with equal captions belong to each other's pictures."""
        self.model.eval()
        z: list[list[Tensor]] = [[], []]
        for start in range(0, len(held_out), EMBED_BATCH):
            at = np.arange(start, min(start + EMBED_BATCH, len(held_out)))
            z[0].append(
                self.model.encode_image(self.trainee.normalize(self._pixels(held_out, at)), normalize=True).float()
            )
            z[1].append(self.model.encode_text(self._texts(held_out, at), normalize=True).float())
        zimg, ztxt = torch.cat(z[0]), torch.cat(z[1])
        own = held_out.same_captions.to(self.device)
        ways = count_rivals(zimg, ztxt, own), count_rivals(ztxt, zimg, own.flip(1))
        return {"r1": sum(recall(way, 1) for way in ways) / 2}

    def _score(self, rows: npt.NDArray[np.int64]) -> None:
        begun = time.perf_counter()
        spec = replace(self.spec, image_size=self.arm.scoring_resolution)
        encoder = Encoder(spec, copy.deepcopy(self.model), self.tokenizer, self.device)
        N, D = len(self.pairs), self.spec.embed_dim
        if self.own is None:
            self.own = np.full((N, D), np.nan, np.float16), np.full((N, D), np.nan, np.float16)
        for tower, found in zip(self.own, embed(encoder, self.pairs, rows), strict=True):
            tower[rows] = found
        scale, bias = self.model.logit_scale.detach().exp(), self.model.logit_bias.detach()
        self.scale = Scale(logit_scale=float(scale), logit_bias=float(bias))
        self.account.learner_scored += len(rows)
        self.account.score_s += time.perf_counter() - begun

    def _draw(
        self, walked: npt.NDArray[np.void], selection: SelectionSection, number: int, i: int
    ) -> npt.NDArray[np.int64]:
        begun = time.perf_counter()
        rows = walked["row"]
        # Where the learner was not asked for the round, all that it embedded is a sample.
        looked = self.own if needs_learner(self.selection) else None
        own = (looked[0][rows], looked[1][rows]) if looked is not None else None
        vectors = self.reference.vectors
        candidates = Candidates(rows=walked, learner=own, reference=(vectors[0][rows], vectors[1][rows]))
        if self.arm.super_batch_loss and selection.method != "uniform":
            chosen = rows[self._independent(candidates, selection, number, i)]
        else:
            table, _ = select_sub_batch(
                candidates,
                selection,
                learner=self.scale,
                reference=self.reference.scale,
                seed=self.seed,
                round_number=number,
                sub_batch=i,
                device=self.device,
            )
            chosen = np.asarray(table["row"].to_numpy())
        self.account.candidates += len(rows)
        self.account.select_s += time.perf_counter() - begun
        return chosen

    def _independent(
        self, candidates: Candidates, selection: SelectionSection, number: int, i: int
    ) -> npt.NDArray[np.int64]:
        """Positions drawn by losses within the super-batch."""
        scores = -super_batch_losses(embeddings_of(candidates.reference, self.reference.scale, self.device)).cpu()
        if candidates.learner is not None:
            scores += super_batch_losses(embeddings_of(candidates.learner, self.scale, self.device)).cpu()
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "draw", number, i))
        return draw_by_scores(scores, selection.sub_batch_size, selection.gain, generator).numpy()

    def _pixels(self, pairs: Pairs, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(pairs.pixels[rows])).to(self.device)

    def _texts(self, pairs: Pairs, rows: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.asarray(pairs.texts[rows])).to(self.device).long()


def embed(encoder: Encoder, pairs: Pairs, rows: npt.NDArray[np.int64]) -> tuple[Vectors, Vectors]:
    """Unit rows of both towers, float16 [len(rows), D], as an embedding file holds them.

    An encoder of smaller pictures sees those of the set downscaled; a round crops the files anew.
    """
    z = np.zeros((2, len(rows), encoder.spec.embed_dim), np.float16)
    for start in range(0, len(rows), EMBED_BATCH):
        at = rows[start : start + EMBED_BATCH]
        pixels, texts = torch.from_numpy(np.asarray(pairs.pixels[at])), torch.from_numpy(np.asarray(pairs.texts[at]))
        if pixels.shape[1:3] != encoder.image_size:
            pixels = downscaled(pixels, encoder.image_size[0])
        for tower, found in zip(z, encoder.encode(pixels, texts.long()), strict=True):
            tower[start : start + len(at)] = found.cpu().numpy()
    return z[0], z[1]
