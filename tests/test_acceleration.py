"""The benchmark's loop in one process is the product's loop, and its arithmetic is right."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.acceleration import loop as loop_module
from benchmarks.acceleration import study
from benchmarks.acceleration.config import PlanSection, load_study
from benchmarks.acceleration.flops import forward_flops, spent_flops
from benchmarks.acceleration.loop import ArmSection, Loop, Reference, embed
from benchmarks.acceleration.paid import saved, table
from benchmarks.acceleration.report import interval, ratio_text, reached, smoothed, summarise
from benchmarks.acceleration.sets import WANTED, SetSection, load_pairs, make_set
from curate.jobs.drawn_pool import COLOURS, SHAPES, draw_pair
from curate.jobs.train import train
from curate.models.create import create_model
from curate.models.encoder import load_encoder
from curate.models.learners import read_learner
from curate.models.resolution import set_resolution
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.reader.curated import CuratedReader
from curate.recipe import EncoderSection, Recipe, SelectionSection
from curate.rounds.manifest import read_manifest
from curate.select.draw import Scale
from curate.storage import Store
from tests.helpers import CPU, write_tiny

torch.set_num_threads(1)
HERE = Path(study.__file__).parent
ROUNDS, SUPER_BATCHES, b = 3, 6, 8


@pytest.mark.usefixtures("ray_local")
@pytest.mark.timeout(240)
@pytest.mark.exhaustive
@pytest.mark.parametrize(("smaller", "share"), [(None, 0.0), (16, 0.5)])
def test_the_loop_in_one_process_trains_on_the_batches_that_the_product_chooses(
    tmp_path: Path, smaller: int | None, share: float
):
    """Same rows in the same order and the same losses, while both learners learn from what they chose."""
    make_set(
        SetSection(source="drawn", rows=240, swapped_share=0.3, held_out_rows=8), tmp_path / "set", seed=3, data=None
    )
    write_tiny(tmp_path, "reference.json")
    write_tiny(tmp_path, "learner.json", embed_dim=24)
    recipe = Recipe.model_validate(
        {
            "root": str(tmp_path / "root"),
            "seed": 5,
            "pool": {"path": str(tmp_path / "set" / "pool"), "uid": "key"},
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json", "scoring_resolution": smaller},
            # All candidates are walked in each round, so that both embed the same rows in the same forward passes.
            "selection": {
                "sub_batch_size": b,
                "n_chunks": 4,
                "super_batches": SUPER_BATCHES,
                "filter_ratio": 0.8,
                "criterion": "learnability",
            },
            "train": {"learning_rate": 3e-3, "warmup_steps": 2, "approximate_share": share},
            "resources": {"workers": 1},
        }
    )
    losses = []
    for _ in range(ROUNDS):
        run_round(recipe, base=tmp_path)
        losses += train(recipe, base=tmp_path).losses
    chosen = [[int(uid) for uid in batch.uids] for batch in CuratedReader(recipe.root)]

    found = read_manifest(Store(recipe.root), 0)
    assert found is not None
    reference = load_encoder(Store(recipe.root), EncoderSpec(**found[0].lineage["reference"]), CPU)
    pool = load_pairs(tmp_path / "set" / "pool", reference)
    model, _, tokenizer = create_model(recipe.learner, role="learner", base=tmp_path, seed=recipe.seed)
    loop = Loop(
        pool,
        model,
        tokenizer,
        read_learner(Store(recipe.root), 0).encoder,
        Reference(
            vectors=embed(reference, pool, np.arange(len(pool))),
            scale=Scale(logit_scale=reference.spec.logit_scale, logit_bias=reference.spec.logit_bias),
        ),
        ArmSection(
            selection=recipe.selection,
            round_steps=SUPER_BATCHES,
            scoring_resolution=smaller,
            approximate_share=share,
        ),
        recipe.train,
        rows=np.arange(len(pool)),
        seed=recipe.seed,
        device=CPU,
    )
    again, again_losses = [], []
    for _, rows in zip(range(ROUNDS * SUPER_BATCHES), loop.batches(), strict=False):
        again.append(rows.tolist())
        again_losses.append(loop.train(rows))
    assert again == chosen
    assert again_losses == losses
    assert loop.account.learner_scored == loop.account.candidates == ROUNDS * 240


@pytest.fixture(scope="module")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of seconds, with all that a halted run carries over: rounds, an epoch's end, a dealt order, `auto`."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "small.toml"
    path.write_text(
        """
