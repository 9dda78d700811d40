"""`curate.jest` against the paper's listing written out literally, and against what must hold of any joint draw."""

import multiprocessing
from datetime import timedelta

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curate import jest, logits
from curate.jest import Embeddings, SubBatch, diagonal_losses, jointly_sample_batch, sub_batch_learnability
from tests.oracles.jest_literal import batch_loss, gumbel_rows, sigmoid_literal, softmax_literal

LITERAL = {"sigmoid": sigmoid_literal, "softmax": softmax_literal}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def make_pool(B, *, D=96, clusters=64, spread=1.0, learner_noise=1.5, seed=0, dtype=torch.float64):
    """A learner and a better reference of the same clustered pairs, with the scales and biases of real models."""
    generator = seeded(seed)
    centres = torch.randn(clusters, D, generator=generator, dtype=torch.float64)
    pairs = centres[torch.randint(clusters, (B,), generator=generator)]
    pairs = pairs + spread * torch.randn(B, D, generator=generator, dtype=torch.float64)

    def embedded(noise, scale, bias):
        noisy = [pairs + noise * torch.randn(B, D, generator=generator, dtype=torch.float64) for _ in range(2)]
        return Embeddings(*(normalize(z, dim=1).to(dtype) for z in noisy), scale, bias)

    return embedded(learner_noise, 40.0, -12.0), embedded(0.7, 117.0, -12.9)


def as_arrays(model):
    return model.zimg.numpy(), model.ztxt.numpy(), model.logit_scale, model.logit_bias


def rows_of(model, rows):
    return Embeddings(model.zimg[rows], model.ztxt[rows], model.logit_scale, model.logit_bias)


def learnabilities(learner, reference, draws=3, **options):
    """Learnability per example of a few sub-batches, their mean."""
    found = []
    for seed in range(draws):
        drawn = jointly_sample_batch(learner, reference, generator=seeded(seed), **options)
        found.append(sub_batch_learnability(learner, reference, drawn.positions, loss=options.get("loss", "sigmoid")))
    return sum(found) / draws


# --- the literal listing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("loss", "gain"), [("sigmoid", 1.0), ("sigmoid", 100.0), ("softmax", 1.0)])
def test_draws_the_rows_of_the_papers_listing_in_its_order(loss, gain, dtype):
    B, b, n_chunks = 2_560, 512, 16
    learner, reference = make_pool(B, dtype=dtype)
    drawn = jointly_sample_batch(
        learner, reference, sub_batch_size=b, n_chunks=n_chunks, loss=loss, gain=gain, generator=seeded(7)
    )
    models = [(1, as_arrays(learner)), (-1, as_arrays(reference))]
    positions, seen = LITERAL[loss](models, [32] * n_chunks, gain, gumbel_rows(7, n_chunks, B))
    assert drawn.positions.tolist() == positions.tolist()
    assert drawn.chunks.tolist() == np.repeat(np.arange(n_chunks), 32).tolist()
    at_pick = np.concatenate([seen[i][positions[32 * i : 32 * (i + 1)]] for i in range(n_chunks)]) / gain
    # Absolute: scores reach the hundreds. torch's softplus(x) is x above 20, which costs up to 2e-9 a pair.
    np.testing.assert_allclose(drawn.scores.numpy(), at_pick, rtol=0, atol=1e-7 if dtype == torch.float64 else 3e-3)
    assert drawn.scores.dtype == dtype


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    B=st.integers(2, 60),
    loss=st.sampled_from(jest.LOSSES),
    criterion=st.sampled_from(jest.CRITERIA),
    gain=st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    tile=st.integers(1, 200),
)
def test_agrees_with_the_listing_at_every_size_criterion_and_tile(*, monkeypatch, data, B, loss, criterion, gain, tile):
    monkeypatch.setitem(logits.TILE_LOGITS, "cpu", tile)
    b = data.draw(st.integers(1, B))
    n_chunks = data.draw(st.integers(1, b))
    learner, reference = make_pool(B, D=8, clusters=5, seed=B)
    learner = Embeddings(learner.zimg[:, :5], learner.ztxt[:, :5], 9.0, -3.0)  # another width, rows of other norms
    drawn = jointly_sample_batch(
        learner,
        reference,
        sub_batch_size=b,
        n_chunks=n_chunks,
        loss=loss,
        criterion=criterion,
        gain=gain,
        generator=seeded(1),
    )
    signed = {"learnability": [1, -1], "easy_reference": [0, -1], "hard_learner": [1, 0]}[criterion]
    models = [(sign, as_arrays(m)) for sign, m in zip(signed, (learner, reference), strict=True) if sign]
    sizes = [len(part) for part in np.array_split(np.arange(b), n_chunks)]
    positions, _ = LITERAL[loss](models, sizes, gain, gumbel_rows(1, n_chunks, B))
    assert drawn.positions.tolist() == positions.tolist()
    assert torch.bincount(drawn.chunks, minlength=n_chunks).tolist() == sizes
    assert len(set(drawn.positions.tolist())) == b


