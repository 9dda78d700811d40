"""The arithmetic of a training step: the loss over all pairs of all ranks, micro-batches, AdamW, the rate of each step.

A rank's share of a batch that is larger than a micro-batch is embedded twice: first without a gradient, whereupon the
loss over all b pairs gives the gradient by each embedding; then, a micro-batch at a time, with one, to carry it on to
the weights (GradCache, arXiv 2101.06983). Loss and gradient are those of the whole batch, memory that of a micro-batch.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from curate.criteria import Loss
from curate.errors import UserError
from curate.jobs.approximate import Approximate
from curate.jobs.contrastive import contrastive_loss
from curate.jobs.ranks import Ranks
from curate.jobs.sharding import by_layout, clip_gradient
from curate.models.resolution import Pictures
from curate.recipe import TrainSection

LARGEST_LOG_SCALE = math.log(100)
"""Where CLIP stops its temperature (arXiv 2103.00020, 2.5)."""


def learning_rate(step: int, settings: TrainSection) -> float:
    """The rate of a step, counted from 1: linear warm-up, then a cosine down to zero, if there is an end."""
    done = step - 1
    if done < settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.steps is None:
        return settings.learning_rate
    share = (done - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def make_optimizer(model: Any, settings: TrainSection) -> torch.optim.Optimizer:
    """AdamW over all weights that are trained, as in the paper (arXiv 2406.17711, A.2) with beta2 = 0.95."""
    # Gains, biases and the logit scale are not decayed, as in open_clip's own trainer.
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    # Where weights are sharded some are not, and one pass takes no mixture.
    groups = [(part, settings.weight_decay) for part in by_layout(decayed)] + [(part, 0.0) for part in by_layout(plain)]
    return torch.optim.AdamW(
        [{"params": part, "weight_decay": decay} for part, decay in groups],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        fused=True,  # one pass over weights and moments: a vocabulary of 49,408 rows is most of a small model
    )


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model and all that a step of its training takes but the batch."""

    model: Any
    """open_clip's, with a `logit_bias` that needs a gradient where the loss is the sigmoid one; maybe sharded."""
    parallel: Any
    """`ranks.wrap(model)`."""
    optimizer: torch.optim.Optimizer
    loss: Loss
    ranks: Ranks
    normalize: Callable[[Tensor], Tensor]
    """From pixels uint8 [n, H, W, 3] on the device to images float32 [n, 3, H, W]."""
    micro_batch: int
    """Pairs of a forward pass, on each rank, at most."""
    grad_clip: float
    """Largest norm of the gradient."""
    compiled: bool = False
    """Whether the model is compiled."""
    approximate: Approximate | None = None
    """Of batches of which a share is seen at a lower resolution; if None all is seen at the model's own."""


def take_step(trainee: Trainee, pixels: Tensor, texts: Tensor, *, rate: float, number: int = 0) -> tuple[float, float]:
    """Train the model on one batch, unless loss or gradient are not finite: then its weights stay as they are.

    Args:
        trainee: the model, and how it is trained.
        pixels: uint8 [b/W, H, W, 3], this rank's; on the CPU, best in pinned memory, or on the device.
        texts: [b/W, L], likewise.
        rate: of this step.
        number: of the batch; decides which rows are seen at a lower resolution, where some are.

    Returns:
        Loss per example over all ranks, and the norm of its gradient before it was clipped.
    """
    model, optimizer = trainee.model, trainee.optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    optimizer.zero_grad(set_to_none=True)
    parts = _micro_batches(len(pixels), trainee.micro_batch)
    small = _small_rows(trainee, len(pixels), number)
    if len(parts) == 1:
        value = _loss(trainee, *_embed(trainee, trainee.parallel, pixels, texts, small))
        torch.autograd.backward(value)
    else:
        check_divisible(model, len(pixels), trainee.micro_batch)
        value = _backward_in_parts(trainee, pixels, texts, small, parts)
    loss = trainee.ranks.mean(value)
    norm = clip_gradient(model, trainee.ranks, trainee.grad_clip)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, LARGEST_LOG_SCALE)
    return loss, norm


