"""The worlds that learners are trained in: vectors of pictures and of captions, and what is wrong with which pair.

    concepts    400 clusters of 8 classes each and a residual of each pair; two nonlinear views. Dirt: swapped captions.
    attributes  combinations of eight attributes; captions that differ in one of them are crowded. Dirt: boilerplate,
                one attribute wrong, near-duplicates, a third each.
    pictures    features of real pictures and captions (`benchmarks.heads.features`), crowded by drawing styles and
                languages. Dirt: swapped captions.

Each has a pool, the clean pairs of the reference, and clean held-out pairs; no pair is in two of them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks.heads.features import features

Name = Literal["concepts", "attributes", "pictures"]
WORLDS: tuple[Name, ...] = get_args(Name)
WIDTH = 64
"""Of both views."""
POOL, REFERENCE, HELD_OUT = 100_000, 200_000, 4_000
"""Pairs of a drawn world."""
CLUSTERS, CLASSES, LATENT = 400, 8, 24
ATTRIBUTES, VALUES = 8, 6
BOILERPLATE, SPAMMED = 20, 200
"""Captions that say nothing; pictures that near-duplicates are of."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Vectors of pairs.

    Attributes:
        image: float32 [N, 64].
        text: float32 [N, 64].
        label: int64 [N]; pairs of one label belong to each other, wherever one is asked for.
        concept: int64 [N]; pairs of one concept are alike, and crowd a batch.
        wrong: bool [N]; what the reference would rather not have.
    """

    image: Tensor
    text: Tensor
    label: Tensor
    concept: Tensor
    wrong: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Tensor) -> "Pairs":
        """Some rows."""
        return Pairs(
            image=self.image[rows],
            text=self.text[rows],
            label=self.label[rows],
            concept=self.concept[rows],
            wrong=self.wrong[rows],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What one seed makes of a world."""

    pool: Pairs
    reference: Pairs
    held_out: Pairs


def make_world(
    name: Name, *, seed: int, dirt: float, crowding: float = 1.0, data: Path | None = None, cache: Path | None = None
) -> World:
    """Make a world.

    Args:
        name: which.
        seed: of its maps, its pairs and what is wrong with them.
        dirt: share of the pool with which something is wrong.
        crowding: of `concepts`, the number of clusters is divided by it.
        data: folder of the real sets, for `pictures`.
        cache: folder for their features.

    Raises:
        UserError: the real sets are not there.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == "concepts":
        sample = _concepts(generator, round(CLUSTERS / crowding))
        pool, reference, held = (sample(n) for n in (POOL, REFERENCE, HELD_OUT))
        return World(pool=_swapped(pool, dirt, generator), reference=reference, held_out=held)
    if name == "attributes":
        drawn = _Attributes(generator)
        pool, reference, held = (drawn.sample(n) for n in (POOL, REFERENCE, HELD_OUT))
        return World(pool=drawn.spoilt(pool, dirt), reference=reference, held_out=held)
    assert data is not None
    assert cache is not None
    return _pictures(data, cache, dirt, generator)


# --- concepts --------------------------------------------------------------------------------------------------------


def _concepts(generator: torch.Generator, clusters: int) -> Callable[[int], Pairs]:
    centres = _normal(generator, clusters, 1, LATENT) + 0.3 * _normal(generator, clusters, CLASSES, LATENT)
    views = [_View(generator, LATENT, bend=6.0, noise=0.02) for _ in range(2)]

    def sample(n: int) -> Pairs:
        kind = torch.randint(clusters * CLASSES, (n,), generator=generator)
        z = centres.reshape(-1, LATENT)[kind] + 0.2 * _normal(generator, n, LATENT)
        image, text = (view(z, generator) for view in views)
        return _pairs(image, text, concept=kind // CLASSES)

    return sample


class _View:
    """A random map of two layers from latent vectors to one of the two views."""

    def __init__(self, generator: torch.Generator, width: int, *, bend: float, noise: float) -> None:
        self._inner = _normal(generator, width, 2 * WIDTH) / math.sqrt(width)
        self._outer = _normal(generator, 2 * WIDTH, WIDTH) / math.sqrt(2 * WIDTH)
        self._bend, self._noise = bend, noise

    def __call__(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.tanh(self._bend * z @ self._inner) @ self._outer + self._noise * _normal(generator, len(z), WIDTH)


# --- attributes ------------------------------------------------------------------------------------------------------


class _Attributes:
    """Pairs that share combinations of attributes: a few are usual, and most pairs vary one of them."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._usual = torch.randint(VALUES, (CLUSTERS, ATTRIBUTES), generator=generator)
        self._said = _normal(generator, ATTRIBUTES, VALUES, LATENT) / math.sqrt(ATTRIBUTES)
        self._views = [_View(generator, LATENT, bend=6.0, noise=0.02) for _ in range(2)]
        self._boilerplate = self._views[1](_normal(generator, BOILERPLATE, LATENT), generator)

    def sample(self, n: int) -> Pairs:
        """Clean pairs."""
        concept = torch.randint(CLUSTERS, (n,), generator=self._generator)
        z = self._latent(self._varied(concept)) + 0.06 * _normal(self._generator, n, LATENT)
        image, text = (view(z, self._generator) for view in self._views)
        return _pairs(image, text, concept=concept)

    def spoilt(self, pool: Pairs, dirt: float) -> Pairs:
        """The pool with its dirt: pairs are clean when drawn, so that all shares of dirt have the same pictures."""
        generator = self._generator
        kind = torch.rand(len(pool), generator=generator) / max(dirt, 1e-9) * 3
        image, text = pool.image.clone(), pool.text.clone()
        bare = kind < 1
        text[bare] = self._boilerplate[torch.randint(BOILERPLATE, (int(bare.sum()),), generator=generator)]
        # The caption of another pair of the concept: near in the view, an attribute or more of it wrong.
        near = (kind >= 1) & (kind < 2)
        text[near] = pool.text[_another_of_the_same(pool.concept, torch.where(near)[0], generator)]
        copies = (kind >= 2) & (kind < 3)
        source = torch.randint(SPAMMED, (int(copies.sum()),), generator=generator)
        for view in (image, text):
            view[copies] = view[source] + 0.02 * _normal(generator, len(source), WIDTH)
        return Pairs(image=image, text=text, label=pool.label, concept=pool.concept, wrong=bare | near | copies)

    def _varied(self, concept: Tensor) -> Tensor:
        """Each concept's usual values, up to two of them drawn anew."""
        n, values = len(concept), self._usual[concept]
        for _ in range(2):
            which = torch.randint(ATTRIBUTES, (n,), generator=self._generator)
            values[torch.arange(n), which] = torch.randint(VALUES, (n,), generator=self._generator)
        return values

    def _latent(self, values: Tensor) -> Tensor:
        return sum(self._said[a][values[:, a]] for a in range(ATTRIBUTES))  # type: ignore[return-value]