@pytest.mark.parametrize("loss", jest.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_learnability_of_a_batch_is_the_difference_of_the_losses_one_trains_with(monkeypatch, loss, dtype):
    monkeypatch.setitem(logits.TILE_LOGITS, "cpu", 3_000)
    monkeypatch.setattr(jest, "COLUMNS_PER_TILE", 70)
    learner, reference = make_pool(400, dtype=dtype)
    rows = torch.randperm(400, generator=seeded())[:211]
    expected = [batch_loss(as_arrays(rows_of(m, rows)), loss) for m in (learner, reference)]
    found = sub_batch_learnability(learner, reference, rows, loss=loss)
    assert found == pytest.approx(expected[0] - expected[1], abs=1e-7 if dtype == torch.float64 else 3e-4)


def test_diagonal_losses_are_the_losses_of_batches_of_one():
    learner, _ = make_pool(20)
    one_by_one = [batch_loss(as_arrays(rows_of(learner, [row])), "sigmoid") for row in range(20)]
    assert diagonal_losses(learner, "sigmoid").tolist() == pytest.approx(one_by_one)
    cosines = (learner.zimg * learner.ztxt).sum(1)
    assert diagonal_losses(learner, "softmax").tolist() == pytest.approx((-40.0 * cosines).tolist())


# --- what must hold of the methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", jest.LOSSES)
def test_one_chunk_is_the_independent_method(loss):
    learner, reference = make_pool(300)
    options = {"sub_batch_size": 60, "loss": loss}
    joint = jointly_sample_batch(learner, reference, n_chunks=1, generator=seeded(), **options)
    alone = jointly_sample_batch(learner, reference, method="independent", generator=seeded(), **options)
    for name in ("positions", "chunks", "scores"):
        assert torch.equal(getattr(joint, name), getattr(alone, name))
    own = diagonal_losses(learner, loss) - diagonal_losses(reference, loss)
    assert torch.equal(alone.scores, own[alone.positions])
    many = jointly_sample_batch(learner, reference, n_chunks=16, generator=seeded(), **options)
    assert not torch.equal(joint.positions, many.positions)


@pytest.mark.parametrize("loss", jest.LOSSES)
@pytest.mark.parametrize("n_chunks", [3, 16, 40])
def test_joint_equals_independent_where_all_pairs_of_two_rows_score_alike(loss, n_chunks):
    # Image i is axis i; text i leans on it by cosine a_i and else on an axis of its own: every pair of two different
    # rows has cosine exactly 0, so the rows drawn add the same to every candidate.
    B = 60
    cosine = torch.linspace(-0.9, 0.9, B, dtype=torch.float64)[torch.randperm(B, generator=seeded())]
    axes = torch.eye(2 * B, dtype=torch.float64)
    ztxt = cosine[:, None] * axes[:B] + (1 - cosine[:, None] ** 2).sqrt() * axes[B:]
    reference = Embeddings(axes[:B], ztxt, 8.0, -3.0)
    options = {"sub_batch_size": 40, "loss": loss, "criterion": "easy_reference", "gain": 1e6}  # noise is nothing
    joint = jointly_sample_batch(None, reference, n_chunks=n_chunks, generator=seeded(), **options)
    alone = jointly_sample_batch(None, reference, method="independent", generator=seeded(), **options)
    assert joint.positions.tolist() == alone.positions.tolist() == cosine.argsort(descending=True)[:40].tolist()


def test_joint_equals_independent_on_a_rank_one_score_matrix():
    # No embeddings give score[i, j] = u_i · u_j exactly, since the sigmoid loss turns its sign on the diagonal: so the
    # scores enter at the seam between scoring and drawing.
    u = torch.rand(200, generator=seeded(), dtype=torch.float64) + 0.1
    share = jest._Share(200, u.device, None)

    class RankOne:
        def __init__(self):
            self.scores = u * u

        def extend(self, new):
            self.scores += 2 * u * u[new].sum()

    joint, alone = (jest._draw(RankOne(), share, sizes, 1e9, seeded()) for sizes in ([5] * 8, [40]))
    assert joint.positions.tolist() == alone.positions.tolist() == u.argsort(descending=True)[:40].tolist()


@pytest.mark.parametrize("loss", jest.LOSSES)
def test_easy_reference_is_learnability_under_a_learner_that_knows_nothing(loss):
    _, reference = make_pool(400)
    blank = Embeddings(torch.zeros(400, 3, dtype=torch.float64), torch.zeros(400, 3, dtype=torch.float64), 40.0, -2.0)
    options = {"sub_batch_size": 80, "loss": loss, "n_chunks": 8}
    easy = jointly_sample_batch(None, reference, criterion="easy_reference", generator=seeded(), **options)
    learnable = jointly_sample_batch(blank, reference, generator=seeded(), **options)
    assert easy.positions.tolist() == learnable.positions.tolist()


def test_the_model_that_a_criterion_leaves_out_is_not_read():
    learner, reference = make_pool(100)
    broken = Embeddings(learner.zimg * torch.nan, learner.ztxt, 40.0, -12.0)
    options = {"sub_batch_size": 32, "n_chunks": 4}
    for criterion, models in (
        ("easy_reference", [(None, reference), (broken, reference)]),
        ("hard_learner", [(learner, None), (learner, broken)]),
    ):
        without, with_broken = (
            jointly_sample_batch(*pair, criterion=criterion, generator=seeded(), **options) for pair in models
        )
        assert torch.equal(without.positions, with_broken.positions)


def test_uniform_scores_nothing_and_is_what_gain_zero_draws():
    learner, reference = make_pool(300)
    options = {"sub_batch_size": 60, "generator": seeded()}
    uniform = jointly_sample_batch(learner, None, method="uniform", **options)
    assert uniform.scores.tolist() == [0.0] * 60
    assert uniform.chunks.tolist() == [0] * 60
    flat = jointly_sample_batch(
        learner, reference, method="independent", gain=0.0, sub_batch_size=60, generator=seeded()
    )
    assert torch.equal(uniform.positions, flat.positions)


def test_a_draw_follows_the_softmax_of_gain_times_score():
    z = torch.eye(3, dtype=torch.float64)
    reference = Embeddings(z, z * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)[:, None], 4.0)
    generator, draws = seeded(), 4_000
    counts = torch.zeros(3)
    for _ in range(draws):
        drawn = jointly_sample_batch(
            None,
            reference,
            sub_batch_size=1,
            n_chunks=1,
            loss="softmax",
            criterion="easy_reference",
            gain=0.5,
            generator=generator,
        )
        counts[drawn.positions] += 1
    expected = torch.softmax(0.5 * 4.0 * torch.tensor([0.9, 0.5, 0.1]), 0)
    torch.testing.assert_close(counts / draws, expected, rtol=0, atol=0.03)  # 4 standard errors


