"""JEST as the paper lists it (arXiv 2406.17711v1, Algorithms 1 and 3): whole B × B matrices and masked sums.

Slow on purpose, and written apart from `curate.jest`: nothing is shared but the order in which noise is drawn. The
slips of the listings are mended as that module's docstring says; all else is theirs, down to ``np.eye`` and -1e8.
"""

from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.floating]
Model = tuple[Array, Array, float, float]  # zimg [B, D], ztxt [B, D], scale, bias


def gumbel_rows(seed: int, draws: int, rows: int) -> list[Array]:
    """The noise of the first draws of a seed, float64 [B] each: the one thing both sides must agree on."""
    generator = torch.Generator().manual_seed(seed)
    uniform = [torch.rand(rows, generator=generator, dtype=torch.float64) for _ in range(draws)]
    return [-np.log(-np.log(np.maximum(u.numpy(), 2.0**-54))) for u in uniform]


def sigmoid_nll(model: Model) -> Array:
    """-log sigmoid(±logit) [B, B], plus on the diagonal: row i is image i, column j is text j."""
    zimg, ztxt, scale, bias = model
    logits = zimg @ ztxt.T
    logits *= scale
    logits += bias
    np.negative(logits, out=logits, where=np.eye(len(zimg), dtype=bool))
    nll: Array = np.logaddexp(logits, 0, out=logits)
    return nll


def _logsumexp(x: Array, axis: int) -> Array:
    peak = x.max(axis=axis, keepdims=True)
    lse: Array = np.log(np.exp(x - peak).sum(axis=axis)) + peak.squeeze(axis)
    return lse


def _draw(keys: Array, k: int) -> NDArray[np.int64]:
    return np.argsort(-keys, kind="stable")[:k]


def sigmoid_literal(
    models: list[tuple[int, Model]], sizes: list[int], gain: float, noise: list[Array]
) -> tuple[NDArray[np.int64], list[Array]]:
    """Algorithm 1: the rows in the order drawn, and before each draw all B scores (with gain, and chosen at -1e8)."""
    scores: Array = reduce(np.add, (sign * sigmoid_nll(model) for sign, model in models))
    scores *= gain
    own = np.diag(scores)
    seen: list[Array] = [own]
    inds = _draw(own + noise[0].astype(own.dtype), sizes[0])
    for k, draw_noise in zip(sizes[1:], noise[1:], strict=True):
        chosen = np.eye(len(own), dtype=own.dtype)[inds].sum(0)
        ij = (scores * chosen[:, None]).sum(0)  # chosen images, candidate texts
        ji = (scores * chosen[None, :]).sum(1)  # candidate images, chosen texts
        logits = own + ij + ji - 1e8 * chosen
        seen.append(logits)
        inds = np.concatenate([inds, _draw(logits + draw_noise.astype(own.dtype), k)])
    return inds, seen


def softmax_literal(
    models: list[tuple[int, Model]], sizes: list[int], gain: float, noise: list[Array]
) -> tuple[NDArray[np.int64], list[Array]]:
    """Algorithm 3: the negatives that count are the chosen ones; as above."""
    matrices = [(sign, scale * (zimg @ ztxt.T)) for sign, (zimg, ztxt, scale, _) in models]
    own: Array = reduce(np.add, (-sign * np.diag(logits) for sign, logits in matrices))
    seen: list[Array] = [gain * own]
    inds = _draw(gain * own + noise[0].astype(own.dtype), sizes[0])
    for k, draw_noise in zip(sizes[1:], noise[1:], strict=True):
        chosen = np.eye(len(own), dtype=own.dtype)[inds].sum(0)
        unchosen = 1e8 * (1 - chosen)
        score = own.copy()
        for sign, logits in matrices:
            image_to_text = _logsumexp(logits - unchosen[None, :], axis=1)
            text_to_image = _logsumexp(logits - unchosen[:, None], axis=0)
            score += sign * 0.5 * (image_to_text + text_to_image)
        logits = gain * score - 1e8 * chosen
        seen.append(logits)
        inds = np.concatenate([inds, _draw(logits + draw_noise.astype(own.dtype), k)])
    return inds, seen


def batch_loss(model: Model, loss: str) -> float:
    """Equations 1 and 2 over a whole batch, mean per example."""
    zimg, ztxt, scale, _ = model
    if loss == "sigmoid":
        return float(sigmoid_nll(model).sum() / len(zimg))
    logits = scale * (zimg @ ztxt.T)
    own = np.diag(logits)
    return float((0.5 * (_logsumexp(logits, axis=1) + _logsumexp(logits, axis=0)) - own).mean())
