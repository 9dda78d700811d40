"""The loss over all pairs of a batch, in tiles of rows, with its gradient: b × b logits are never held at once.

    softmax: CLIP's (arXiv 2103.00020, figure 3)     sigmoid: SigLIP's (arXiv 2303.15343, equation 1)

open_clip's `ClipLoss` and `SigLipLoss` compute the same; tests hold the two against each other. At b = 32,768 their
logits alone are 4.3 GB of float32, and what is kept for the gradient comes on top.

Letters: b pairs of a batch, n = b / W of them this rank's, D the width of an embedding, t rows of a tile.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from curate.criteria import Loss
from curate.jobs.ranks import Ranks

TILE_LOGITS = 2**22
"""Of one tile, t × b: 16 MiB of float32. At most three such tensors are held at once."""
TILES_HELD = 3


def contrastive_loss(
    zimg: Tensor,
    ztxt: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    loss: Loss,
    ranks: Ranks,
    tile_logits: int = TILE_LOGITS,
) -> Tensor:
    """This rank's part of the loss of a batch; the mean over the ranks is the loss, and so is that of its gradients.

    All ranks call it together. Its gradient is made with it, at the cost of a few products of tiles, so that nothing
    of size b × b waits for the backward pass.

    Args:
        zimg: unit embeddings of this rank's images, [n, D].
        ztxt: of their captions, [n, D].
        scale: of the logits, a scalar: the factor itself, not its logarithm.
        bias: of the logits, a scalar; None without one, and of no effect on the softmax loss.
        loss: which.
        ranks: who shares the batch.
        tile_logits: largest number of logits that are held at once.

    Returns:
        A scalar.
    """
    value: Tensor = _Contrastive.apply(zimg, ztxt, scale, bias, loss, ranks, tile_logits)
    return value


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zimg: Tensor,
        ztxt: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        loss: Loss,
        ranks: Ranks,
        tile_logits: int,
    ) -> Tensor:
        n = len(zimg)
        first = ranks.rank * n  # of this rank's pairs in the batch
        ways = [(zimg, ztxt)] if loss == "sigmoid" else [(zimg, ztxt), (ztxt, zimg)]
        value = zimg.new_zeros(())
        # By row, by column, by scale and by bias; image and text change sides with the second way.
        grads = [torch.zeros_like(zimg), torch.zeros_like(ztxt)]
        d_scale, d_bias = zimg.new_zeros(()), zimg.new_zeros(())
        for side, (own, other) in enumerate(ways):
            columns = ranks.concatenate(other)  # [b, D]
            d_columns = torch.zeros_like(columns)
            rows = max(1, tile_logits // len(columns))
            for start in range(0, n, rows):
                x = own[start : start + rows]  # [t, D]
                at = first + start  # the column of its first row's own pair
                part, g = (
                    _sigmoid_tile(x, columns, scale, bias, at)
                    if loss == "sigmoid"
                    else _softmax_tile(x, columns, scale, at)
                )
                share = len(ways) * n
                value += part / share
                g /= share  # d loss / d logits, [t, b]
                by_dot = g @ columns  # [t, D]
                grads[side][start : start + rows] += scale * by_dot
                d_columns.addmm_(g.T, scale * x)
                d_scale += (by_dot * x).sum()
                if loss == "sigmoid":
                    d_bias += g.sum()
            grads[1 - side] += ranks.sum(d_columns)[first : first + n]
        ctx.save_for_backward(*grads, d_scale, d_bias)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        by_zimg, by_ztxt, by_scale, by_bias = (outer[0] * saved for saved in ctx.saved_tensors)
        return by_zimg, by_ztxt, by_scale, by_bias if ctx.needs_input_grad[3] else None, None, None, None


def _sigmoid_tile(x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor | None, at: int) -> tuple[Tensor, Tensor]:
    """Sum of -log sigmoid(± logit), + for own pairs; and its gradient by the logits, [t, b]."""
    logits = scale * x @ columns.T
    if bias is not None:
        logits += bias
    logits.diagonal(at).neg_()  # -log sigmoid(l) = softplus(-l)
    value = softplus(logits).sum()
    g = logits.sigmoid_()
    g.diagonal(at).neg_()
    return value, g


def _softmax_tile(x: Tensor, columns: Tensor, scale: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of own pairs among all columns; and its gradient by the logits, [t, b]."""
    logits = scale * x @ columns.T
    total = logits.logsumexp(1, keepdim=True)
    value = (total[:, 0] - logits.diagonal(at)).sum()
    g = logits.sub_(total).exp_()
    g.diagonal(at).sub_(1)
    return value, g