# --- what joint selection is for (Figure 2) ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", jest.LOSSES)
def test_learnability_rises_with_the_filter_ratio_at_a_fixed_sub_batch(loss):
    learner, reference = make_pool(1_280)
    found = []
    for B in (128, 256, 640, 1_280):  # filter ratios 0, 0.5, 0.8, 0.9
        models = rows_of(learner, slice(B)), rows_of(reference, slice(B))
        found.append(learnabilities(*models, sub_batch_size=128, loss=loss))
    assert found == sorted(found)
    assert len(set(found)) == len(found)


def test_learnability_rises_with_the_number_of_chunks_on_crowded_data():
    learner, reference = make_pool(1_280, clusters=20, spread=0.6, learner_noise=0.8)
    by_chunks = [learnabilities(learner, reference, sub_batch_size=256, n_chunks=n) for n in (2, 4, 16, 64)]
    assert by_chunks == sorted(by_chunks)
    alone = learnabilities(learner, reference, sub_batch_size=256, method="independent")
    uniform = learnabilities(learner, reference, sub_batch_size=256, method="uniform")
    assert by_chunks[-1] > max(alone, uniform)


# --- hard inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "b", "n_chunks"), [(5_000, 1_000, 16), (1_000, 100, 7), (50, 50, 50), (16, 16, 1)])
def test_uneven_sizes_give_exactly_b_distinct_rows(B, b, n_chunks):
    learner, reference = make_pool(B, D=8)
    drawn = jointly_sample_batch(learner, reference, sub_batch_size=b, n_chunks=n_chunks, generator=seeded())
    assert len(set(drawn.positions.tolist())) == len(drawn.positions) == len(drawn.chunks) == len(drawn.scores) == b
    sizes = torch.bincount(drawn.chunks)
    assert len(sizes) == n_chunks
    assert sizes.max() - sizes.min() <= 1
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)


