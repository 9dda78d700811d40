"""Embeddings with planted copies: clusters about a shared mean, a tenth of the rows near copies of others.

A copy has cosine .96 to .999, uniform, with its original. Originals have between them the cosines that the clusters
give; pairs of one original's copies may be near as well.
"""

import numpy as np
import numpy.typing as npt

D, CLUSTERS, COPIES = 512, 200, 0.1
LEAST, MOST = 0.96, 0.999
SOURCES = 18
"""Copies are made of every so manieth original: some have several."""

Floats = npt.NDArray[np.float32]


def unit(x: Floats) -> Floats:
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def originals(block: int, rows: int) -> Floats:
    """The originals of one block, [rows, D], the same whenever they are asked for."""
    world = np.random.default_rng(0)
    mean = world.standard_normal(D, np.float32)
    centres = world.standard_normal((CLUSTERS, D), np.float32)
    rng = np.random.default_rng([1, block])
    return unit(rng.standard_normal((rows, D), np.float32) + mean + centres[rng.integers(CLUSTERS, size=rows)])


def planted(block: int, blocks: int, rows: int) -> Floats:
    """One block of `blocks`, [rows, D]: originals, and copies of another block's originals, shuffled."""
    count = round(rows * COPIES)
    rng = np.random.default_rng([2, block])
    source = originals((7 * block + 3) % blocks, rows - count)
    x = source[rng.integers((rows - count) // SOURCES, size=count)]
    noise = rng.standard_normal(x.shape, np.float32)
    noise = unit(noise - (noise * x).sum(axis=1, keepdims=True) * x)
    cosine = rng.uniform(LEAST, MOST, (count, 1)).astype(np.float32)
    copies = cosine * x + np.sqrt(1 - cosine**2) * noise
    return np.concatenate([originals(block, rows - count), copies])[rng.permutation(rows)]
