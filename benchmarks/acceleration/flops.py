"""Floating-point operations of one forward pass, 2 per multiply-add, by the usual count of a transformer's products."""

from typing import Any


def forward_flops(config: dict[str, Any], image_size: int | None = None) -> float:
    """Operations for one pair through both towers of an open_clip ViT configuration.

    Per token and layer: 24 · width² for the four projections of attention and an MLP of four times the width, and
    4 · tokens · width for the two products of attention. Embedding look-ups, norms and activations are not counted.

    Args:
        config: open_clip's.
        image_size: height and width of the pictures; the model's own if None.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = ((image_size or vision["image_size"]) // vision["patch_size"]) ** 2
    pixels = 3 * vision["patch_size"] ** 2
    image = _tower(patches + 1, vision["width"], vision["layers"])
    image += 2 * patches * pixels * vision["width"] + 2 * vision["width"] * config["embed_dim"]
    words = _tower(text["context_length"], text["width"], text["layers"]) + 2 * text["width"] * config["embed_dim"]
    return float(image + words)


def spent_flops(
    config: dict[str, Any], *, trained: int, trained_smaller: int, scored: int, smaller: int | None
) -> float:
    """Operations of training and of scoring, by the paper's account (arXiv 2406.17711, A.4).

    A trained pair costs three forward passes, a scored one costs one; at a lower resolution a pass costs less. With F
    operations of a pass, A · F of one at the lower resolution and a share s of each batch trained there, a step of b
    pairs out of B is b · F · (3 · (1 - s + s · A) + A · B / b). The paper's own account has one pass less, because the
    pass that scores a pair is the one that trains it; in rounds the learner has changed in between.

    Args:
        config: open_clip's, of the learner.
        trained: pairs that were trained on.
        trained_smaller: those of them that were seen at the lower resolution.
        scored: pairs that the learner has embedded, to choose from them.
        smaller: height and width of pictures at the lower resolution; None if the learner is scored at its own.
    """
    whole, small = forward_flops(config), forward_flops(config, smaller)
    return whole * 3 * (trained - trained_smaller) + small * (3 * trained_smaller + scored)


def _tower(tokens: int, width: int, layers: int) -> int:
    return tokens * layers * (24 * width**2 + 4 * tokens * width)