model = "small-clip.json"
evaluate_every = 4
[training]
learning_rate = 1e-3
warmup_steps = 2
[reference]
steps = 12
[selection]
sub_batch_size = 8
filter_ratio = 0.75
n_chunks = 4
[sets.drawn]
source = "drawn"
rows = 200
reference_rows = 64
held_out_rows = 20
[arms.uniform]
selection = { method = "uniform", filter_ratio = 0.0, n_chunks = 1 }
[arms.learnability]
selection = { criterion = "learnability" }
round_steps = 4
shuffled = true
[arms.auto]
selection = { criterion = "auto" }
round_steps = 4
[arms.approximate]
selection = { criterion = "learnability" }
scoring_resolution = 12
approximate_share = 0.25
round_steps = 4
[[plans]]
set = "drawn"
arms = ["learnability", "auto", "approximate"]
steps = 12
seeds = [1]
pool_seed = 3
""",
        encoding="utf-8",
    )
    return path


def test_a_study_that_is_halted_goes_on_where_it_was(
    small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_study(small_study)
    monkeypatch.setattr(loop_module, "SAMPLE_ROWS", 40)  # fewer than the pool's, of which the learner may know no other

    def jobs(out: str) -> list[study.Job]:
        return [
            study.Job(study=loaded, plan=loaded.plans[0], arm=arm, seed=1, out=tmp_path / out, data=None, device="cpu")
            for arm in ("uniform", "learnability", "auto")
        ]

    def told(job: study.Job) -> dict[str, Any]:
        timed = {"wall_s", "train_s", "score_s", "select_s", "total_s"}
        record = json.loads(job.path.read_text())
        record["curve"] = [{k: v for k, v in point.items() if k not in timed} for point in record["curve"]]
        return {k: v for k, v in record.items() if k not in timed}

    def train_in_pieces(step: Any, job: study.Job, path: Path) -> int:
        """Let time be up at each fifth step."""
        pieces = 0
        while not path.exists():
            asked = iter(range(6))
            monkeypatch.setattr(study, "_time_is_up", lambda asked=asked: next(asked) == 5)
            step(job)
            pieces += 1
        return pieces

    for whole, pieces in zip(jobs("whole"), jobs("pieces"), strict=True):
        monkeypatch.setattr(study, "_time_is_up", lambda: False)
        for job in (whole, pieces):
            study.make_pairs(job)
        for step in (study.train_reference, study.embed_reference, study.run):
            step(whole)
        if not pieces.reference_path.exists():
            assert train_in_pieces(study.train_reference, pieces, pieces.reference_path) == 3
        study.embed_reference(pieces)
        assert train_in_pieces(study.run, pieces, pieces.path) == 3
        assert told(pieces) == told(whole)
        assert not list((tmp_path / "pieces").rglob("*.halted"))
    decided = told(jobs("whole")[-1])["decided"]
    assert sum(decided.values()) == 3


@pytest.mark.exhaustive  # to import and to draw takes half a minute; how a study goes on is seen above
def test_time_that_is_up_is_told_and_the_same_command_goes_on(small_study: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.acceleration", str(small_study), "--out", str(tmp_path / "out")]
    halted = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True, check=False)
    assert (halted.returncode, halted.stderr.splitlines()[-1]) == (
        75, "time is up: 1 of 1 sets are left; the same command goes on"
    )  # fmt: skip


def test_a_web_like_pool_is_a_tenth_wanted_and_says_what_the_rest_is(tmp_path: Path):
    section = SetSection(source="web", rows=400, reference_rows=20, held_out_rows=20)
    make_set(section, tmp_path / "a", seed=1, data=None)
    make_set(section, tmp_path / "b", seed=1, data=None)
    rows = pq.read_table(tmp_path / "a" / "pool").to_pylist()
    assert rows == pq.read_table(tmp_path / "b" / "pool").to_pylist()
    assert Counter(row["kind"] for row in rows) == {
        WANTED: 40, "other_domain": 100, "boilerplate": 60, "near_miss": 60, "swapped": 100, "near_duplicate": 40
    }  # fmt: skip
    said = {kind: {row["caption"] for row in rows if row["kind"] == kind} for kind in {row["kind"] for row in rows}}
    assert len(said[WANTED]) > 35
    assert not any(word in caption for caption in said["boilerplate"] for word in SHAPES)
    assert all(caption.startswith(("a bar chart", "a clock")) for caption in said["other_domain"])
    assert len(said["near_duplicate"]) < 10 < len({row["jpg"] for row in rows if row["kind"] == "near_duplicate"})
    parts = [pq.read_table(tmp_path / "a" / part)["jpg"].to_pylist() for part in ("pool", "reference", "held-out")]
    assert not set(parts[0]) & set(parts[1]) | set(parts[0]) & set(parts[2]) | set(parts[1]) & set(parts[2])


def test_swapped_captions_have_their_share_and_crowded_concepts_few_words(tmp_path: Path):
    section = SetSection(source="drawn", rows=200, swapped_share=0.3, words=4, reference_rows=5, held_out_rows=5)
    make_set(section, tmp_path / "set", seed=1, data=None)
    pool = pq.read_table(tmp_path / "set" / "pool")
    assert Counter(pool["kind"].to_pylist()) == {"swapped": 60, WANTED: 140}
    words = Counter(word for caption in pool["caption"].to_pylist() for word in caption.replace(",", "").split())
    assert len([word for word in words if word in COLOURS and word != "white"]) == 4
    assert len([word for word in words if word in SHAPES]) == 4


def test_a_near_miss_differs_from_the_truth_in_one_colour():
    for row in range(20):
        jpg, caption = draw_pair(7, row)
        missed_jpg, missed = draw_pair(7, row, near_miss=True)
        assert missed_jpg == jpg
        changed = [(a, b) for a, b in zip(caption.split(), missed.split(), strict=True) if a != b]
        assert len(changed) == 1
        assert {word.strip(",") for word in changed[0]} <= set(COLOURS)


def run_of(*qualities: float, arm: str = "joint", seed: int = 0, flops: float = 1.0) -> dict[str, Any]:
    """A record whose smoothed curve is easily known: each quality is held for three points."""
    held = [quality for quality in qualities for _ in range(3)]
    curve = [
        {"step": i, "examples": 10 * i, "unique": 10 * i, "flops": 10 * i * flops, "wall_s": float(i), "r1": r1}
        for i, r1 in enumerate(held, 1)
    ]
    return {
        "arm": arm, "seed": seed, "curve": curve, "kinds": {}, "candidates": 0, "learner_scored": 0,
        "reference_flops": 0.0, "reference_quality": {"r1": 1.0},
    }  # fmt: skip


def test_the_cost_of_a_quality_is_where_the_smoothed_curve_reaches_it():
    assert smoothed([0.0, 3.0, 6.0, 9.0]) == [0.0, 1.5, 3.0, 6.0]
    run = run_of(0.3, 0.6)  # smoothed: .3 .3 .3 .4 .5 .6
    for quality, examples in ((0.3, 10), (0.4, 40), (0.45, 45), (0.6, 60), (0.15, 5)):
        assert reached(run["curve"], quality, lambda point: point["examples"]) == pytest.approx(examples)
    assert reached(run["curve"], 0.61, lambda point: point["examples"]) is None


def test_the_interval_is_students_of_the_logarithms():
    middle, low, high = interval([2.0, 8.0, 4.0])
    wide = math.exp(4.303 * math.log(2) / math.sqrt(3))  # logs of base 2: 1, 2, 3; their deviation is 1
    assert (middle, low, high) == pytest.approx((4.0, 4.0 / wide, 4.0 * wide), rel=1e-3)
    assert interval([2.0, None]) is None
    assert interval([3.0]) == (3.0, None, None)


def test_ratios_pair_each_seed_with_its_own_uniform_run():
    plan = PlanSection(set="drawn", arms=["joint"], steps=6, uniform_steps=12, seeds=[0, 1], pool_seed=1)
    runs = [
        run_of(0.0, 0.0, 0.0, 0.25, arm="uniform"),
        run_of(0.0, 0.0, 0.0, 0.5, arm="uniform", seed=1),
        run_of(0.25, 0.75, flops=4.0),
        run_of(0.125, 0.5, seed=1, flops=4.0),
    ]
    uniform, joint = summarise(plan, runs)
    assert joint["fewer_examples_by_seed"] == [12.0, 2.0]
    assert joint["fewer_examples_by_budget"]["12"] == joint["fewer_examples"]
    assert joint["fewer_flops_by_seed"] == [3.0, 0.5]
    assert joint["final_r1"] == [0.75, 0.5]
    assert uniform["final_r1"] == [0.0, 0.0]  # at equal steps, not at its own end
    assert uniform["fewer_examples"] == (1.0, 1.0, 1.0)
    with pytest.raises(KeyError):
        summarise(plan, runs[2:])


@pytest.mark.parametrize("name", ["quick.toml", "search.toml", "study.toml", "gpu.toml", "flexi.toml"])
def test_studies_are_sound_and_know_their_arms_and_sets(name: str):
    found = load_study(HERE / name)
    for plan in found.plans:
        assert plan.set in found.sets
        assert {"uniform", *plan.arms} <= set(found.arms)
        assert len(set(plan.seeds)) == len(plan.seeds)
        assert plan.steps % found.evaluate_every == 0
    assert found.arms["uniform"].selection.super_batch_size == found.arms["uniform"].selection.sub_batch_size


@pytest.mark.parametrize(
    ("name", "smaller"), [("small-clip.json", None), ("gpu-clip.json", None), ("gpu-clip.json", 32)]
)
def test_operations_of_a_forward_pass_are_those_that_torch_counts(name: str, smaller: int | None):
    config = json.loads((HERE / name).read_text())
    model, _, tokenizer = create_model(EncoderSection(model=name), role="learner", base=HERE, seed=0)
    if smaller is not None:
        set_resolution(model, smaller)
    side = smaller or config["vision_cfg"]["image_size"]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side), tokenizer(["a red circle"]))
    assert forward_flops(config, smaller) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_two_resolutions_are_the_papers_account():
    config = json.loads((HERE / "gpu-clip.json").read_text())
    F = forward_flops(config)
    A = forward_flops(config, 32) / F
    steps = {"trained": 1000, "scored": 5000}  # f = 0.8
    plain = spent_flops(config, trained=1000, trained_smaller=0, scored=0, smaller=None)
    full = spent_flops(config, **steps, trained_smaller=0, smaller=None)
    flexi = spent_flops(config, **steps, trained_smaller=500, smaller=32)
    assert plain == 1000 * 3 * F
    assert full / plain == pytest.approx(8 / 3)  # of which the paper's 7/3 leaves out the pass that training shares
    assert flexi == pytest.approx(1000 * (3 * F * (0.5 + 0.5 * A) + A * F * 5))
    assert flexi < full


def test_an_arm_with_a_share_wants_a_size():
    with pytest.raises(ValidationError, match="needs scoring_resolution"):
        ArmSection(selection=SelectionSection(sub_batch_size=16), approximate_share=0.5)


def test_what_is_saved_shrinks_with_what_the_reference_costs() -> None:
    def curve(*r1: float) -> list[list[float]]:
        return [[step, 10 * step, 100.0 * step, 1.0, value] for step, value in enumerate(r1, 1)]

    plan = {
        "runs": [
            {"arm": "uniform", "seed": 1, "curve": curve(0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.3, 0.3, 0.3)},
            {"arm": "joint", "seed": 1, "curve": curve(0.3, 0.3, 0.3)},
            {"arm": "never", "seed": 1, "curve": curve(0.1, 0.1, 0.1)},
        ]
    }
    # Uniform's quality at its end is .3, its smoothed curve is there after 900 operations, the arm's after 100.
    assert saved(plan, "joint", extra=0.0) == (9.0, None, None)
    assert saved(plan, "joint", extra=200.0) == (3.0, None, None)
    assert saved(plan, "never", extra=0.0) is None
    assert [ratio_text(saved(plan, arm, extra=0.0)) for arm in ("joint", "never")] == ["÷ 9.00", "–"]


def test_the_committed_study_can_be_paid_for() -> None:
    results = json.loads((HERE.parents[1] / "docs/acceleration/results.json").read_text())
    (line,) = [row for row in table(results).splitlines() if row.startswith("| `web` | joint easy-reference |")]
    assert line.split(" | ")[2].startswith("÷ 10.77 (7.45 to")  # as the study's own table has it
