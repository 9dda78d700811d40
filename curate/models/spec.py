"""What names a model in the root, known without loading it."""

from dataclasses import asdict, dataclass
from typing import Any

from curate.recipe import Precision

WEIGHTS_NAME = "open_clip_model.safetensors"
"""Name of the weights within a model's folder, one of those that open_clip looks for."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """A model in the root: enough to load it, to name its embeddings, and to score them."""

    model: str
    """Hash of configuration and weights; the folder is `models/<model>/`."""
    source: str
    """Where it came from, for people."""
    weights_sha256: str
    embed_dim: int
    logit_scale: float
    """The factor (open_clip's parameter is its logarithm)."""
    logit_bias: float
    """0 for a model trained with the softmax loss."""
    precision: Precision = "fp32"
    exact_pixels: bool = True
    """Whether it scores the pixels of open_clip's transform to the last bit; of a learner's record the recipe of the
    round that scores with it says so, not the record."""
    image_size: int | None = None
    """Height and width of the pictures that it scores, where they are smaller than the model's own; of a learner's
    record likewise the recipe says so."""

    @property
    def sha(self) -> str:
        """Names the embeddings: the same weights in another precision, or of other pixels, embed differently."""
        ways = (
            *((self.precision,) if self.precision != "fp32" else ()),
            *(() if self.exact_pixels else ("fast",)),
            *(() if self.image_size is None else (f"{self.image_size}px",)),
        )
        return "-".join((self.model, *ways))

    @property
    def folder(self) -> str:
        """Folder of the model within the root."""
        return f"models/{self.model}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for plans, manifests and learner records."""
        record = asdict(self)
        if self.exact_pixels:
            del record["exact_pixels"]  # records of before there was a choice
        if self.image_size is None:
            del record["image_size"]  # likewise
        return record
