"""The same image tower for smaller pictures: scoring and part of the training of Flexi-JEST (arXiv 2406.17711, 3.3).

A smaller picture has fewer patches, so that the tower computes less. All weights stay as they are; the positional
embeddings are resampled, bicubic and antialiased, as open_clip does it with `force_image_size`. The paper has larger
patches instead (32 pixels for 16, FlexiViT), whose weights are resampled as well; the number of tokens, and so the
saving, is that of pictures of half the size.

Letters: n pictures, N positions of the tower's own grid, M of the smaller one, each with those of no patch.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import interpolate

from curate.errors import UserError

Pictures = tuple[Tensor, Tensor, Tensor]
"""Pictures of two sizes: [n - k, 3, H, W] and [k, 3, h, w], of which either may be none; and int64 [n], for each row of
a batch its place in the first followed by the second."""


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Where a tower has its positional embeddings, and what they are of."""

    name: str
    """Of the weight within the tower."""
    own: tuple[int, int]
    """Height and width of the tower's pictures."""
    patch: int
    """Pixels, each way."""
    others: int
    """Positions that are of no patch, before those that are: a class token, registers."""


def check_resolution(model: Any, size: int) -> None:
    """Check that a model can embed smaller pictures.

    Args:
        model: open_clip's.
        size: their height and width.

    Raises:
        UserError: its image tower has another kind of positions, or no grid of patches for such pictures.
    """
    where = f"learner.scoring_resolution = {size}"
    grid = _grid_of(model.visual)
    if grid is None:
        tower = getattr(model.visual, "trunk", model.visual)
        raise UserError(
            f"{where}: expected a vision transformer of open_clip or timm with an embedding of each position of a "
            f"square grid, found {type(tower).__name__}; leave it out, or choose another learner"
        )
    side = grid.own[0]
    fitting = range(grid.patch, side, grid.patch)
    if size not in fitting:
        nearest = min(fitting, key=lambda smaller: abs(smaller - size), default=None)
        raise UserError(
            f"{where}: expected a multiple of the learner's patches, {grid.patch} pixels, below the {side} pixels of "
            f"its pictures, found {size}; " + ("leave it out" if nearest is None else f"take {nearest}")
        )


def set_resolution(model: Any, size: int) -> None:
    """Make a model, in place, one of smaller pictures: what open_clip makes with `force_image_size`.

    Args:
        model: open_clip's.
        size: height and width of its pictures from now on.

    Raises:
        UserError: as `check_resolution`.
    """
    check_resolution(model, size)
    visual = model.visual
    if isinstance(visual, TimmModel):
        visual.set_input_size((size, size))
    else:
        positions = visual.positional_embedding
        side = size // visual.patch_size[0]
        visual.positional_embedding = torch.nn.Parameter(
            resampled(positions.detach(), side, others=1), requires_grad=positions.requires_grad
        )
        visual.grid_size, visual.image_size = (side, side), (size, size)
    visual.preprocess_cfg = visual.preprocess_cfg | {"size": (size, size)}


def resampled(positions: Tensor, side: int, *, others: int) -> Tensor:
    """Positional embeddings of a smaller grid, differentiably; equal to open_clip's `resize_pos_embed`.

    Args:
        positions: [N, D], or [1, N, D] as timm has them: those of no patch, then a square grid, line after line.
        side: patches of the smaller grid, each way.
        others: positions that are of no patch; they stay as they are.

    Returns:
        [M, D] or [1, M, D], M = others + side².
    """
    D = positions.shape[-1]
    flat = positions.reshape(-1, D)
    first, patches = flat[:others], flat[others:]
    was = math.isqrt(len(patches))
    planes = patches.reshape(1, was, was, D).permute(0, 3, 1, 2).float()
    planes = interpolate(planes, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    found = torch.cat([first, planes.permute(0, 2, 3, 1).reshape(side * side, D).to(flat.dtype)])
    return found.reshape(*positions.shape[:-2], -1, D)


class TwoResolutions:
    """A model that embeds pictures of its own size and smaller ones in one forward pass, with the same weights.

    Args:
        model: open_clip's; it may be sharded. It is not changed.
        size: height and width of the smaller pictures.

    Raises:
        UserError: as `check_resolution`.
    """

    def __init__(self, model: Any, size: int) -> None:
        check_resolution(model, size)
        grid = _grid_of(model.visual)
        assert grid is not None, "as checked"
        self.size = size
        self._visual = model.visual
        self._forward = _forward_of_two(model.visual, grid, size)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it the model's image tower takes `Pictures` where it takes a tensor of pictures."""
        # Not for good: a deep copy of the model would go on with the weights of this one.
        self._visual.forward = self._forward
        try:
            yield
        finally:
            del self._visual.forward


def _forward_of_two(visual: Any, grid: _Grid, size: int) -> Callable[[Pictures], Tensor]:
    """The forward pass of an image tower for pictures of two sizes; the features are [n, D], in the batch's order."""
    own, side = visual.forward, size // grid.patch
    height, width = grid.own
    smaller = _unsized(visual)

    def forward(pictures: Pictures) -> Tensor:
        whole, small, places = pictures
        positions = resampled(visual.get_parameter(grid.name), side, others=grid.others)
        features = own(whole if len(whole) else whole.new_zeros(1, 3, height, width))[: len(whole)]
        # Towers embed no empty batch; and if a rank had none to embed, others that share its weights would wait for it.
        small_features = functional_call(
            smaller, {grid.name: positions}, (small if len(small) else small.new_zeros(1, 3, size, size),)
        )[: len(small)]
        return torch.cat([features, small_features])[places]

    return forward


def _grid_of(visual: Any) -> _Grid | None:
    """The grid of an image tower; None if it has none that can be resampled."""
    trunk: Any = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        name, positions, patch, others = "positional_embedding", visual.positional_embedding, visual.patch_size, 1
    elif isinstance(visual, TimmModel) and hasattr(trunk, "set_input_size") and hasattr(trunk, "no_embed_class"):
        name, positions, patch = "trunk.pos_embed", trunk.pos_embed, trunk.patch_embed.patch_size
        others = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    else:
        return None
    height, width = visual.image_size
    square = height == width and patch[0] == patch[1] and getattr(trunk, "rope", None) is None
    if positions is None or not square or positions.shape[-2] != others + (height // patch[0]) ** 2:
        return None
    return _Grid(name=name, own=(height, width), patch=patch[0], others=others)


def _unsized(visual: Any) -> Any:
    """An image tower of the same modules and weights that does not look at the size of its pictures."""
    tower = copy.copy(visual)
    if isinstance(visual, TimmModel):
        trunk, patches = copy.copy(visual.trunk), copy.copy(visual.trunk.patch_embed)
        patches.strict_img_size, patches.flatten, trunk.dynamic_img_size = False, True, False
        trunk._modules = trunk._modules | {"patch_embed": patches}
        tower._modules = tower._modules | {"trunk": trunk}
    return tower
