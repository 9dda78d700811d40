"""Text towers that need not see padding: causal ones, whose embedding is taken at the end of the text.

In such a tower no position sees a later one, so that what follows the position that is taken changes nothing: CLIP's
77 tokens are cut to those of the longest text of a batch. Towers that attend both
ways, or take the last position, as SigLIP's do, are left as they are; so is what open_clip only wraps.
"""

import copy
from typing import Any, cast

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

STEP = 16
"""Lengths are multiples of it: kernels then add up the same terms in the same order as for the whole length. With
multiples of 8 the last bits of float32 differed, on a CPU of vectors of 16, by up to 3e-6 of embeddings not yet of unit
length."""


class CausalTexts:
    """The text tower of a model for texts of any length.

    Args:
        model: of open_clip.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tower = _tower(model)
        self._short: dict[int, Any] = {}

    @property
    def cuts(self) -> bool:
        """Whether padding is cut off."""
        return self._tower is not None

    def length(self, texts: Tensor) -> int:
        """Tokens of texts int64 [u, L] that decide their embeddings; L unless the tower is causal."""
        most = int(texts.shape[1])
        if self._tower is None or not len(texts):
            return most
        # As open_clip's `text_global_pool`: the largest number of a text, or the first end of text.
        if _pool_type(self._tower) == "eos":
            ends = (texts == _eos(self._tower)).int().argmax(dim=1)
        else:
            ends = texts.argmax(dim=1)
        needed = int(ends.max()) + 1
        return min(most, -(-needed // STEP) * STEP)

    def encode(self, texts: Tensor) -> Tensor:
        """Embeddings [u, D] of texts int64 [u, length], not yet of unit length; where `cuts`, of any `length`."""
        length = texts.shape[1]
        if self._tower is None or length == self._tower.positional_embedding.shape[0]:
            return cast("Tensor", self._model.encode_text(texts, normalize=False))
        if length not in self._short:
            self._short[length] = _shortened(self._tower, length)
        short = self._short[length]
        return cast("Tensor", short.encode_text(texts, normalize=False) if _is_model(short) else short(texts))


def _is_model(tower: Any) -> bool:
    """Whether a text tower is the model itself, as in open_clip's CLIP, and not a part of it."""
    return isinstance(tower, open_clip.CLIP)


def _tower(model: Any) -> Any | None:
    """What holds a model's text tower, if padding changes nothing in it."""
    tower = model if isinstance(model, open_clip.CLIP) else getattr(model, "text", None)
    if not isinstance(tower, open_clip.CLIP | TextTransformer):
        return None
    mask = getattr(tower, "attn_mask", None)
    if mask is None or _pool_type(tower) not in ("argmax", "eos"):
        return None
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return None
    if getattr(tower, "output_tokens", False) or tower.positional_embedding.shape[0] != len(mask):
        return None
    causal = torch.full_like(mask, -torch.inf).triu(1)
    return tower if mask.equal(causal) else None


def _pool_type(tower: Any) -> str:
    return str(tower.text_pool_type if _is_model(tower) else tower.pool_type)


def _eos(tower: Any) -> int:
    return int(tower.text_eos_id if _is_model(tower) else tower.eos_id)


def _shortened(tower: Any, length: int) -> Any:
    """A text tower for texts of one length: the same modules and weights, the first positions of two of them."""
    short = copy.copy(tower)
    positions = nn.Parameter(tower.positional_embedding[:length], requires_grad=False)
    short._parameters = tower._parameters | {"positional_embedding": positions}
    short._buffers = tower._buffers | {"attn_mask": tower.attn_mask[:length, :length].contiguous()}
    return short