def _another_of_the_same(concept: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """For each row one of its concept, by chance."""
    order = torch.argsort(concept, stable=True)
    counts = torch.bincount(concept)
    first = counts.cumsum(0) - counts
    mine = concept[rows]
    step = (torch.rand(len(rows), generator=generator) * counts[mine]).long()
    return order[first[mine] + step]


# --- pictures --------------------------------------------------------------------------------------------------------


def _pictures(data: Path, cache: Path, dirt: float, generator: torch.Generator) -> World:
    whole = _features(data, cache)
    image, text, label, row = (whole[name] for name in ("image", "text", "label", "row"))
    every = Pairs(image=image, text=text, label=label, concept=label, wrong=torch.zeros(len(image), dtype=torch.bool))
    # By picture, so that no two crops of one are apart.
    pictures = int(row.max()) + 1
    u = torch.rand(pictures, generator=generator)[row]
    held = (u < 0.12) & (torch.arange(len(row)) < pictures)  # one crop of each
    pool, reference = (u >= 0.12) & (u < 0.4), u >= 0.4
    return World(
        pool=_swapped(every.take(torch.where(pool)[0]), dirt, generator),
        reference=every.take(torch.where(reference)[0]),
        held_out=every.take(torch.where(held)[0]),
    )


@functools.cache
def _features(data: Path, cache: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in features(data, cache).items()}


# --- for all ---------------------------------------------------------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _pairs(image: Tensor, text: Tensor, *, concept: Tensor) -> Pairs:
    n = len(image)
    return Pairs(image=image, text=text, label=torch.arange(n), concept=concept, wrong=torch.zeros(n, dtype=torch.bool))


def _swapped(pool: Pairs, dirt: float, generator: torch.Generator) -> Pairs:
    """The pool, so many of its captions dealt anew among themselves."""
    wrong = torch.rand(len(pool), generator=generator) < dirt
    rows = torch.where(wrong)[0]
    source = torch.arange(len(pool))
    source[rows] = rows[torch.randperm(len(rows), generator=generator)]
    return Pairs(image=pool.image, text=pool.text[source], label=pool.label, concept=pool.concept, wrong=wrong)
