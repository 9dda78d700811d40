"""Padding that a text tower need not see: cut where nothing depends on it, and nowhere else."""

import open_clip
import pytest
import torch

from curate.models.causal import CausalTexts

torch.set_num_threads(1)

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}


def model(custom: bool = False, **text: object) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    return kind(16, VISION, TEXT | text).eval().requires_grad_(False)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 49407}], ids=["argmax", "eos"])
@pytest.mark.parametrize("words", [1, 5, 14, 15, 30, 60, 100])
def test_a_causal_tower_embeds_the_same_without_padding(custom: bool, pool: dict[str, object], words: int) -> None:
    tower = model(custom, **pool)
    texts = open_clip.tokenizer.SimpleTokenizer()([f"{i} " + "dog " * (words - i % 2) for i in range(16)])
    causal = CausalTexts(tower)
    length = causal.length(texts)
    assert length == min(77, -(-(words + 3) // 16) * 16)
    with torch.inference_mode():
        cut, whole = causal.encode(texts[:, :length]), tower.encode_text(texts, normalize=False)
    assert (cut - whole).abs().max() < 1e-5 * whole.abs().max()
    # That nothing is left out but rounding: in double precision nothing at all is.
    tower.double()
    with torch.inference_mode():
        cut, whole = CausalTexts(tower).encode(texts[:, :length]), tower.encode_text(texts, normalize=False)
    assert (cut - whole).abs().max() < 1e-13 * whole.abs().max()


@pytest.mark.parametrize(
    "text",
    [
        {"pool_type": "last", "no_causal_mask": True},  # SigLIP's
        {"pool_type": "last"},
        {"no_causal_mask": True},
        {"pool_type": "first"},
        {"embed_cls": True},
    ],
    ids=str,
)
def test_others_see_every_position(text: dict[str, object]) -> None:
    causal = CausalTexts(model(True, **text))
    texts = open_clip.tokenizer.SimpleTokenizer()(["a"])
    assert not causal.cuts
    assert causal.length(texts) == 77


def test_weights_that_change_are_those_of_every_length() -> None:
    tower = model()
    causal = CausalTexts(tower)
    texts = open_clip.tokenizer.SimpleTokenizer()(["a red ring"])[:, :16]
    with torch.inference_mode():
        before = causal.encode(texts)
        tower.token_embedding.weight.mul_(2)
        assert not causal.encode(texts).equal(before)
