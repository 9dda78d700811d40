"""What the paper leaves open or only names, beside the product: for comparison, not for use."""

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from curate.jest import Embeddings

NEAR_DUPLICATE = 0.99
"""Cosine of the reference's image embeddings from which on two pictures count as one."""
CELLS, PROBED = 256, 4


def super_batch_losses(model: Embeddings) -> Tensor:
    """Loss [B] of each pair in the whole super-batch: equation 2 of arXiv 2406.17711 with all B pairs for the batch.

    The other reading of independent selection, whose score the paper does not define (`curate.jest` takes the pair
    alone): each example's part of the super-batch's loss.
    """
    logits = model.zimg @ model.ztxt.T * model.logit_scale + model.logit_bias  # [B, B]
    return softplus(logits).sum(1) - logits.diagonal()


def draw_by_scores(scores: Tensor, size: int, gain: float, generator: torch.Generator) -> Tensor:
    """Positions int64 [size], drawn without replacement in proportion to exp(gain · score)."""
    noise = -torch.empty(len(scores), dtype=torch.float64).exponential_(generator=generator).log()
    return (scores.double() * gain + noise).topk(size).indices


def without_near_duplicates(zimg: npt.NDArray[np.float16]) -> npt.NDArray[np.int64]:
    """Rows [n] that have no near-duplicate among the rows kept before them."""
    rows = np.ascontiguousarray(zimg, np.float32)
    index = faiss.index_factory(rows.shape[1], f"IVF{CELLS},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:: max(1, len(rows) // (64 * CELLS))])
    index.add(rows)
    faiss.extract_index_ivf(index).nprobe = PROBED
    limits, _, found = index.range_search(rows, NEAR_DUPLICATE)
    kept = np.ones(len(rows), bool)
    for row in range(len(rows)):
        near = found[limits[row] : limits[row + 1]]
        kept[row] = not kept[near[near < row]].any()
    return np.flatnonzero(kept)
