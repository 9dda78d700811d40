"""Floating-point operations of one forward pass, 2 per multiply-add, by the usual count of a transformer's products."""

from typing import Any


def forward_flops(config: dict[str, Any]) -> float:
    """Operations for one pair through both towers of an open_clip ViT configuration.

    Per token and layer: 24 · width² for the four projections of attention and an MLP of four times the width, and
    4 · tokens · width for the two products of attention. Embedding look-ups, norms and activations are not counted.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    pixels = 3 * vision["patch_size"] ** 2
    image = _tower(patches + 1, vision["width"], vision["layers"])
    image += 2 * patches * pixels * vision["width"] + 2 * vision["width"] * config["embed_dim"]
    words = _tower(text["context_length"], text["width"], text["layers"]) + 2 * text["width"] * config["embed_dim"]
    return float(image + words)


def _tower(tokens: int, width: int, layers: int) -> int:
    return tokens * layers * (24 * width**2 + 4 * tokens * width)
