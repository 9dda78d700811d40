"""Why a pair is in or out: what a candidate that was not chosen had to show for itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.embed.files import EMBEDDING_NONFINITE
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds.committed import open_rounds
from curate.rounds.explain import committed_rounds
from curate.rounds.manifest import steps_folder
from curate.rounds.trace import _not_selected, explain_uid
from curate.select.files import read_selected, selected_name
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")

LOSSES = ["learner_loss", "reference_loss"]
SIGNS = {"learnability": (1, -1), "hard_learner": (1, 0), "easy_reference": (0, -1)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=96, shards=2, seed=0, image_size=32)
    return folder


def committed(world: Path, root: Path, **selection: Any) -> tuple[Store, list[pa.Table], list[str]]:
    """A round: its selected files, and the uids of the rows that were candidates and were not chosen."""
    fields = {
        "root": str(root),
        "pool": {"path": str(world / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "selection": {"sub_batch_size": 8, "n_chunks": 4, "filter_ratio": 0.75} | selection,
    }
    store = Store(str(root))
    manifest = run_round(Recipe.model_validate(fields), base=world)
    steps = steps_folder(0, manifest.lineage["plan"])
    chosen = [read_selected(store, selected_name(steps, i))[0] for i in range(manifest.sub_batches)]
    curated = {
        key for file in manifest.files for key in pq.read_table(root / "rounds/r000000" / file.name)["key"].to_pylist()
    }
    keys = pq.ParquetDataset(world / "pool").read(columns=["key"])["key"].to_pylist()
    return store, chosen, [key for key in keys if key not in curated]


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param({"criterion": "learnability", "method": "independent"}, marks=pytest.mark.exhaustive),
        {"criterion": "learnability", "method": "independent", "super_batches": 1},  # the learner embeds only these
        {"criterion": "learnability", "method": "independent", "loss": "softmax"},
        pytest.param({"criterion": "hard_learner", "method": "independent"}, marks=pytest.mark.exhaustive),
        pytest.param({"criterion": "easy_reference", "method": "independent"}, marks=pytest.mark.exhaustive),
        {"criterion": "easy_reference", "method": "joint"},
    ],
    ids=lambda selection: "-".join(map(str, selection.values())),
)
def test_what_was_not_chosen_is_told_with_its_score(world: Path, tmp_path: Path, selection: dict[str, Any]) -> None:
    store, chosen, left = committed(world, tmp_path / "root", **selection)
    of_learner, of_reference = SIGNS[selection["criterion"]]

    def score(losses: dict[str, Any]) -> float:
        learner, reference = (losses[name] or 0.0 for name in LOSSES)
        return float(of_learner * learner + of_reference * reference)

    seen = 0
    for uid in left[::9]:
        (outcome,) = explain_uid(store, uid)[0]["rounds"]
        if outcome["outcome"] != "not_selected":
            assert outcome["outcome"] == "later_round"
            continue
        seen += 1
        assert (outcome["learner_loss"] is None) == (of_learner == 0)
        assert outcome["independent_score"] == pytest.approx(score(outcome), abs=1e-6)
        rows = chosen[outcome["sub_batch"]].to_pylist()
        assert outcome["least_chosen"] == pytest.approx(min(map(score, rows)), abs=1e-6)
        if selection["method"] == "independent":
            assert outcome["least_chosen"] == pytest.approx(min(row["score"] for row in rows), abs=1e-5)
    assert seen >= 2


@pytest.mark.parametrize("super_batches", [None, 1])
def test_the_losses_are_those_that_selection_saw(world: Path, tmp_path: Path, super_batches: int | None) -> None:
    """By asking for chosen rows as if they were not."""
    store, chosen, _ = committed(world, tmp_path / "root", criterion="learnability", super_batches=super_batches)
    (context,) = open_rounds(store, committed_rounds(store))
    for row in chosen[0].to_pylist():
        content = np.array([[row["content_low"], row["content_high"]]], np.uint64)
        cut = context.cut_of(row["shard"])
        assert cut is not None
        assert cut.sub_batches(content).tolist() == [0]
        found = _not_selected(store, context, context.pool.shards[row["shard"]], row["row"], chosen[0], cut.scope)
        assert [found[name] for name in LOSSES] == pytest.approx([row[name] for name in LOSSES], abs=1e-5)


def test_uniform_selection_scores_nothing(world: Path, tmp_path: Path) -> None:
    store, _, left = committed(world, tmp_path / "root", method="uniform")
    (outcome,) = explain_uid(store, left[0])[0]["rounds"]
    assert outcome["outcome"] == "not_selected"
    assert outcome["reference_loss"] > 0
    assert (outcome["learner_loss"], outcome["independent_score"], outcome["least_chosen"]) == (None, None, None)


def test_a_candidate_without_vectors_by_the_learner(world: Path, tmp_path: Path) -> None:
    store, _, left = committed(world, tmp_path / "root", criterion="learnability")
    story = explain_uid(store, left[0])[0]
    (name,) = [
        name
        for folder in store.list("embeddings")
        for name in store.list(folder)
        if Path(story["shard"]).stem in name
        and pq.read_schema(store.local_path(name)).field("zimg").type.list_size == 24
    ]
    table = pq.read_table(store.local_path(name))
    vectors = table["zimg"].to_pylist()
    vectors[story["row"]] = None
    index = table.schema.get_field_index("zimg")
    lost = table.set_column(index, table.schema.field("zimg"), pa.array(vectors, table.schema.field("zimg").type))
    pq.write_table(lost, store.local_path(name))
    (outcome,) = explain_uid(store, left[0])[0]["rounds"]
    assert outcome == {"round": 0, "sub_batch": story["rounds"][0]["sub_batch"], "outcome": EMBEDDING_NONFINITE}
    store.delete(name)
    (outcome,) = explain_uid(store, left[0])[0]["rounds"]
    assert (outcome["outcome"], outcome["learner_loss"], outcome["independent_score"]) == ("not_selected", None, None)