def test_sizes_are_exact_where_the_papers_float_formula_loses_rows():
    assert int(163_840 * (1 - 0.8) / 16) == 2_047
    assert jest._chunk_sizes(163_840 // 5, 16) == [2_048] * 16


@pytest.mark.parametrize("loss", jest.LOSSES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_are_never_drawn_and_touch_nobody_else(monkeypatch, loss, bad):
    B, b = 200, 80
    learner, reference = make_pool(B, D=16)
    noise = [row.copy() for row in gumbel_rows(7, 8, B)]
    broken = [3, 40, 77, 150, 199]
    for row in noise:
        row[broken] = -1e30  # the listing draws them as little as we must
    models = [(1, as_arrays(learner)), (-1, as_arrays(reference))]
    expected, _ = LITERAL[loss](models, [10] * 8, 1.0, noise)

    zimg, ztxt = learner.zimg.clone(), reference.ztxt.clone()
    zimg[broken[:2], 5] = bad
    zimg[broken[2]] = bad
    ztxt[broken[3:], 0] = bad
    learner = Embeddings(zimg, learner.ztxt, 40.0, -12.0)
    reference = Embeddings(reference.zimg, ztxt, 117.0, -12.9)
    options = {"sub_batch_size": b, "n_chunks": 8, "loss": loss}
    drawn = jointly_sample_batch(learner, reference, generator=seeded(), **options)
    assert drawn.positions.tolist() == expected.tolist()
    assert drawn.scores.isfinite().all()
    everything = jointly_sample_batch(learner, reference, sub_batch_size=B - 5, method="uniform", generator=seeded())
    assert set(everything.positions.tolist()) == set(range(B)) - set(broken)
    with pytest.raises(ValueError, match=r"finite embeddings and scores: expected 196, found 195 of 200; drop"):
        jointly_sample_batch(learner, reference, generator=seeded(), **(options | {"sub_batch_size": 196}))


def test_scores_that_overflow_are_refused_not_drawn():
    learner, reference = make_pool(40, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected 20, found 18 of 40; .* or lower sub_batch_size or gain"):
        jointly_sample_batch(learner, reference, sub_batch_size=20, gain=1e38, generator=seeded())


@pytest.mark.parametrize("loss", jest.LOSSES)
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_rows_are_drawn_by_the_noise_alone_and_ties_go_to_the_lower_row(monkeypatch, loss, value):
    z = torch.full((90, 16), value)  # zeros have no direction, and must do no harm
    model = Embeddings(z, z, 40.0, -12.0)
    options = {"sub_batch_size": 32, "n_chunks": 5, "loss": loss}
    drawn = jointly_sample_batch(model, model, generator=seeded(), **options)
    assert len(set(drawn.positions.tolist())) == 32
    monkeypatch.setattr(jest, "_gumbel", lambda size, _: torch.zeros(size, dtype=torch.float64))
    tied = jointly_sample_batch(model, model, generator=seeded(), **options)
    assert tied.positions.tolist() == list(range(32))


@pytest.mark.parametrize("loss", jest.LOSSES)
def test_permuted_rows_with_permuted_noise_give_the_same_pairs(monkeypatch, loss):
    learner, reference = make_pool(500)
    options = {"sub_batch_size": 100, "loss": loss}
    drawn = jointly_sample_batch(learner, reference, generator=seeded(), **options)
    order = torch.randperm(500, generator=seeded(1))
    draw_noise = jest._gumbel
    monkeypatch.setattr(jest, "_gumbel", lambda size, generator: draw_noise(size, generator)[order])
    shuffled = jointly_sample_batch(rows_of(learner, order), rows_of(reference, order), generator=seeded(), **options)
    assert order[shuffled.positions].tolist() == drawn.positions.tolist()
    torch.testing.assert_close(shuffled.scores, drawn.scores)


def test_the_noise_is_one_in_every_precision_and_standard_gumbel():
    noise = jest._gumbel(200_000, seeded())
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    drawn = [
        jointly_sample_batch(
            make_pool(64, dtype=dtype)[0], None, sub_batch_size=9, method="uniform", generator=seeded()
        )
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    ]
    assert all(torch.equal(drawn[0].positions, other.positions) for other in drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("loss", jest.LOSSES)
def test_half_precision_is_widened_not_computed_in(loss, dtype):
    halves = make_pool(300, dtype=dtype)
    floats = [Embeddings(m.zimg.float(), m.ztxt.float(), m.logit_scale, m.logit_bias) for m in halves]
    drawn, wide = (
        jointly_sample_batch(*models, sub_batch_size=60, loss=loss, generator=seeded()) for models in (halves, floats)
    )
    assert drawn.scores.dtype == torch.float32
    assert torch.equal(drawn.positions, wide.positions)
    assert torch.equal(drawn.scores, wide.scores)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, storage)
        return out


@pytest.mark.parametrize("loss", jest.LOSSES)
def test_no_tensor_is_larger_than_the_embeddings_or_a_tile(loss):
    B, D, b = 3_000, 32, 600
    learner, reference = make_pool(B, D=D, dtype=torch.float32)
    with LargestTensor() as largest:
        drawn = jointly_sample_batch(learner, reference, sub_batch_size=b, n_chunks=4, loss=loss, generator=seeded())
        sub_batch_learnability(learner, reference, drawn.positions, loss=loss)
        sub_batch_learnability(learner, reference, torch.arange(B), loss=loss)
    assert b * D < largest.elements <= max(B * D, logits.TILE_LOGITS["cpu"]) < b * b < B * B
    with LargestTensor() as largest:
        learner.zimg @ learner.ztxt.T
    assert largest.elements == B * B  # the check sees what it must forbid


# --- several processes share one super-batch -----------------------------------------------------------------------


def draws_of_ranks(folder, parts, **options):
    """What each of several processes draws, that hold these many rows of `make_pool(sum(parts))`."""
    FORK = multiprocessing.get_context("fork")

    def process(rank):
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(parts), timeout=timedelta(seconds=60)
        )
        here = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        models = [rows_of(model, here) for model in make_pool(sum(parts), dtype=options.pop("dtype", torch.float64))]
        try:
            drawn = jointly_sample_batch(*models, generator=seeded(), group=distributed.group.WORLD, **options)
            torch.save({name: getattr(drawn, name) for name in ("positions", "chunks", "scores")}, f"{folder}/{rank}")
        except ValueError as error:
            torch.save(str(error), f"{folder}/{rank}")
        distributed.destroy_process_group()

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(len(parts))]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    assert [each.exitcode for each in processes] == [0] * len(parts)
    return [torch.load(folder / str(rank)) for rank in range(len(parts))]


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ([150, 150], {"loss": "sigmoid"}),
        ([150, 150], {"loss": "softmax"}),
        ([7, 290, 3], {"loss": "sigmoid"}),  # chunks are larger than what a rank holds
        ([100, 100, 100], {"loss": "softmax", "criterion": "easy_reference", "n_chunks": 7}),
        ([299, 1], {"method": "independent"}),
        ([60, 240], {"method": "uniform"}),
    ],
)
def test_processes_that_share_a_super_batch_draw_what_one_would(tmp_path, parts, options):
    options = {"sub_batch_size": 120, "n_chunks": 5} | options
    alone = jointly_sample_batch(*make_pool(sum(parts)), generator=seeded(), **options)
    for drawn in draws_of_ranks(tmp_path, parts, **options):
        assert drawn["positions"].tolist() == alone.positions.tolist()
        assert drawn["chunks"].tolist() == alone.chunks.tolist()
        torch.testing.assert_close(drawn["scores"], alone.scores, rtol=1e-12, atol=1e-12)


