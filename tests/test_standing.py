"""Where a learner stands, and `criterion = "auto"`: what it decides, that rounds do it, that they say so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from curate.errors import UserError
from curate.jest import Embeddings
from curate.jobs.check import check_recipe
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.tables import print_tables, round_tables
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds.explain import describe_round, summarize_rounds
from curate.rounds.manifest import Manifest, round_folder
from curate.rounds.plan import foreseen_selection
from curate.rounds.trace import explain_uid
from curate.select.draw import measure_standing, needs_learner
from curate.select.standing import Standing, as_decided
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]


def drawn(seed: int, n: int = 24, noise: float = 0.7) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    text = image + noise * torch.randn(n, 4, generator=generator)
    return Embeddings(normalize(image, dim=1), normalize(text, dim=1), 10.0)


def hits_by_loops(model: Embeddings) -> list[bool]:
    zimg, ztxt = model.zimg.numpy(), model.ztxt.numpy()
    found = []
    for queries, others in ((zimg, ztxt), (ztxt, zimg)):
        for i, query in enumerate(queries):
            own = float(np.dot(query, others[i]))
            found.append(all(float(np.dot(query, other)) < own for j, other in enumerate(others) if j != i))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_standing_is_what_loops_count(seed: int) -> None:
    learner, reference = drawn(seed + 1), drawn(seed + 100, noise=0.4)
    own, fixed = hits_by_loops(learner), hits_by_loops(reference)
    found = measure_standing(learner, reference)
    assert (found.pairs, found.learner, found.reference) == (24, sum(own) / 48, sum(fixed) / 48)
    assert found.shared == sum(a and b for a, b in zip(own, fixed, strict=True)) / sum(fixed)
    assert found.lead == pytest.approx(sum(b and not a for a, b in zip(own, fixed, strict=True)) / 48)
    assert 0 < found.lead < 1
    assert Standing.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("seed", range(3))
def test_a_tie_answers_nothing(seed: int) -> None:
    # Pairs that are there twice, of which a product may make cosines that differ in their last bits.
    z = normalize(torch.randn(200, 48, generator=torch.Generator().manual_seed(seed)), dim=1)
    twice, others = z.repeat_interleave(2, 0), torch.eye(400)
    found = measure_standing(Embeddings(twice, twice, 1.0), Embeddings(others, others, 1.0))
    assert (found.learner, found.reference, found.shared) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("pairs", [0, 1, 31])
def test_of_too_few_pairs_nothing_is_made(pairs: int) -> None:
    some = Embeddings(torch.eye(64)[:pairs], torch.eye(64)[:pairs], 1.0)
    assert measure_standing(some, some).decided == "easy_reference"


@pytest.mark.parametrize(
    ("learner", "reference", "shared", "decided"),
    [
        (0.0, 0.6, 0.0, "easy_reference"),
        (0.3, 0.6, 0.49, "easy_reference"),
        (0.3, 0.6, 0.5, "learnability"),
        (0.3, 0.149, 0.9, "easy_reference"),  # most of the pool is nothing that the reference is for
        (0.3, 0.151, 0.9, "learnability"),
        (0.3, 0.149, 1.0, "uniform"),
        (0.9, 0.3, 0.7, "learnability"),  # better on the whole, and yet there is something that it does not know
        (0.6, 0.6, 1.0, "uniform"),
        (0.6, 0.6, 0.995, "uniform"),
        (0.6, 0.6, 0.98, "learnability"),
        (0.0, 0.0, 1.0, "uniform"),  # a reference that knows nothing
        (0.0, 0.004, 0.0, "uniform"),
    ],
)
def test_what_is_decided(learner: float, reference: float, shared: float, decided: str) -> None:
    assert Standing(pairs=1000, learner=learner, reference=reference, shared=shared).decided == decided


SHARDS, ROWS, b = 8, 768, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "model.json")
    draw_pool(folder / "pool", rows=ROWS, shards=SHARDS, seed=0, image_size=32)
    return folder


def recipe(world: Path, root: Path, **selection: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "root": str(root),
            "pool": {"path": str(world / "pool"), "uid": "key"},
            "reference": {"model": "model.json"},
            "learner": {"model": "model.json"},
            "selection": {"sub_batch_size": b, "n_chunks": 4, "filter_ratio": 0.75, "super_batches": 2}
            | {"criterion": "auto"}
            | selection,
        }
    )


def foreign(monkeypatch: pytest.MonkeyPatch, found: Standing) -> None:
    """Models of random weights stand nowhere in particular."""
    monkeypatch.setattr("curate.pipelines.standing.measure_standing", lambda learner, reference: found)


STANDINGS = {
    "easy_reference": Standing(pairs=48, learner=0.1, reference=0.6, shared=0.1),
    "learnability": Standing(pairs=48, learner=0.5, reference=0.6, shared=0.8),
    "uniform": Standing(pairs=48, learner=0.6, reference=0.6, shared=1.0),
}


def rows_of(root: Path, manifest: Manifest) -> list[tuple[str, int]]:
    folder = root / round_folder(manifest.round)
    return [(file.name, (folder / file.name).stat().st_size) for file in manifest.files]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("decided", list(STANDINGS))
def test_a_round_chooses_as_its_recipe_would_say_outright(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decided: str
) -> None:
    outright = run_round(recipe(world, tmp_path / "outright", **as_decided(decided)), base=world)
    foreign(monkeypatch, STANDINGS[decided])
    made = recipe(world, tmp_path / "auto")
    found = run_round(made, base=world)
    assert rows_of(tmp_path / "auto", found) == rows_of(tmp_path / "outright", outright)
    assert found.quality["standing"] == STANDINGS[decided].to_json()
    # The learner embeds a sample, and a window only if it is to score it.
    store = Store(made.root)
    names = [name for folder in store.list("embeddings") for name in store.list(folder)]
    scored = [name for name in names if "/window-" in name]
    assert bool(scored) == (decided == "learnability")
    assert any("/sample-" in name for name in names)
    assert (found.learnability[0] is not None) == (decided == "learnability")
    # What was decided is told, and is what the next round is foreseen to do.
    said = {"uniform": "uniform"}.get(decided, f"joint {decided}")
    assert summarize_rounds(store)[0]["chosen_by"] == said
    assert describe_round(store, 0)["chosen_by"] == said
    likely = foreseen_selection(store, made)
    assert likely.model_dump() == made.selection.model_dump() | as_decided(decided)
    assert needs_learner(likely) == (decided == "learnability")


@pytest.mark.usefixtures("without_ray")
def test_a_round_that_is_finished_later_decides_as_it_was_begun(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(world, tmp_path / "root")
    foreign(monkeypatch, STANDINGS["easy_reference"])
    with monkeypatch.context() as patch:
        patch.setattr("curate.pipelines.round.place_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_round(made, base=world)
    foreign(monkeypatch, STANDINGS["learnability"])
    found = run_round(made, base=world)
    assert found.quality["standing"]["decided"] == "easy_reference"
    print_tables(round_tables(describe_round(Store(made.root), 0)))
    assert "chosen by: joint easy_reference" in capsys.readouterr().out
    # Why a row is in or out is told by what was decided.
    keys = pq.read_table(world / "pool", columns=["key"])["key"].to_pylist()
    rounds = [told for key in keys for row in explain_uid(Store(made.root), key) for told in row["rounds"]]
    behind = [told for told in rounds if told["outcome"] == "not_selected"]
    assert len(behind) == 2 * 3 * b
    assert all(told["independent_score"] == -told["reference_loss"] for told in behind)


@pytest.mark.usefixtures("without_ray")
def test_what_of_the_sample_is_gone_is_made_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(world, tmp_path / "root")
    foreign(monkeypatch, STANDINGS["easy_reference"])
    with monkeypatch.context() as patch:
        patch.setattr("curate.pipelines.round.measure_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_round(made, base=world)
    (sample,) = (tmp_path / "root/embeddings").glob("*/sample-*")
    for file in sample.iterdir():
        file.unlink()
    assert run_round(made, base=world).quality["standing"]["decided"] == "easy_reference"


@pytest.mark.usefixtures("without_ray")
def test_auto_and_uniform_batches_are_uniform_batches(world: Path, tmp_path: Path) -> None:
    plain = run_round(recipe(world, tmp_path / "plain", criterion="learnability", method="uniform"), base=world)
    made = recipe(world, tmp_path / "auto", method="uniform")
    found = run_round(made, base=world)
    assert rows_of(tmp_path / "auto", found) == rows_of(tmp_path / "plain", plain)
    assert found.quality["standing"] is None
    store = Store(made.root)
    assert summarize_rounds(store)[0]["chosen_by"] == "uniform"
    key = pq.read_table(world / "pool", columns=["key"])["key"][0].as_py()
    assert explain_uid(store, key)[0]["rounds"][0].get("independent_score") is None
    assert not any("probably" in line for line in check_recipe(made, base=world, measure=False))


@pytest.mark.usefixtures("without_ray")
def test_a_learner_without_a_sound_vector_is_told(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curate.pipelines.standing.Candidates.finite_rows", lambda _: np.arange(0))
    with pytest.raises(UserError, match=r"round 0: expected finite embeddings of \d+ sampled pairs, found none"):
        run_round(recipe(world, tmp_path / "root"), base=world)


@pytest.mark.usefixtures("without_ray")
def test_standing_is_measured_wherever_a_learner_is_scored(world: Path, tmp_path: Path) -> None:
    # Learner and reference are the same random weights: whatever the reference answers, the learner does.
    found = run_round(recipe(world, tmp_path / "root", criterion="learnability"), base=world)
    where = found.quality["standing"]
    assert where["learner"] == where["reference"]
    assert where["shared"] == 1.0
    assert where["pairs"] == SHARDS * ROWS // SHARDS // 16
    assert (
        run_round(recipe(world, tmp_path / "easy", criterion="easy_reference"), base=world).quality["standing"] is None
    )
    assert run_round(recipe(world, tmp_path / "auto"), base=world).quality["standing"]["decided"] == "uniform"


@pytest.mark.usefixtures("without_ray")
def test_a_learner_of_random_weights_is_foreseen_to_begin_with_easy_reference(world: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    made = recipe(world, tmp_path / "root")
    assert foreseen_selection(store, made).criterion == "easy_reference"
    pretrained = made.model_copy(update={"learner": made.learner.model_copy(update={"pretrained": "weights"})})
    assert foreseen_selection(store, pretrained).criterion == "learnability"
    easy = recipe(world, tmp_path / "root", criterion="hard_learner")
    assert foreseen_selection(store, easy) is easy.selection
