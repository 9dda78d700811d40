"""The arithmetic of a training step: open_clip's loss over all ranks, AdamW, the rate of each step."""

import math
import warnings
from typing import Any

import open_clip
import torch
from torch import Tensor

from curate.criteria import Loss
from curate.recipe import TrainSection
from jobs.ranks import Ranks

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
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        fused=True,  # one pass over weights and moments: a vocabulary of 49,408 rows is most of a small model
    )


def make_criterion(loss: Loss, ranks: Ranks) -> Any:
    """open_clip's loss over all ranks' pairs, so that a sub-batch is one loss however many ranks share it.

    Each rank computes its own rows' part, whose mean over the ranks is the loss, and so is that of their gradients.
    """
    where = {"rank": ranks.rank, "world_size": ranks.world_size}
    if loss == "sigmoid":
        return open_clip.loss.SigLipLoss(**where)
    # open_clip gathers by a function that torch is about to replace.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional", category=FutureWarning)
    return open_clip.loss.ClipLoss(local_loss=True, gather_with_grad=True, **where)


def take_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    criterion: Any,
    images: Tensor,
    texts: Tensor,
    *,
    rate: float,
    grad_clip: float,
    ranks: Ranks,
    parallel: Any,
) -> tuple[float, float]:
    """Train the model on one batch, unless loss or gradient are not finite: then its weights stay as they are.

    Args:
        model: open_clip's, with a `logit_bias` that needs a gradient where the loss is the sigmoid one.
        optimizer: of its weights.
        criterion: from `make_criterion`.
        images: [b, 3, H, W], this rank's.
        texts: [b, L], this rank's.
        rate: of this step.
        grad_clip: largest norm of the gradient.
        ranks: whose mean is the loss.
        parallel: `ranks.wrap(model)`.

    Returns:
        Loss per example over all ranks, and the norm of its gradient before it was clipped.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        zimg, ztxt, scale, *bias = parallel(images, texts)
    value = criterion(zimg.float(), ztxt.float(), scale, *(part for part in bias if part.requires_grad))
    loss = ranks.mean(value)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, LARGEST_LOG_SCALE)
    return loss, norm