def test_processes_share_half_precision_rows_exactly(tmp_path):
    options = {"sub_batch_size": 60, "n_chunks": 5}
    alone = jointly_sample_batch(*make_pool(200, dtype=torch.float16), generator=seeded(), **options)
    ours, others = draws_of_ranks(tmp_path, [120, 80], dtype=torch.float16, **options)
    assert ours["positions"].tolist() == others["positions"].tolist()
    assert ours["positions"][:12].tolist() == alone.positions[:12].tolist()
    assert torch.equal(ours["scores"], others["scores"])


def test_equal_keys_go_to_the_lower_row_whoever_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jest, "_gumbel", lambda size, _: torch.arange(size, dtype=torch.float64) // 100)
    for drawn in draws_of_ranks(tmp_path, [90, 210], sub_batch_size=130, method="uniform"):
        assert drawn["positions"].tolist() == [*range(200, 300), *range(100, 130)]


@pytest.mark.parametrize(
    ("parts", "b", "message"),
    [
        ([5, 5], 11, "sub_batch_size must be 1 to B = 10: found 11"),
        ([5, 0], 3, "every rank must hold a row of the super-batch: found [5, 0]; divide it evenly"),
    ],
)
def test_every_process_says_what_is_wrong(tmp_path, parts, b, message):
    for said in draws_of_ranks(tmp_path, parts, sub_batch_size=b, n_chunks=1):
        assert message in said


