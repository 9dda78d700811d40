"""Near neighbours: cells and their borders lose no pair, and tiles find what the whole product holds."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.dedup import neighbours
from curate.dedup.neighbours import (
    Assignment,
    Cells,
    Threshold,
    cell_count,
    near_pairs,
    sample_share,
    train_cells,
    unit_rows,
)

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float32]


def clustered(n: int, d: int, *, clusters: int, spread: float, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d)) + 2 * rng.normal(size=d)
    return unit_rows(centres[rng.integers(clusters, size=n)] + spread * rng.normal(size=(n, d)))


def whole(z: Floats, threshold: float) -> set[tuple[int, int]]:
    wide = z.astype(np.float64)
    return set(zip(*(side.tolist() for side in np.nonzero(np.triu(wide @ wide.T >= threshold, 1))), strict=True))


def met(places: Assignment) -> npt.NDArray[np.bool_]:
    """Whether two rows [n, n] are compared in some cell: the home of one, where the other is at home or borders."""
    held = np.zeros((len(places.home), int(places.home.max()) + 1), bool)
    at = np.arange(len(places.home))
    held[at, places.home] = True
    for border in places.border.T:
        near = (border >= 0) & (border < held.shape[1])
        held[at[near], border[near]] = True
    there = held[:, places.home]  # [row, other]: the row is held where the other is at home
    return np.asarray(there | there.T)


@pytest.mark.parametrize("d", [4, 16, 64])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
def test_near_rows_meet_in_a_cell_unless_one_borders_on_too_many(d: int, threshold: float) -> None:
    z = clustered(1500, d, clusters=20, spread=0.5)
    places = train_cells(z.copy(), 40).assign(z, threshold, CPU)
    together = met(places)
    missed = [(i, j) for i, j in whole(z, threshold) if not together[i, j]]
    assert all(places.beyond[i] or places.beyond[j] for i, j in missed)
    # And the guarantee is no empty one: most rows do not border on too many, and few cells hold everything.
    if threshold == 0.99 or (d == 64 and threshold == 0.95):
        assert places.beyond.mean() < 0.5
    assert np.bincount(places.home).max() < 400
    sides = places.border[:, 1:] >= 0
    assert (sides <= (places.border[:, :-1] >= 0)).all()  # nearest first, then -1


def test_borders_are_the_planes_between_centroids() -> None:
    cells = Cells(mean=np.zeros(2, np.float32), centroids=np.array([[1, 0], [0, 1], [-1, 0]], np.float32))
    z = unit_rows(np.array([[1, 0.9], [1, 0.2], [0.2, 1], [-1, 0.99]]))
    places = cells.assign(z, 1 - 0.1**2 / 2 * 4, CPU)  # so that rows within 0.1 of a plane are on the border
    assert places.home.tolist() == [0, 0, 1, 2]
    assert places.border[:, 0].tolist() == [1, -1, -1, 1]
    assert (places.border[:, 1:] == -1).all()


def test_cells_that_are_much_larger_than_others_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    z = clustered(4000, 16, clusters=5, spread=0.3)
    largest = {}
    for giant in (8, 1.2):
        monkeypatch.setattr(neighbours, "GIANT", giant)
        cells = train_cells(z.copy(), 40)
        assert len(cells.centroids) == 40 if giant == 8 else 40 < len(cells.centroids) < 200
        largest[giant] = np.bincount(cells.assign(z, 0.99, CPU).home).max()
    assert largest[1.2] <= 1.5 * len(z) / 40 < largest[8]


def test_copies_of_one_row_end_the_splitting() -> None:
    z = np.repeat(unit_rows(np.random.default_rng(0).normal(size=(2, 8))), 1000, axis=0)
    cells = train_cells(z.copy(), 20)
    assert np.isfinite(cells.centroids).all()
    assert len(cells.centroids) < 400
    same = np.repeat(unit_rows(np.ones((1, 8))), 100, axis=0)
    assert set(train_cells(same.copy(), 20).assign(same, 0.95, CPU).home.tolist()) == {0}


@pytest.mark.parametrize("rows", [0, 1, 3, 7])
def test_a_sample_that_is_too_small_makes_one_cell(rows: int) -> None:
    z = unit_rows(np.random.default_rng(0).normal(size=(rows, 8)))
    cells = train_cells(z.copy(), 20)
    places = cells.assign(z, 0.9, CPU)
    assert (len(cells.centroids), places.home.tolist(), bool(places.beyond.any())) == (1, [0] * rows, False)
    stored = Cells.from_array(cells.to_array())
    assert np.array_equal(stored.mean, cells.mean)


def test_cells_grow_with_the_root_and_the_sample_stays_bounded() -> None:
    assert [cell_count(rows) for rows in (0, 8192, 10_000, 1_000_000, 10**12)] == [1, 1, 50, 500, 8192]
    assert sample_share(8192, 1) == 0
    assert sample_share(10_000, 50) == 0.5
    assert sample_share(100, 50) == 1
    assert sample_share(10**9, 8192) * 10**9 == 2**18


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_find_what_the_whole_product_holds(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    inner = data.draw(st.integers(0, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    z, t = (clustered(n, 6, clusters=4, spread=0.4, seed=int(rng.integers(99))) for _ in range(2))
    fresh = rng.random(n) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    alone = rng.random(n) < 0.2
    caption = data.draw(st.sampled_from([None, 0.7]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "TILE", data.draw(st.integers(1, 20)))
        patch.setitem(neighbours.VERIFIED, "cpu", 7)
        found = list(
            near_pairs(
                torch.from_numpy(z),
                None if caption is None else torch.from_numpy(t),
                Threshold(image=0.9, caption=caption),
                inner=inner,
                fresh=torch.from_numpy(fresh),
                images_alone=torch.from_numpy(alone),
            )
        )
    pairs = [pair for i, j, _ in found for pair in zip(i.tolist(), j.tolist(), strict=True)]
    assert len(pairs) == len(set(pairs))
    captions = whole(t, 0.7 if caption else -2)
    assert set(pairs) == {
        (i, j)
        for i, j in whole(z, 0.9)
        if i < inner and (fresh[i] or fresh[j]) and ((i, j) in captions or alone[i] or alone[j])
    }
    for i, j, cosine in found:
        assert np.allclose(cosine, (z[i] * z[j]).sum(axis=1), atol=1e-6)
