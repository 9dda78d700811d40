"""The trainer: an open_clip model, open_clip's loss, committed rounds or uniform batches, a published learner.

curate train RECIPE
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm

from curate.criteria import Loss
from curate.encoder import eval_transform, load_model, store_encoder, store_model
from curate.errors import UserError
from curate.learner import LearnerCheckpoint, first_learner, record_learner
from curate.manifest import last_round, read_manifest
from curate.pool import take_inventory
from curate.reader import Batch, CuratedReader
from curate.recipe import Recipe, TrainSection
from curate.storage import Store
from curate.uniform import UniformBatch, uniform_batches

LARGEST_LOG_SCALE = math.log(100)
"""Where CLIP stops its temperature (arXiv 2103.00020, 2.5)."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one run of the trainer did."""

    learner: LearnerCheckpoint
    steps: int
    losses: list[float]
    """Of each step; not comparable between ways of choosing batches."""


def train(recipe: Recipe, *, base: Path) -> Trained:
    """Train the learner and publish it.

    With `train.data = "rounds"` the newest learner goes on where its reader stopped, through every committed
    sub-batch. With `"pool"` the recipe's own model is trained from its start on uniform batches.

    Args:
        recipe: the whole recipe.
        base: the recipe's folder.

    Raises:
        UserError: nothing to train on, or a loss that the model cannot have.
    """
    store = Store(recipe.root)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of_rounds = recipe.train.data == "rounds"
    if of_rounds:
        start = first_learner(store, recipe.learner, base=base, seed=recipe.seed)
    else:
        encoder = store_encoder(store, recipe.learner, role="learner", base=base, seed=recipe.seed)
        start = LearnerCheckpoint(number=0, encoder=encoder, step=0, next_batch=0)
    model, config, tokenizer = load_model(store, start.encoder, device)
    if recipe.selection.loss == "sigmoid" and getattr(model, "logit_bias", None) is None:
        raise UserError(
            f"learner.model = {recipe.learner.model!r}: the sigmoid loss has a bias and this model none; add "
            '"init_logit_bias": -10 to its configuration, or set selection.loss = "softmax"'
        )

    preprocess = eval_transform(model)
    if of_rounds:
        reader = CuratedReader(recipe.root, preprocess=preprocess, tokenize=tokenizer, workers=recipe.train.workers)
        reader.load_state_dict({"next_batch": start.next_batch})
        available = _committed_batches(store) - start.next_batch
        steps = min(available, recipe.train.steps or available)
        if steps < 1:
            raise UserError(
                f"{recipe.root}: learner {start.number} was trained on all committed rounds; run another round first"
            )
        batches: Iterator[Batch | UniformBatch] = iter(reader)
    else:
        assert recipe.train.steps is not None  # the recipe's own law
        steps = recipe.train.steps
        batches = uniform_batches(
            take_inventory(recipe.pool),
            recipe.selection.sub_batch_size,
            seed=recipe.seed,
            preprocess=preprocess,
            tokenize=tokenizer,
            threads=max(1, recipe.train.workers),
        )
    losses = fit(model, islice(batches, steps), steps=steps, loss=recipe.selection.loss, settings=recipe.train)
    encoder = store_model(
        store, model, config, tokenizer, source=start.encoder.source, precision=start.encoder.precision
    )
    learner = record_learner(
        store,
        encoder,
        step=start.step + steps,
        next_batch=start.next_batch + steps if of_rounds else 0,
        # Learners of rounds descend from each other: of two trainers that started from one, the second is told.
        number=start.number + 1 if of_rounds else None,
    )
    return Trained(learner=learner, steps=steps, losses=losses)


def fit(
    model: Any, batches: Iterable[Batch | UniformBatch], *, steps: int, loss: Loss, settings: TrainSection
) -> list[float]:
    """Take one optimiser step per batch, learning rate warmed up linearly and let down along a cosine.

    Args:
        model: of open_clip, on its device; trained in place.
        batches: at most `steps` of them.
        steps: length of the schedule.
        loss: as the batches were chosen for.
        settings: of the optimiser.

    Returns:
        The loss at each step, mean per example.

    Raises:
        UserError: the loss is not finite any more.
    """
    # Gains, biases and the logit scale are not decayed, as in open_clip's own trainer.
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
    )
    warmup = max(1, round(settings.warmup_share * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    criterion = open_clip.loss.SigLipLoss() if loss == "sigmoid" else open_clip.loss.ClipLoss()
    model.train()
    device = model.logit_scale.device
    losses: list[float] = []
    with tqdm(batches, total=steps, desc="train", unit="step", disable=None) as bar:
        for batch in bar:
            assert isinstance(batch.images, Tensor), "the reader was given a transform"
            assert isinstance(batch.texts, Tensor), "the reader was given a tokenizer"
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                zimg = model.encode_image(batch.images.to(device), normalize=True)
                ztxt = model.encode_text(batch.texts.to(device), normalize=True)
            scale = model.logit_scale.exp()
            if loss == "sigmoid":
                value = criterion(zimg.float(), ztxt.float(), scale, model.logit_bias)
            else:
                value = criterion(zimg.float(), ztxt.float(), scale)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"step {len(losses)} of {steps}: the loss is {losses[-1]}; nothing was published: lower "
                    f"train.learning_rate = {settings.learning_rate} or train.grad_clip = {settings.grad_clip}"
                )
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, LARGEST_LOG_SCALE)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def _committed_batches(store: Store) -> int:
    manifests = (read_manifest(store, number) for number in range(last_round(store) + 1))
    return sum(found[0].sub_batches for found in manifests if found)