# --- errors --------------------------------------------------------------------------------------------------------


def pick(**options) -> SubBatch:
    learner, reference = make_pool(10, D=4)
    arguments = {"learner": learner, "reference": reference, "sub_batch_size": 4, "n_chunks": 2, "generator": seeded()}
    return jointly_sample_batch(**(arguments | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_batch_size": 0}, r"sub_batch_size must be 1 to B = 10: found 0; embed more rows"),
        ({"sub_batch_size": 11}, r"sub_batch_size must be 1 to B = 10: found 11; embed more rows"),
        ({"n_chunks": 0}, r"n_chunks must be 1 to sub_batch_size = 4: found 0; each chunk draws at least one row"),
        ({"n_chunks": 5}, r"n_chunks must be 1 to sub_batch_size = 4: found 5; each chunk draws at least one row"),
        ({"loss": "hinge"}, r"loss must be one of sigmoid, softmax: found 'hinge'"),
        ({"criterion": "easy"}, r"criterion must be one of learnability, easy_reference, hard_learner: found 'easy'"),
        ({"method": "gibbs"}, r"method must be one of joint, independent, uniform: found 'gibbs'"),
        ({"gain": float("nan")}, r"gain must be finite and at least 0: found nan; 0 is uniform"),
        ({"gain": -1.0}, r"gain must be finite and at least 0: found -1.0; 0 is uniform"),
        ({"learner": None}, r"learnability needs the learner: found None; pass its embeddings, or easy_reference"),
        ({"reference": None}, r"learnability needs the reference: found None; pass its embeddings, or hard_learner"),
        (
            {"criterion": "easy_reference", "reference": None},
            r"easy_reference needs the reference: found None; pass its embeddings, or hard_learner",
        ),
        ({"method": "uniform", "learner": None, "reference": None}, r"uniform needs .* found None twice; pass one"),
        ({"reference": make_pool(9, D=4)[1]}, r"must embed the same rows on one device: found B = \[9, 10\] on"),
    ],
)
def test_errors_of_a_draw_give_the_law_the_value_and_the_way_out(options, message):
    assert len(pick().positions) == 4
    with pytest.raises(ValueError, match=message):
        pick(**options)


Z = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((Z, Z[:2], 1.0), r"must both be \[B, D\]: found \[3, 2\] and \[2, 2\]; row i of each must embed pair i"),
        ((Z[0], Z[0], 1.0), r"must both be \[B, D\]: found \[2\] and \[2\]"),
        ((Z, Z.double(), 1.0), r"one floating dtype and one device: found torch.float32 on cpu and torch.float64 on"),
        ((Z.long(), Z.long(), 1.0), r"one floating dtype"),
        ((Z, Z, 0.0), r"logit_scale must be finite and above 0, logit_bias finite: found 0.0 and 0.0; pass the factor"),
        ((Z, Z, 1.0, float("inf")), r"found 1.0 and inf"),
    ],
)
def test_errors_of_embeddings_give_the_law_the_value_and_the_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(*fields)


def test_errors_of_measuring_a_batch():
    learner, reference = make_pool(10, D=4)
    with pytest.raises(
        ValueError, match=r"positions must be \[b\], b at least 1: found \[0\]; pass SubBatch.positions"
    ):
        sub_batch_learnability(learner, reference, torch.arange(0), loss="sigmoid")
    with pytest.raises(ValueError, match="loss must be one of"):
        diagonal_losses(learner, "hinge")
