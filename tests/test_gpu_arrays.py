"""Selection and dedup on a CUDA device against a CPU: `make test-gpu`."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, softplus

from curate import jest, logits
from curate.dedup import neighbours
from curate.dedup.neighbours import Threshold, near_pairs, normalized, train_cells
from curate.jest import Embeddings, SubBatch, jointly_sample_batch, sub_batch_loss

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
LOSSES = pytest.mark.parametrize("loss", jest.LOSSES)


def rows(n: int, D: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def models(B: int, dtype: torch.dtype, D: int = 96) -> tuple[Embeddings, Embeddings]:
    """A learner and a better reference of the same clustered pairs, on the CPU."""
    centres = rows(40, D, 0)[torch.randint(40, (B,), generator=torch.Generator().manual_seed(1))]
    pairs = centres + 0.6 * rows(B, D, 2)

    def embedded(seed: int, noise: float, scale: float, bias: float) -> Embeddings:
        towers = (normalize(pairs + noise * rows(B, D, seed + side), dim=1).to(dtype) for side in (0, 1))
        return Embeddings(*towers, scale, bias)

    return embedded(3, 1.0, 40.0, -12.0), embedded(5, 0.5, 117.0, -12.9)


def moved(model: Embeddings, device: torch.device, dtype: torch.dtype | None = None) -> Embeddings:
    zimg, ztxt = (z.to(device, dtype or z.dtype) for z in (model.zimg, model.ztxt))
    return Embeddings(zimg, ztxt, model.logit_scale, model.logit_bias)


def draw(pair: tuple[Embeddings, Embeddings], **how: object) -> SubBatch:
    return jointly_sample_batch(*pair, generator=torch.Generator().manual_seed(7), **how)  # type: ignore[arg-type]


# --- selection -----------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize(("B", "c", "D"), [(1, 1, 8), (1000, 300, 96), (513, 2048, 512), (4096, 129, 768), (70, 5, 72)])
def test_reduced_logits_are_those_of_float64(monkeypatch, fused, dtype, B, c, D):
    if fused and not logits.HAS_TRITON:
        pytest.skip("no Triton here")
    monkeypatch.setattr(logits, "HAS_TRITON", fused)
    z, columns = (rows(n, D, seed).to(dtype) for n, seed in ((B, 1), (c, 2)))
    for scale, bias in ((40.0, -12.0), (117.0, 2.0)):
        exact = scale * (z.double() @ columns.double().T)
        sums, lse = torch.ones(B, device=CUDA), torch.full((B,), 3.0, device=CUDA)
        logits.add_softplus_(sums, z.to(CUDA), columns.to(CUDA), scale=scale, bias=bias, sign=-1)
        logits.add_logsumexp_(lse, z.to(CUDA), columns.to(CUDA), scale=scale)
        expected = softplus(exact + bias, threshold=60).sum(1)
        torch.testing.assert_close(1 - sums.cpu().double(), expected, rtol=2e-5, atol=2e-5)
        expected = torch.logaddexp(exact.logsumexp(1), torch.tensor(3.0, dtype=torch.float64))
        torch.testing.assert_close(lse.cpu().double(), expected, rtol=2e-5, atol=2e-5)


@LOSSES
def test_a_draw_in_float64_is_the_cpus(loss):
    both = models(2_560, torch.float64)
    how = {"sub_batch_size": 512, "loss": loss}
    ours = draw(tuple(moved(model, CUDA) for model in both), **how)
    theirs = draw(both, **how)
    assert ours.positions.tolist() == theirs.positions.tolist()
    torch.testing.assert_close(ours.scores.cpu(), theirs.scores, rtol=1e-9, atol=1e-9)


@LOSSES
@HALVES
def test_a_draw_in_half_precision_has_the_scores_of_float64_given_its_rows(loss, dtype):
    """Rows may differ from a CPU's, as one rounding moves all later picks; scores given the same rows may not."""
    both = models(2_560, dtype)
    on_cuda = tuple(moved(model, CUDA) for model in both)
    drawn = draw(on_cuda, sub_batch_size=512, n_chunks=8, loss=loss)
    assert len(set(drawn.positions.tolist())) == 512
    again = draw(on_cuda, sub_batch_size=512, n_chunks=8, loss=loss)
    assert torch.equal(drawn.positions, again.positions)
    assert torch.equal(drawn.scores, again.scores)
    alone = draw(tuple(moved(model, CPU, torch.float64) for model in both), sub_batch_size=512, n_chunks=8, loss=loss)
    assert drawn.positions[:64].tolist() == alone.positions[:64].tolist()  # the first chunk depends on no pick
    exact = [(sign, moved(model, CPU, torch.float64)) for sign, model in zip((1, -1), both, strict=True)]
    conditional = jest._Conditional(exact, loss, jest._Share(2_560, CPU, None))
    positions = drawn.positions.cpu()
    for chunk in range(8):
        at = positions[64 * chunk : 64 * (chunk + 1)]
        found = drawn.scores[64 * chunk : 64 * (chunk + 1)].cpu().double()
        torch.testing.assert_close(found, conditional.scores[at], rtol=1e-4, atol=5e-3)
        conditional.extend(at)


