"""The study on frozen features: its draws are the product's, its worlds are as dirty as they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.heads.draws import draw_jointly
from benchmarks.heads.learner import Arm, Heads, draw, recall_at_1, run, super_batches, train_uniformly
from benchmarks.heads.report import difference, write_report
from benchmarks.heads.study import ARMS
from benchmarks.heads.worlds import WORLDS, Pairs, make_world
from curate.jest import Embeddings, jointly_sample_batch
from curate.recipe import SelectionSection
from curate.seeds import derive_seed
from curate.select.draw import Candidates, Scale, select_sub_batch
from curate.select.windows import key_order, keyed_rows

SEED, B, b = 3, 320, 32
DRAWN = [name for name in WORLDS if name != "pictures"]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return make_world("concepts", seed=1, dirt=0.3).pool.take(torch.arange(4000))


def embeddings_of(model: Heads, pairs: Pairs) -> Embeddings:
    return model.embed(pairs.image, pairs.text)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("criterion", ["learnability", "easy_reference", "hard_learner"])
@pytest.mark.parametrize("method", ["joint", "independent"])
def test_rows_are_those_that_the_product_picks(pairs, method, criterion, loss) -> None:
    learner, reference = Heads(0), Heads(1)
    arm = Arm(method=method, criterion=criterion, loss=loss, gain=3.0, filter_ratio=0.9, batch=b)
    assert arm.super_batch == B
    content = np.arange(2 * B, dtype=np.uint64).reshape(B, 2)
    walked = keyed_rows(content, 0, np.arange(B), seed=SEED, epoch=0)
    walked = walked[key_order(walked)]
    candidates = pairs.take(torch.from_numpy(walked["row"].astype(np.int64)))

    def stored(model: Heads) -> tuple[np.ndarray, np.ndarray]:
        found = embeddings_of(model, candidates)
        return found.zimg.half().numpy(), found.ztxt.half().numpy()

    def scale(model: Heads) -> Scale:
        found = embeddings_of(model, candidates)
        return Scale(logit_scale=found.logit_scale, logit_bias=found.logit_bias)

    table, _ = select_sub_batch(
        Candidates(rows=walked, learner=stored(learner), reference=stored(reference)),
        SelectionSection(
            method=method, criterion=criterion, loss=loss, gain=3.0, sub_batch_size=b, filter_ratio=0.9, n_chunks=16
        ),
        learner=scale(learner),
        reference=scale(reference),
        seed=SEED,
        round_number=7,
        sub_batch=2,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(derive_seed(SEED, "draw", 7, 2))
    own = None if criterion == "easy_reference" else embeddings_of(learner, candidates)
    positions = draw(arm, criterion, own, embeddings_of(reference, candidates), generator)
    assert walked["row"][positions.numpy()].tolist() == table["row"].to_pylist()


@pytest.mark.parametrize("n_chunks", [1, 4, 16])
def test_a_literal_draw_is_the_product_s(pairs, n_chunks) -> None:
    candidates = pairs.take(torch.arange(B))
    models = [embeddings_of(model, candidates) for model in (Heads(0), Heads(1))]
    how = {"n_chunks": n_chunks, "gain": 3.0}
    literal = draw_jointly(*models, size=b, terms="all", generator=torch.Generator().manual_seed(SEED), **how)
    generator = torch.Generator().manual_seed(SEED)
    product = jointly_sample_batch(*models, sub_batch_size=b, generator=generator, **how)
    assert torch.equal(literal, product.positions)


def test_false_negatives_are_left_out(pairs) -> None:
    # Rows in two copies: to a reference that knows them, each is a match of the other.
    once = torch.randn(B // 2, 32, generator=torch.Generator().manual_seed(SEED))
    twice = torch.nn.functional.normalize(once, dim=1).repeat_interleave(2, 0)
    reference = Embeddings(twice, twice, logit_scale=50.0, logit_bias=-40.0)
    learner = embeddings_of(Heads(0), pairs.take(torch.arange(B)))
    how = {"size": 64, "n_chunks": 64, "gain": 0.0}

    def copies(terms) -> int:
        rows = draw_jointly(learner, reference, terms=terms, generator=torch.Generator().manual_seed(SEED), **how)
        return 64 - len(torch.unique(rows // 2))

    assert copies("all") > 0
    assert copies("no false negatives") == 0


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("dirt", [pytest.param(0.3, marks=pytest.mark.exhaustive), 0.6])
def test_worlds_are_as_dirty_as_they_say(name, dirt) -> None:
    world, again = (make_world(name, seed=2, dirt=dirt) for _ in range(2))
    assert torch.equal(world.pool.text, again.pool.text)
    assert abs(float(world.pool.wrong.float().mean()) - dirt) < 0.01
    clean = make_world(name, seed=2, dirt=0.0)
    # What is not wrong is what it would be without dirt, and so are reference and held-out pairs.
    right = ~world.pool.wrong
    assert torch.equal(world.pool.image[right], clean.pool.image[right])
    assert torch.equal(world.pool.text[right], clean.pool.text[right])
    assert torch.equal(world.reference.text, clean.reference.text)
    assert torch.equal(world.held_out.image, clean.held_out.image)
    assert not torch.equal(world.pool.text, clean.pool.text)
    assert not clean.pool.wrong.any()
    assert not torch.equal(world.pool.image[:100], world.held_out.image[:100])


def test_an_epoch_has_each_row_once() -> None:
    walk = super_batches(torch.arange(100), 30, SEED)
    epochs = [torch.cat([next(walk) for _ in range(3)]) for _ in range(2)]
    assert all(len(torch.unique(epoch)) == 90 for epoch in epochs)
    assert not torch.equal(*epochs)


@pytest.fixture(scope="module")
def reference(pairs) -> Heads:
    model = Heads(9)
    train_uniformly(model, pairs.take(torch.where(~pairs.wrong)[0]), steps=300, batch=256, rate=3e-3, seed=0)
    return model


@pytest.mark.parametrize(
    ("changes", "looks"),
    [
        ({}, 20),
        ({"round_steps": 5}, 20),
        ({"round_steps": 5, "shuffled": True}, 20),
        ({"method": "super_batch"}, 20),
        ({"uniform_share": 0.5}, 10),
        ({"easy_steps": 10}, 10),
        ({"criterion": "auto"}, 0),  # the learner is at its start
        ({"terms": "normalised"}, 20),
        ({"terms": "no false negatives"}, 20),
        ({"rows": "filtered", "kept": 0.5, "method": "uniform"}, 0),
    ],
)
def test_arms_train_on_what_they_chose(pairs, reference, changes, looks) -> None:
    arm = replace(Arm(method="joint", filter_ratio=0.9, batch=b, steps=20), **changes)
    outcome = run(arm, pairs, pairs, start=Heads(0), reference=reference, reference_pairs=pairs, seed=SEED)
    uniform = run(
        Arm(batch=b, steps=20), pairs, pairs, start=Heads(0), reference=reference, reference_pairs=pairs, seed=SEED
    )
    assert uniform.wrong == pytest.approx(0.3, abs=0.06)
    assert outcome.wrong < uniform.wrong - 0.05
    assert outcome.operations == 3 * 20 * b + looks * B + 1024 * len(outcome.decided)
    assert uniform.unique == 20 * b


def test_the_reference_s_own_pairs(pairs, reference) -> None:
    own = pairs.take(torch.where(~pairs.wrong)[0])
    arm = Arm(rows="reference's", batch=b, steps=20)
    assert run(arm, pairs, pairs, start=Heads(0), reference=reference, reference_pairs=own, seed=SEED).wrong == 0


def test_recall_counts_pairs_of_one_label() -> None:
    image = torch.eye(64)[:4]
    pairs = Pairs(
        image=image, text=image, label=torch.tensor([0, 0, 1, 2]), concept=torch.arange(4), wrong=torch.zeros(4) > 0
    )

    class Same(Heads):
        def forward(self, image, text):
            return image, text[[1, 0, 3, 2]]

    assert recall_at_1(Same(0), pairs) == 0.5


def test_differences_are_paired_by_seed() -> None:
    records = [
        {"name": name, "seed": seed, "r1": seed / 10 + shift, "world": "concepts", "dirt": 0.3}
        for name, shift in (("a", 0.02), ("b", 0.0))
        for seed in (1, 2, 3)
    ]
    records[0]["r1"] += 0.01
    mean, half, seeds = difference(records, "a", "b", world="concepts") or (0, 0, 0)
    assert (round(mean, 5), seeds) == (0.02333, 3)
    assert half == pytest.approx(4.303 * np.std([0.03, 0.02, 0.02], ddof=1) / 3**0.5)
    assert difference(records, "a", "b", world="pictures") is None


def test_every_arm_has_as_many_tries() -> None:
    assert {len(tries) for _, tries in ARMS.values()} == {6}


def test_auto_is_compared_with_the_best_that_was_run(tmp_path) -> None:
    quality = {"joint easy-reference": 0.5, "joint learnability": 0.4, "uniform": 0.3, "auto": 0.45}
    common = {"world": "concepts", "dirt": 0.3, "wrong": 0.0, "mates": 0.0, "unique": 1, "operations": 1}
    common |= {"reference_r1": 0.8, "start_r1": 0.1}
    records = [
        common
        | {"name": f"random start, {name}", "seed": seed, "r1": r1 + seed / 100}
        | {"decided": ["easy_reference", "learnability"] if name == "auto" else []}
        for name, r1 in quality.items()
        for seed in (1, 2)
    ]
    records += [common | {"name": "auto", "seed": 1, "r1": 0.4, "decided": ["uniform"]}]
    records += [common | {"name": "uniform", "seed": 1, "r1": 0.4, "decided": []}]
    write_report(records, {}, tmp_path)
    lines = (tmp_path / "heads.md").read_text().splitlines()
    assert (
        "| `concepts` | at random | 30% | strong | 0.465 | joint easy-reference | -0.050 ± 0.000 | +0.150 ± 0.000 "
        "| easy_reference 50%, learnability 50% |"
    ) in lines
