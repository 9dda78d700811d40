"""Joint draws that the product does not make, literally: what a term of the score weighs, and who is left out."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from curate.jest import Embeddings, diagonal_losses

Terms = Literal["all", "normalised", "no false negatives"]
"""`all`: the product's. `normalised`: what a candidate adds is divided by the rows that it is added to, so that gain
means the same in all chunks. `no false negatives`: no candidate is drawn whose picture or caption the reference takes
for a match of a drawn row's."""


def draw_jointly(
    learner: Embeddings,
    reference: Embeddings,
    *,
    size: int,
    n_chunks: int,
    gain: float,
    terms: Terms,
    generator: torch.Generator,
) -> Tensor:
    """Positions int64 [size] by joint learnability under the sigmoid loss.

    Args:
        learner: embeddings [B, D].
        reference: of the same rows.
        size: b, which `n_chunks` divides.
        n_chunks: draws.
        gain: factor on the scores.
        terms: how they are made.
        generator: noise as `jointly_sample_batch` draws it, so that `all` draws the same rows.
    """
    scores = diagonal_losses(learner, "sigmoid") - diagonal_losses(reference, "sigmoid")
    out = torch.zeros(len(scores), dtype=torch.bool)
    drawn: list[Tensor] = []
    for _ in range(n_chunks):
        weight = 1 / (1 + sum(map(len, drawn))) if terms == "normalised" else 1.0
        uniform = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_(min=2.0**-54)
        keys = (gain * weight * scores - (-uniform.log()).log()).masked_fill(out, -torch.inf)
        new = keys.topk(size // n_chunks).indices
        drawn.append(new)
        out[new] = True
        for sign, model in ((1, learner), (-1, reference)):
            for rows, others in ((model.zimg, model.ztxt), (model.ztxt, model.zimg)):
                logits = rows @ others[new].T * model.logit_scale + model.logit_bias
                scores += sign * softplus(logits).sum(1)
                if model is reference and terms == "no false negatives":
                    out |= (logits > 0).any(1)
    return torch.cat(drawn)