@LOSSES
def test_measured_losses_are_the_cpus(loss):
    learner, _ = models(700, torch.float16)
    positions = torch.randperm(700, generator=torch.Generator().manual_seed(0))[:333]
    ours = sub_batch_loss(moved(learner, CUDA), positions.to(CUDA), loss=loss)
    assert ours == pytest.approx(sub_batch_loss(moved(learner, CPU, torch.float64), positions, loss=loss), rel=1e-5)


def test_the_draws_do_not_wait_for_the_device():
    both = tuple(moved(model, CUDA) for model in models(2_560, torch.float16))

    def waits(n_chunks: int) -> int:
        draw(both, sub_batch_size=512, n_chunks=n_chunks)  # what is set up once may wait
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                draw(both, sub_batch_size=512, n_chunks=n_chunks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in found)

    assert waits(16) == waits(4)


def test_broken_rows_are_left_out_on_the_device_too():
    learner, reference = (moved(model, CUDA) for model in models(200, torch.float16))
    learner.zimg[3, 5], reference.ztxt[77] = torch.nan, torch.inf
    drawn = draw((learner, reference), sub_batch_size=198)
    assert set(range(200)) - set(drawn.positions.tolist()) == {3, 77}
    assert drawn.scores.isfinite().all()
    with pytest.raises(ValueError, match="expected 199, found 198 of 200"):
        draw((learner, reference), sub_batch_size=199)


# --- near-duplicates -----------------------------------------------------------------------------------------------


def test_rows_are_normalized_to_the_last_bit():
    z = (rows(3_000, 512, 0) * torch.linspace(0.9, 1.1, 3_000)[:, None]).half()
    assert torch.equal(normalized(z), normalized(z.to(CUDA)).cpu())


@pytest.mark.parametrize("room", [2**22, 500])
@pytest.mark.parametrize("captions", [None, 0.7])
def test_near_pairs_are_the_cpus(monkeypatch, room, captions):
    monkeypatch.setattr(neighbours, "FOUND", room)
    rng = np.random.default_rng(0)
    n, D, inner = 3_000, 64, 2_500
    z, t = (
        normalized((rows(60, D, seed)[rng.integers(60, size=n)] + 0.25 * rows(n, D, seed + 1)).half())
        for seed in (0, 2)
    )
    fresh, alone = (torch.from_numpy(rng.random(n) < share) for share in (0.4, 0.1))
    threshold = Threshold(image=0.93, caption=captions)

    def found(device: torch.device) -> dict[tuple[int, int], float]:
        by = near_pairs(
            z.to(device),
            None if captions is None else t.to(device),
            threshold,
            inner=inner,
            fresh=fresh.to(device),
            images_alone=alone.to(device),
        )
        return {(int(a), int(b)): float(c) for i, j, cosine in by for a, b, c in zip(i, j, cosine, strict=True)}

    ours, theirs = found(CUDA), found(CPU)
    assert len(theirs) > 1_000
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[pair] - theirs[pair]) for pair in theirs) < 1e-7


def test_a_pair_at_the_threshold_is_kept_and_one_below_it_is_not():
    """Half precision would mistake many: exact cosines decide."""
    generator = torch.Generator().manual_seed(0)
    x = rows(2_000, 512, 0)
    other = rows(2_000, 512, 1)
    other = normalize(other - (other * x).sum(1, keepdim=True) * x, dim=1)
    cosine = 0.95 + 1e-4 * (torch.rand(2_000, 1, generator=generator, dtype=torch.float64) - 0.5)
    z = normalized(torch.cat([x, cosine * x + (1 - cosine**2).sqrt() * other]).half()).to(CUDA)
    every = torch.ones(len(z), dtype=torch.bool, device=CUDA)
    by = near_pairs(z, None, Threshold(image=0.95), inner=len(z), fresh=every, images_alone=~every)
    found = {(int(a), int(b)) for i, j, _ in by for a, b in zip(i, j, strict=True)}
    exact = (z[:2_000].double() * z[2_000:].double()).sum(1).float()
    assert found == {(i, i + 2_000) for i in (exact >= 0.95).nonzero().squeeze(1).tolist()}
    assert 500 < len(found) < 1_500


def test_rows_lie_in_the_cells_that_a_cpu_finds():
    z = (rows(40, 64, 0)[torch.arange(9_000) % 40] + 0.5 * rows(9_000, 64, 1)).half().numpy()
    cells = train_cells(neighbours.unit_rows(z), 60)
    ours, theirs = (cells.place(z, 0.95, device) for device in (CUDA, CPU))
    assert (ours.home == theirs.home).mean() > 0.999
    assert (ours.border == theirs.border).mean() > 0.999
