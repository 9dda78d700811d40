"""Training at two resolutions: the half of Flexi-JEST that lets approximate scores be trusted (arXiv 2406.17711, 3.3).

A learner that was never trained on small pictures scores them badly (the paper's figure 4: worse than no selection). So
a share of each batch is seen at the resolution that rounds score at, and one loss is taken over all of the batch.

The small pictures are the batch's own pixels, downscaled where the model computes, and not new crops of the files: the
reader decodes once, and hands on one picture of each row. Scoring crops the file itself at the small size. Both are
antialiased and of the same part of the picture, but the trainer's went through one more resize, and 8 bits in between.

Letters: b pairs of a batch, n of them this rank's or a part of those, k of the n seen at the lower resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from curate.models.resolution import Pictures, TwoResolutions
from curate.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Approximate:
    """Which rows of a batch a learner sees at a lower resolution, and how."""

    model: TwoResolutions
    share: float
    """Of each batch."""
    seed: int
    """Of the recipe."""

    def rows(self, batch: int, number: int) -> Tensor:
        """Whether each row of a batch is seen at the lower resolution, bool [b]; as `approximate_rows`."""
        return approximate_rows(batch, self.share, seed=self.seed, number=number)

    def pictures(self, pixels: Tensor, rows: Tensor, normalize: Callable[[Tensor], Tensor]) -> Pictures:
        """What the model takes within `model.installed()`.

        Args:
            pixels: uint8 [n, H, W, 3], on the device.
            rows: bool [n], on the CPU, whose sizes need not wait for a device: those seen at the lower resolution.
            normalize: as `Trainee.normalize`.
        """
        whole, small = ((rows == is_small).nonzero()[:, 0] for is_small in (False, True))
        places = torch.cat([whole, small]).argsort()
        whole, small, places = (index.to(pixels.device, non_blocking=True) for index in (whole, small, places))
        return normalize(pixels[whole]), normalize(downscaled(pixels[small], self.model.size)), places


def approximate_of(model: Any, size: int | None, share: float, *, seed: int) -> Approximate | None:
    """How a learner sees its batches; None if all at its own resolution.

    Args:
        model: open_clip's.
        size: the recipe's `learner.scoring_resolution`.
        share: its `train.approximate_share`, 0 unless there is a size.
        seed: its own.

    Raises:
        UserError: the model cannot embed pictures of that size.
    """
    if size is None or not share:
        return None
    return Approximate(model=TwoResolutions(model, size), share=share, seed=seed)


def approximate_rows(batch: int, share: float, *, seed: int, number: int) -> Tensor:
    """Every 1 / share-th row of a batch, from a row on that is drawn by its number.

    The paper takes every second row. Evenly spaced rows are each chunk's share of a sub-batch, and each rank's and each
    micro-batch's: n rows in succession have share · n of them, rounded down or up, so that no rank waits for another.

    Args:
        batch: b.
        share: of its rows; its decimal digits are meant.
        seed: of the recipe.
        number: of the batch, which alone decides beside the seed: not the rank, nor what was trained before.

    Returns:
        bool [b].

    >>> approximate_rows(8, 0.25, seed=0, number=0).int().tolist()
    [0, 0, 0, 1, 0, 0, 0, 1]
    """
    part = Fraction(str(share))
    first = derive_seed(seed, "approximate", number) % part.denominator
    reached = (torch.arange(batch + 1) * part.numerator + first) // part.denominator
    return reached[1:] > reached[:-1]


def downscaled(pixels: Tensor, size: int) -> Tensor:
    """Smaller pictures of 8 bits, antialiased bicubic; uint8 [k, H, W, 3] to [k, size, size, 3]."""
    if not len(pixels):
        return pixels.new_empty(0, size, size, 3)
    planes = pixels.permute(0, 3, 1, 2)
    small: Tensor = functional.resize(planes, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return small.permute(0, 2, 3, 1)