def check_divisible(model: torch.nn.Module, rows: int, micro_batch: int) -> None:
    """Check that a rank's share of a batch may be embedded in parts.

    Raises:
        UserError: it would have to be, and the model's embeddings depend on what else is in the part.
    """
    if rows > micro_batch and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(
            f"train.micro_batch = {micro_batch}: expected a model that embeds each pair by itself, found batch "
            f"normalisation, which would see parts of the {rows} pairs of a rank; set train.micro_batch = {rows}, or "
            "train on more ranks"
        )


def _micro_batches(rows: int, most: int) -> list[slice]:
    """As few parts as there must be, of at most two sizes.

    >>> _micro_batches(10, 4)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    count = -(-rows // most)
    size, larger = divmod(rows, count)
    ends = [size * i + min(i, larger) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _small_rows(trainee: Trainee, rows: int, number: int) -> Tensor:
    """Which of this rank's rows of a batch are seen at a lower resolution, bool [b/W]."""
    if trainee.approximate is None:
        return torch.zeros(rows, dtype=torch.bool)
    ranks = trainee.ranks
    return trainee.approximate.rows(rows * ranks.world_size, number)[ranks.rank * rows : (ranks.rank + 1) * rows]


def _embed(trainee: Trainee, forward: Any, pixels: Tensor, texts: Tensor, small: Tensor) -> list[Tensor]:
    """Both embeddings, float32 [n, D], in the order of the rows; the scale, and the bias where it is trained."""
    device, approximate = trainee.ranks.device, trainee.approximate
    pixels = pixels.to(device, non_blocking=True)
    if approximate is None:
        images: Tensor | Pictures = trainee.normalize(pixels)
        sees: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        images, sees = approximate.pictures(pixels, small, trainee.normalize), approximate.model.installed()
    # A cache of weights in bf16 would hold all of them until the pass is over; each is used once in it.
    with sees, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        zimg, ztxt, scale, *bias = forward(images, texts.to(device, non_blocking=True))
    trained = getattr(trainee.model, "logit_bias", None) is not None and trainee.model.logit_bias.requires_grad
    return [zimg.float(), ztxt.float(), scale, *(bias if trained else ())]


def _loss(trainee: Trainee, zimg: Tensor, ztxt: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return contrastive_loss(zimg, ztxt, scale, bias, loss=trainee.loss, ranks=trainee.ranks)


def _backward_in_parts(
    trainee: Trainee, pixels: Tensor, texts: Tensor, small: Tensor, parts: Sequence[slice]
) -> Tensor:
    """The loss of a batch that is embedded in parts; its gradient is added to that of the weights."""
    draws, embedded = [], []
    # Compiled code draws its dropout in another order without a gradient than with one, so that it is run with one.
    with torch.set_grad_enabled(trainee.compiled):
        for part in parts:
            draws.append(_random_state(trainee.ranks.device))
            embedded.append(
                [each.detach() for each in _embed(trainee, trainee.model, pixels[part], texts[part], small[part])]
            )
    zimg, ztxt = (torch.cat([each[side] for each in embedded]).requires_grad_() for side in (0, 1))
    scalars = embedded[0][2:]
    for scalar in scalars:
        scalar.requires_grad_()
    del embedded
    value = _loss(trainee, zimg, ztxt, *scalars)
    by_zimg, by_ztxt, *by_scalars = torch.autograd.grad(value, [zimg, ztxt, *scalars])
    for part, draw in zip(parts, draws, strict=True):
        last = part is parts[-1]
        _restore_random_state(draw, trainee.ranks.device)
        # Of several ranks, gradients are summed over the parts first, and sent once. Where weights are sharded each
        # part sends its own: the sum would be a gradient of the whole model on each rank, a quarter of what is saved.
        once = isinstance(trainee.parallel, DistributedDataParallel) and not last
        with trainee.parallel.no_sync() if once else contextlib.nullcontext():
            found = _embed(trainee, trainee.parallel, pixels[part], texts[part], small[part])
            grads = [by_zimg[part], by_ztxt[part], *(by_scalars if last else ())]
            torch.autograd.backward(found[: len(grads)], grads)
    return value


def _random_state(device: torch.device) -> list[Tensor]:
    """Where the generators stand that a forward pass draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
