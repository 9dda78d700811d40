"""The trainer: an open_clip model, open_clip's loss, committed rounds or uniform batches, published learners.

    curate train RECIPE
    torchrun --nproc-per-node 8 -m curate.jobs.cli train RECIPE

It meets the curation in files alone: it reads committed rounds and publishes learners, and either can be killed and
started again at any time. Its own state is a checkpoint in the root; from it a run goes on exactly, on any number of
ranks that divides the batch.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curate.errors import CommitConflictError, UserError
from curate.jobs.approximate import approximate_of
from curate.jobs.checkpoint import FOLDER, Progress, check_kind, checkpoints, load_checkpoint, restore, save_checkpoint
from curate.jobs.optimize import Trainee, learning_rate, make_optimizer, take_step
from curate.jobs.ranks import Ranks, join_ranks
from curate.jobs.sharding import compile_model, encoding, is_sharded, shard_weights, whole_model
from curate.jobs.stretch import Stretch, committed_stretch, starved_stretch
from curate.jobs.train_log import TrainingLog, log_folder
from curate.models.create import create_model
from curate.models.encoder import (
    is_two_towers,
    load_model,
    normalize_pixels,
    split_transform,
    store_encoder,
    store_model,
)
from curate.models.learners import (
    LearnerCheckpoint,
    newest_learner,
    read_learner,
    record_learner,
)
from curate.models.publish import first_learner
from curate.pipelines.progress import bar
from curate.pool.inventory import take_inventory
from curate.reader.curated import Batch, CuratedReader
from curate.reader.evaluate import HeldOut, evaluate, load_held_out
from curate.reader.pieces import one_ahead
from curate.reader.uniform import UniformBatch, uniform_batches
from curate.recipe import DeviceType, Recipe
from curate.rounds.plan import indices_of, known_inventory
from curate.seeds import derive_seed
from curate.storage import Store

VISIBLE_S = 300.0
"""What one rank has seen of a shared file system every other sees within this time."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one run of the trainer did."""

    learner: LearnerCheckpoint
    """The newest one that it published, now or before."""
    steps: int
    """Taken in this run."""
    losses: list[float]
    """Of each step; not comparable between ways of choosing batches."""
    finished: bool
    """Whether all `train.steps` are taken."""
    first: bool
    """Whether this is the first rank, the one that speaks."""


def train(recipe: Recipe, *, base: Path, say: Callable[[str], None] = lambda line: None) -> Trained:
    """Train the learner and publish it, going on from the newest checkpoint.

    With `train.data = "rounds"` the learner is trained on every committed sub-batch and then, as `train.follow` says,
    on those to come. With `"pool"` the recipe's own model is trained on uniform batches.

    Args:
        recipe: the whole recipe.
        base: the recipe's folder.
        say: told, on the first rank, of learners and evaluations.

    Raises:
        UserError: nothing to train on, a loss that the model cannot have or that is not finite any more.
        StreamStalledError: neither a round nor the end of the stream came within `train.max_wait_s`.
        CommitConflictError: another trainer publishes learners in this root.
    """
    with join_ranks() as ranks, contextlib.ExitStack() as stack:
        return _Training(recipe, base, ranks, stack, say).run()


class _Training:
    """One run of the trainer on one rank."""

    def __init__(
        self, recipe: Recipe, base: Path, ranks: Ranks, stack: contextlib.ExitStack, say: Callable[[str], None]
    ) -> None:
        self.say = say
        self.recipe = recipe
        self.settings = recipe.train
        self.ranks = ranks
        self.store = Store(recipe.root)
        self.progress: Progress
        checkpoint = next(iter(ranks.agree(lambda: checkpoints(self.store)[-1:])), None)
        tensors: dict[str, Tensor] = {}
        if checkpoint is None:
            self.progress = ranks.agree(lambda: _begin(self.store, recipe, base, ranks.device_type))
        else:
            self.progress, tensors = load_checkpoint(self.store, checkpoint)
            check_kind(self.progress, recipe, checkpoint)
        learner, start = recipe.learner, self.progress.start
        if ranks.first and (learner.source != start.source or learner.precision not in ("auto", start.precision)):
            say(
                f"learner = {learner.source}, {learner.precision}: not looked at, training goes on with "
                f"{start.source}, {start.precision}"
            )
        # What is to be sharded goes to the device block by block: there may be no room for all of it.
        device = torch.device("cpu") if self.settings.fully_shard else ranks.device
        self.model, self.config, self.tokenizer = load_model(self.store, self.progress.start, device)
        self.crop, shift = split_transform(self.model, exact=recipe.embed.exact_pixels)
        self.normalize = partial(normalize_pixels, shift=shift)
        check_trainable(self.model, recipe)
        loss, bias = recipe.selection.loss, getattr(self.model, "logit_bias", None)
        if loss == "softmax" and bias is not None:
            bias.requires_grad_(False)  # shifts every logit alike, so that this loss has no gradient for it
        if self.settings.fully_shard:
            shard_weights(self.model, ranks)
        self.optimizer = make_optimizer(self.model, self.settings)
        if checkpoint is not None:
            restore(tensors, self.model, self.optimizer)
        self.trainee = self._trainee()
        self.first_step = self.progress.step
        self.losses: list[float] = []
        self.held_out: HeldOut | None = None
        self.log: TrainingLog | None = None
        section = recipe.evaluate
        if section is not None and (ranks.first or is_sharded(self.model)):
            self.held_out = load_held_out(
                section.path,
                image=section.image,
                caption=section.caption,
                label=section.label,
                threads=max(1, self.settings.workers),
            )
        if ranks.first:
            # At step 0 without a checkpoint, even the evaluation before the first step is to be done again.
            step = self.progress.step if checkpoint is not None or self.progress.step else -1
            self.log = stack.enter_context(TrainingLog(log_folder(self.store, self.settings.logs), step=step))
        steps = self.settings.steps
        self.bar = stack.enter_context(bar("train", steps, unit="step", done=self.progress.step, shown=ranks.first))
        self.clock, self.waited_s = time.monotonic(), 0.0
        if self.progress.step == 0 and checkpoint is None:
            self._evaluate()

    def run(self) -> Trained:
        """Train until there is nothing more to train on, or all steps are taken."""
        self._publish_due()
        source: Generator[Batch | UniformBatch] = self._pool() if self.settings.data == "pool" else self._rounds()
        with contextlib.closing(source):
            while (batch := self._waited_for(source)) is not None:
                self._step(batch)
        self._publish()
        learner = self.ranks.agree(lambda: read_learner(self.store, self.progress.learner))
        steps = self.progress.step - self.first_step
        return Trained(
            learner=learner,
            steps=steps,
            losses=self.losses,
            finished=self.progress.step == self.settings.steps,
            first=self.ranks.first,
        )

    def _waited_for(self, source: Iterator[Batch | UniformBatch]) -> Batch | UniformBatch | None:
        """The next batch, and none at the end."""
        asked = time.monotonic()
        batch = next(source, None)
        self.waited_s += time.monotonic() - asked
        return batch

    def _trainee(self) -> Trainee:
        """The model, ready for its first step."""
        settings, ranks = self.settings, self.ranks
        if settings.grad_checkpointing:
            self.model.set_grad_checkpointing()
        if settings.compile:
            compile_model(self.model)
        return Trainee(
            model=self.model,
            parallel=ranks.wrap(self.model),
            optimizer=self.optimizer,
            loss=self.recipe.selection.loss,
            ranks=ranks,
            normalize=self.normalize,
            micro_batch=settings.micro_batch,
            grad_clip=settings.grad_clip,
            compiled=settings.compile,
            approximate=approximate_of(
                self.model, self.recipe.learner.scoring_resolution, settings.approximate_share, seed=self.recipe.seed
            ),
        )

    # --- which batches ---------------------------------------------------------------------------------------------

    def _pool(self) -> Generator[UniformBatch]:
        """The rest of the uniform batches. Those that were taken are read again: where one begins depends on them."""
        assert self.settings.steps is not None  # the recipe's own law
        first, left = self.progress.next_batch, self.settings.steps - self.progress.step
        if left <= 0:
            return

        def batches(check: Callable[[], None] = lambda: None) -> Generator[UniformBatch]:
            return uniform_batches(
                take_inventory(self.recipe.pool, known=known_inventory(self.store), indices=indices_of(self.store)),
                self.recipe.selection.sub_batch_size,
                seed=self.recipe.seed,
                preprocess=self.crop,
                tokenize=self.tokenizer,
                threads=max(1, self.settings.workers),
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                pin_memory=self.ranks.device_type == "cuda",
                check=check,
            )

        with contextlib.closing(one_ahead(batches) if self.settings.workers else batches()) as made:
            yield from islice(made, first, first + left)

    def _rounds(self) -> Generator[Batch]:
        """Committed batches, round after round, as the first rank finds them."""
        reader = CuratedReader(
            self.recipe.root,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            preprocess=self.crop,
            tokenize=self.tokenizer,
            workers=self.settings.workers,
            follow=True,
            timeout_s=VISIBLE_S,
            pin_memory=self.ranks.device_type == "cuda",
        )
        batches: Iterator[Batch] | None = None
        with contextlib.ExitStack() as stack:
            while (stretch := self._next_stretch()) is not None:
                # One iteration goes through many rounds, so that the reader's workers live on; a repeat goes back.
                if batches is None or reader.state_dict()["next_batch"] != stretch.start:
                    stack.close()
                    reader.load_state_dict({"next_batch": stretch.start})
                    batches = stack.enter_context(contextlib.closing(iter(reader)))
                self.progress = replace(self.progress, next_batch=stretch.start, repeats=stretch.repeats)
                yield from islice(batches, stretch.stop - stretch.start)

    def _next_stretch(self) -> Stretch | None:
        """Where training goes on, the same on every rank; None at the end."""
        store, settings, now = self.store, self.settings, self.progress
        if settings.steps is not None and now.step >= settings.steps:
            return None
        found = self.ranks.agree(lambda: committed_stretch(store, next_batch=now.next_batch, repeats=now.repeats))
        between_rounds = found is None or found.start == found.first
        # Here and not where a round ends, or one that was killed in between would forget it. And before waiting in any
        # case, because the next round may wait for this learner.
        if found is None or (between_rounds and settings.publish_every is None):
            self._publish()
        if found is None:
            self.bar.update(0, waits="for a round")
            where = {"next_batch": now.next_batch, "repeats": now.repeats}
            found = self.ranks.agree(lambda: starved_stretch(store, settings, **where))
        if found is None or settings.steps is None:
            return found
        return replace(found, stop=min(found.stop, found.start + settings.steps - now.step))

    # --- one step --------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch | UniformBatch) -> None:
        settings = self.settings
        step = self.progress.step + 1
        assert isinstance(batch.images, Tensor), "the reader was given a transform"
        assert isinstance(batch.texts, Tensor), "the reader was given a tokenizer"
        # What a step draws (dropout, say) depends on nothing before it, so that a resumed one draws the same.
        torch.manual_seed(derive_seed(self.recipe.seed, "step", step, self.ranks.rank))
        rate = learning_rate(step, settings)
        loss, norm = take_step(self.trainee, batch.images, batch.texts, rate=rate, number=batch.number)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step}: the loss is {loss} and its gradient's norm {norm}; the newest learner stays "
                f"{self.progress.learner}: lower train.learning_rate = {settings.learning_rate} or train.grad_clip = "
                f"{settings.grad_clip}"
            )

        self.losses.append(loss)
        self.progress = replace(self.progress, step=step, next_batch=batch.number + 1)
        if isinstance(batch, Batch) and not self.progress.repeats:  # how learnable a batch is when it is new
            self.progress.batch_losses[batch.number] = loss
        self.bar.update(1, loss=round(loss, 3))
        if step % settings.log_every == 0:
            self._log(batch, loss=loss, learning_rate=rate, grad_norm=norm)
        if self.recipe.evaluate is not None and step % self.recipe.evaluate.every == 0:
            self._evaluate()
        if settings.publish_every is not None and step % settings.publish_every == 0:
            self._publish()
        elif step % settings.checkpoint_every == 0:
            self._save()

    def _log(self, batch: Batch | UniformBatch, **values: float) -> None:
        place: dict[str, Any] = {"batch": batch.number}
        if isinstance(batch, Batch):
            uids = self.ranks.gather(batch.uids)
            digest = hashlib.sha256("\n".join(uid for part in uids for uid in part).encode()).hexdigest()
            place |= {"round": batch.round, "sub_batch": batch.sub_batch, "uids_sha256": digest}
        if self.log is None:
            return
        now = time.monotonic()
        steps = min(self.settings.log_every, len(self.losses))
        rows = steps * len(batch.texts) * self.ranks.world_size
        bias = getattr(self.model, "logit_bias", None)
        self.log.write(
            self.progress.step,
            **place,
            **values,
            logit_scale=self.model.logit_scale.exp().item(),
            **({} if bias is None else {"logit_bias": bias.item()}),
            rows_per_s=round(rows / max(1e-9, now - self.clock), 1),
            data_s=round(self.waited_s / steps, 4),
        )
        self.clock, self.waited_s = now, 0.0

    def _evaluate(self) -> None:
        section = self.recipe.evaluate
        if self.held_out is None or section is None:
            return
        with encoding(self.model):
            found = evaluate(
                self.model,
                self.tokenizer,
                self.crop,
                self.held_out,
                device=self.ranks.device,
                batch_size=section.batch_size,
                templates=section.templates,
                threads=max(1, self.settings.workers),
                normalize_images=self.normalize,
            )
        if self.log is None:
            return
        self.log.write(self.progress.step, **found)
        self.say(f"step {self.progress.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

    # --- what is left behind ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        save_checkpoint(self.store, self.progress, self.model, self.optimizer, first=self.ranks.first)

    def _publish(self) -> None:
        """Publish the model as the next learner, unless the newest learner is this very model."""
        step = self.progress.step
        if self.progress.learner_step == step:
            return
        self.progress = replace(self.progress, learner=self.progress.learner + 1, learner_step=step, due=True)
        self._save()
        self._publish_due()

    def _publish_due(self) -> None:
        """Publish what the checkpoint says is due. Killed before it is done, the next run does it from there."""
        if not self.progress.due:
            return
        store, start, progress = self.store, self.progress.start, self.progress
        model = whole_model(self.model, lambda: load_model(store, start, torch.device("cpu"))[0], self.ranks)
        if self.ranks.first:
            encoder = store_model(
                store, model, self.config, self.tokenizer, source=start.source, precision=start.precision
            )
            try:
                record_learner(
                    store,
                    encoder,
                    step=progress.step,
                    next_batch=progress.next_batch if progress.data == "rounds" else 0,
                    number=progress.learner,
                    batch_losses=progress.batch_losses,
                )
            except CommitConflictError as error:
                raise CommitConflictError(
                    f"{error}: learners descend from each other, and another trainer is at work in this root; stop "
                    f"one of the two, or delete {FOLDER}/checkpoint-* in the root to go on from the newest learner"
                ) from error
            self.say(f"learner {self.progress.learner} published at step {self.progress.step}")
        self.progress = replace(self.progress, due=False, batch_losses={})


def check_trainable(model: torch.nn.Module, recipe: Recipe) -> None:
    """Check that a learner is one that we train.

    Raises:
        UserError: it is not an image and a text tower alone, or has no bias where the loss has one.
    """
    where = f"learner.model = {recipe.learner.model!r}"
    # What their forward pass returns is what `take_step` takes; CoCa's is a dictionary with captions to be learned.
    if not is_two_towers(model):
        raise UserError(
            f"{where}: expected an image and a text tower, as CLIP and SigLIP have, found {type(model).__name__}, "
            "whose forward pass returns other things; it can be a reference, but choose another learner"
        )
    if recipe.selection.loss == "sigmoid" and model.logit_bias is None:
        raise UserError(
            f"{where}: the sigmoid loss has a bias and this model none; add "
            '"init_logit_bias": -10 to its configuration, or set selection.loss = "softmax"'
        )


def _begin(store: Store, recipe: Recipe, base: Path, device_type: DeviceType) -> Progress:
    """Where training stands without a checkpoint: at the newest learner, or at the recipe's own model."""
    newest = newest_learner(store)
    if newest is None:  # before it is published: the root would not take another one
        check_trainable(create_model(recipe.learner, role="learner", base=base, seed=recipe.seed)[0], recipe)
    if recipe.train.data == "rounds":
        start = first_learner(store, recipe.learner, base=base, seed=recipe.seed, device_type=device_type)
        encoder, step, next_batch, number = start.encoder, start.step, start.next_batch, start.number
    else:
        encoder = store_encoder(
            store, recipe.learner, role="learner", base=base, seed=recipe.seed, device_type=device_type
        )
        step, next_batch, number = 0, 0, newest.number if newest else -1
    return Progress(
        data=recipe.train.data,
        start=encoder,
        step=step,
        next_batch=next_batch,
        learner=number,
        learner_step=step,
        batch_losses={},
    )
