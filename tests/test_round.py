"""A whole round: what is committed accounts for every row and does not depend on the way there.

The first goes through a real Ray, the others through the stand-in, whose files are the same.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from curate.dedup.files import read_dropped
from curate.embed.files import embedding_name, read_embeddings
from curate.errors import UserError
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.train import train
from curate.models.learners import newest_learner
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.pool.inventory import take_inventory
from curate.pool.shards import load_pool
from curate.reader.curated import CuratedReader
from curate.recipe import Recipe
from curate.rounds.explain import describe_round, summarize_rounds
from curate.rounds.manifest import Manifest, manifest_name, round_folder
from curate.rounds.plan import pin_plan
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

__all__ = ["without_ray"]

pytestmark = pytest.mark.usefixtures("without_ray")

ROWS, SHARDS, B_SMALL = 600, 5, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two model configurations and a drawn pool, one shard empty, of which every row's fate is known."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(
        folder / "pool",
        rows=ROWS,
        shards=SHARDS,
        seed=0,
        image_size=32,
        swapped_share=0.3,
        broken_share=0.02,
        duplicate_share=0.05,
    )
    first = sorted((folder / "pool").iterdir())[0]
    pq.write_table(pq.read_table(first).slice(0, 0), folder / "pool" / "empty.parquet")
    return folder


def recipe_of(world: Path, root: Path | str, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "root": str(root),
        "pool": {"path": str(world / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "selection": {"sub_batch_size": B_SMALL, "n_chunks": 4, "filter_ratio": 0.8, "criterion": "learnability"},
        "output": {"file_rows": 3 * B_SMALL},
        "resources": {"workers": 1},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            fields.setdefault(section, {})[field] = value
        else:
            fields[section] = value
    return Recipe.model_validate(fields)


@pytest.fixture(scope="module")
def committed(world: Path, ray_local: None) -> tuple[Recipe, Manifest]:
    """On Ray: of a wider scope than `without_ray`, it is made before that replaces Ray."""
    recipe = recipe_of(world, world / "root", resources__workers=2)
    return recipe, run_round(recipe, base=world)


@pytest.fixture
def warm(committed: tuple[Recipe, Manifest], tmp_path: Path) -> Path:
    """A root without rounds that holds the pool's embeddings already."""
    for name in ("embeddings", "models"):
        shutil.copytree(Path(committed[0].root) / name, tmp_path / "root" / name)
    return tmp_path / "root"


def curated(recipe: Recipe, manifest: Manifest) -> pa.Table:
    folder = Path(recipe.root) / round_folder(manifest.round)
    return pa.concat_tables([pq.read_table(folder / file.name) for file in manifest.files])


def manifest_bytes(recipe: Recipe, number: int = 0) -> bytes:
    return Store(recipe.root).read_bytes(manifest_name(number))


def truth(world: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((world / "pool").iterdir())])


def test_every_row_of_the_pool_is_accounted_for(world: Path, committed: tuple[Recipe, Manifest]) -> None:
    _, manifest = committed
    embed, dedup, window, select = manifest.tallies
    rows = truth(world)
    reasons = {r["values"]: r["counts"] for r in pc.value_counts(rows["broken"].drop_null()).to_pylist()}
    assert (embed.rows_in, embed.dropped) == (ROWS, reasons)
    assert dedup.dropped == {"duplicate_exact": ROWS - rows["duplicate_of"].null_count}
    candidates = ROWS - sum(reasons.values()) - dedup.dropped["duplicate_exact"]
    super_batches = candidates // (5 * B_SMALL)
    assert (window.rows_in, window.kept) == (candidates, super_batches * 5 * B_SMALL)
    assert select.dropped["not_selected"] == 4 * select.kept == 4 * super_batches * B_SMALL
    assert manifest.sub_batches == super_batches > 3


def test_curated_rows_are_those_of_the_pool(world: Path, committed: tuple[Recipe, Manifest]) -> None:
    table = curated(*committed)
    pool = {row["key"]: row for row in truth(world).to_pylist()}
    assert len({row["key"] for row in table.to_pylist()}) == len(table)
    for row in table.to_pylist():
        added = row.pop("curate")
        assert row == pool[added["uid"]]
        assert row["broken"] is None
    added = table["curate"].combine_chunks()
    size = committed[1].sub_batch_size
    assert added.field("position").to_pylist() == list(range(size)) * committed[1].sub_batches
    assert added.field("sub_batch").to_pylist() == np.repeat(range(committed[1].sub_batches), size).tolist()
    assert set(added.field("round").to_pylist()) == {0}


def test_running_a_round_again_returns_the_committed_manifest(world: Path, committed: tuple[Recipe, Manifest]) -> None:
    recipe, manifest = committed
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.root).rglob("*") if path.is_file()}
    assert run_round(recipe, base=world, number=0) == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(recipe.root).rglob("*") if path.is_file()} == before


def test_the_manifest_does_not_depend_on_workers_threads_or_place(
    world: Path, tmp_path: Path, committed: tuple[Recipe, Manifest]
) -> None:
    """Two actors on Ray, and two threads of one process that does one thing after the other."""
    other = recipe_of(world, tmp_path / "elsewhere", resources__threads=2)
    run_round(other, base=world)
    assert manifest_bytes(other) == manifest_bytes(committed[0])


def test_the_loop_goes_on_with_the_learner_that_was_trained(world: Path, committed: tuple[Recipe, Manifest]) -> None:
    recipe, first = committed
    trained = train(recipe, base=world)
    assert trained.steps == first.sub_batches
    second = run_round(recipe, base=world)
    store = Store(recipe.root)
    newest = newest_learner(store)
    assert newest is not None
    assert (newest.number, newest.next_batch) == (1, first.sub_batches)
    assert second.lineage["learner"]["model"] == newest.encoder.model != first.lineage["learner"]["model"]
    assert second.parent == hashlib.sha256(manifest_bytes(recipe)).hexdigest()
    # The pool was used up, so the second round is of a new epoch; the reference was not run again.
    assert second.lineage["windows"]["taken"]["epoch"] == first.lineage["windows"]["taken"]["epoch"] + 1
    batches = list(CuratedReader(recipe.root))
    assert [(batch.round, batch.sub_batch) for batch in batches] == [
        (manifest.round, i) for manifest in (first, second) for i in range(manifest.sub_batches)
    ]
    # What is said of their quality, by literal counts.
    contents = [
        {(r["jpg"], r["caption"]) for r in curated(recipe, manifest).to_pylist()} for manifest in (first, second)
    ]
    quality = second.quality
    assert (first.quality["unique_examples"], first.quality["chosen_again"]) == (len(contents[0]), 0)
    assert quality["unique_examples"] == len(contents[0] | contents[1])
    assert quality["chosen_again"] == pytest.approx(len(contents[0] & contents[1]) / len(contents[1]), abs=1e-6) != 0
    assert (first.quality["learner"], quality["learner"], quality["staleness_batches"]) == (0, 1, 0)
    losses = [loss - then for loss, then in zip(trained.losses, first.reference_loss, strict=True)]
    (entry,) = quality["trained"]
    assert (entry["round"], entry["batches"]) == (0, first.sub_batches)
    assert entry["realised"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert entry["chosen"] == pytest.approx(np.mean(first.learnability), abs=1e-6)
    assert first.quality["rank_correlation"] is None
    correlation = quality["rank_correlation"]
    assert correlation["learner"] == 0
    assert 15 < correlation["pairs"] < 60  # a sixteenth of the pool
    # One short training apart; how far depends on the machine's arithmetic. The formula has tests of its own.
    assert 0 < correlation["value"] < 1

    rows = summarize_rounds(store)
    assert [row["round"] for row in rows] == [0, 1]
    assert [row["realised_learnability"] for row in rows] == [entry["realised"], None]


def test_why_a_pair_is_in_or_out(world: Path, committed: tuple[Recipe, Manifest]) -> None:
    recipe, manifest = committed
    store = Store(recipe.root)
    rows = truth(world).to_pylist()
    chosen = curated(recipe, manifest).to_pylist()[17]
    (found,) = explain_uid(store, chosen["key"])
    first = found["rounds"][0]
    assert (found["shard"], found["row"]) == (chosen["curate"]["source_shard"], chosen["curate"]["source_row"])
    names = ("sub_batch", "position", "chunk", "score", "learner_loss", "reference_loss")
    assert first == {"round": 0, "outcome": "selected"} | {name: chosen["curate"][name] for name in names}

    broken = next(row for row in rows if row["broken"])
    (found,) = explain_uid(store, broken["key"])
    assert (found["status"], "rounds" in found) == (broken["broken"], False)

    copy = next(row for row in rows if row["duplicate_of"])
    (found,) = explain_uid(store, copy["key"])
    outcome = found["rounds"][0]
    assert outcome["outcome"] == "duplicate_exact"
    original = pq.read_table(world / "pool" / outcome["duplicate_of"]["shard"]).to_pylist()[
        outcome["duplicate_of"]["row"]
    ]
    assert (original["jpg"], original["caption"]) == (copy["jpg"], copy["caption"])

    kept = {row["key"] for row in curated(recipe, manifest).to_pylist()}
    left = next(row for row in rows if not row["broken"] and not row["duplicate_of"] and row["key"] not in kept)
    (found,) = explain_uid(store, left["key"])
    assert found["rounds"][0]["outcome"] in {"not_selected", "later_round"}
    with pytest.raises(UserError, match="none of the 600 rows"):
        explain_uid(store, "nobody")


def test_describe_round_is_json_and_complete(committed: tuple[Recipe, Manifest]) -> None:
    found = describe_round(Store(committed[0].root), 0)
    assert json.loads(json.dumps(found)) == found
    for key in (
        "recipe",
        "recipe_fingerprint",
        "reference",
        "learner",
        "pool",
        "windows",
        "index",
        "libraries",
        "python",
    ):
        assert found["lineage"][key]
    assert found["learnability"] > found["uniform_learnability"]


def learner_of(manifest: Manifest) -> EncoderSpec:
    return EncoderSpec(**{k: v for k, v in manifest.lineage["learner"].items() if k != "number"})


def test_small_rounds_take_each_row_of_an_epoch_once(world: Path, warm: Path) -> None:
    """Rounds of one super-batch score only their own candidates; an epoch of them never offers a row twice."""
    recipe = recipe_of(world, warm, selection__super_batches=1)
    store = Store(recipe.root)
    originals = {row["key"]: row["duplicate_of"] or row["key"] for row in truth(world).to_pylist()}
    offered: list[set[str]] = []
    scopes: list[str] = []
    for number in range(2):
        manifest = run_round(recipe, base=world)
        assert manifest.lineage["windows"]["taken"] == {"epoch": 0, "start": number, "super_batches": 1}
        learner = learner_of(manifest).sha
        (scope,) = {name for name in store.list(f"embeddings/{learner}") if "/window-" in name} - set(scopes)
        scopes.append(scope)
        tables = [read_embeddings(store, name, ["uid", "status", "content"]) for name in store.list(scope)]
        scored = pa.concat_tables(tables)
        assert set(scored["status"].to_pylist()) == {"ok"}
        offered.append({originals[uid] for uid in scored["uid"].to_pylist()})
        assert len(scored) == len(offered[-1])
        assert manifest.quality["staleness_batches"] == number
        assert (manifest.quality["unique_examples"], manifest.quality["chosen_again"]) == (B_SMALL * (number + 1), 0)
        assert (manifest.quality["rank_correlation"] or {}).get("value") == (1.0 if number else None)
        assert len(offered[-1]) == 5 * B_SMALL
    assert not offered[0] & offered[1]


@pytest.mark.parametrize(
    ("method", "criterion"), [("joint", "easy_reference"), ("uniform", "learnability"), ("independent", "learnability")]
)
def test_criteria_that_ignore_the_learner_do_not_run_it(world: Path, warm: Path, method: str, criterion: str) -> None:
    recipe = recipe_of(
        world,
        warm,
        selection__method=method,
        selection__criterion=criterion,
        selection__super_batches=2,
        selection__loss="softmax",
    )
    manifest = run_round(recipe, base=world)
    ignored = (method, criterion) != ("independent", "learnability")
    assert (manifest.lineage["learner"] is None) == ignored == (newest_learner(Store(recipe.root)) is None)
    assert all((value is None) == ignored for value in manifest.learnability)
    added = curated(recipe, manifest)["curate"].combine_chunks()
    assert added.field("learner_loss").null_count == (len(added) if ignored else 0)


def test_a_round_is_finished_with_the_recipe_it_was_begun_with(world: Path, warm: Path) -> None:
    recipe = recipe_of(world, warm, pool__max_dropped_share=0.001)
    with pytest.raises(UserError, match=r"12 of 600 rows cannot be used .*caption_empty 3.* pool\.max_dropped_share"):
        run_round(recipe, base=world)
    with pytest.raises(UserError, match=r"begun with another recipe \(selection\.gain: 10\.0 → 7\.0\)"):
        run_round(recipe_of(world, warm, pool__max_dropped_share=0.001, selection__gain=7.0), base=world)
    raised = recipe_of(world, warm, pool__max_dropped_share=0.1)  # the way out that the first line names
    assert run_round(raised, base=world).round == 0


def test_too_small_a_pool_is_the_users_mistake(world: Path, warm: Path) -> None:
    recipe = recipe_of(world, warm, selection__sub_batch_size=200)
    with pytest.raises(UserError, match=r"wants 1,000 candidates .* the pool holds 558 distinct usable pairs"):
        run_round(recipe, base=world)


def test_rounds_are_contiguous(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--round 3: rounds are contiguous and the newest is -1; run round 0 first"):
        run_round(recipe_of(world, tmp_path / "root"), base=world, number=3)


def test_a_shard_that_changes_during_a_round_stops_it(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    draw_pool(folder, rows=20, shards=2, seed=3, image_size=32)
    recipe = recipe_of(world, tmp_path / "root", pool={"path": str(folder)}, selection__sub_batch_size=500)
    pin_plan(Store(recipe.root), recipe, base=world, number=0)
    shard = sorted(folder.iterdir())[1]
    pq.write_table(pq.read_table(shard).slice(1), shard)
    with pytest.raises(Exception, match="the shard changed while the round was running"):
        run_round(recipe, base=world)


def test_columns_are_part_of_what_embeddings_are_named_by(world: Path, warm: Path) -> None:
    """Another uid or caption column must not find the files that the first one made."""
    recipe = recipe_of(world, warm, selection__super_batches=1)
    by_key = take_inventory(recipe.pool)
    by_content = take_inventory(recipe.pool.model_copy(update={"uid": None}))
    assert {shard.key for shard in by_key.shards}.isdisjoint(shard.key for shard in by_content.shards)


def test_learner_0_is_published_only_by_a_recipe_without_mistakes(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "root", pool={"path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match="nowhere"):
        run_round(recipe, base=world)
    assert newest_learner(Store(recipe.root)) is None


def test_another_untrained_learner_than_the_roots_is_refused(
    world: Path, committed: tuple[Recipe, Manifest], tmp_path: Path
) -> None:
    shutil.copytree(Path(committed[0].root) / "models", tmp_path / "root" / "models")
    shutil.copytree(Path(committed[0].root) / "learners/l000000", tmp_path / "root" / "learners/l000000")
    other = recipe_of(world, tmp_path / "root", learner={"model": "reference.json"})
    with pytest.raises(UserError, match=r"learners/l000000/learner\.json holds another untrained model"):
        run_round(other, base=world)


def test_near_duplicates_leave_before_any_is_chosen(world: Path, warm: Path, tmp_path: Path) -> None:
    held_out = truth(world)
    sound = held_out.filter(pc.is_null(held_out["broken"])).slice(0, 3)
    pq.write_table(sound, tmp_path / "held-out.parquet")
    near = {"threshold": 0.9998, "evaluation": [{"path": str(tmp_path / "held-out.parquet")}]}
    recipe = recipe_of(world, warm, dedup=near, selection__sub_batch_size=8)
    manifest = run_round(recipe, base=world)
    store = Store(str(warm))
    embed, dedup, window, _ = manifest.tallies
    assert dedup.rows_in == embed.kept
    assert dedup.kept == window.rows_in
    assert min(dedup.dropped[reason] for reason in ("duplicate_exact", "near_duplicate", "contaminated")) >= 3

    # The learner looked at no row that was dropped, and at all that were candidates of the round.
    folder = manifest.lineage["dedup"]["folder"]
    pool = load_pool(store, manifest.lineage["pool"]["fingerprint"])
    tables = {shard.index: read_dropped(store, folder, shard).to_pylist() for shard in pool.shards}
    dropped = {(index, row["row"]): row for index, rows in tables.items() for row in rows}
    learner = learner_of(manifest)
    names = [Path(name).name for name in store.list(f"embeddings/{learner.sha}")]
    (scope,) = [name for name in names if name.startswith("window-")]
    for shard in pool.shards:
        rows = read_embeddings(store, embedding_name(learner.sha, shard, scope), ["status"], numbered=True)["row"]
        assert not {(shard.index, row) for row in rows.to_pylist()} & dropped.keys()
    taken = curated(recipe, manifest)["curate"].combine_chunks().field("uid").to_pylist()
    assert len(taken) == manifest.sub_batches * 8 > 0

    # `show uid` says which row it is a duplicate of, and that one can be followed.
    keys = {shard.index: pq.read_table(shard.path)["key"].to_pylist() for shard in pool.shards}
    shown = {}
    for (shard, row), why in dropped.items():
        uid = keys[shard][row]
        assert uid not in taken
        if why["reason"] in shown:
            continue
        (found,) = explain_uid(store, uid)
        (outcome,) = found["rounds"]
        shown[why["reason"]] = outcome
        assert outcome["outcome"] == why["reason"]
        assert outcome["similarity"] == pytest.approx(why["similarity"], abs=1e-4)
    assert shown["contaminated"]["duplicate_of"]["shard"] == "held-out.parquet"
    other = shown["near_duplicate"]["representative"]
    (place,) = [shard.index for shard in pool.shards if shard.name == other["shard"]]
    (stays,) = explain_uid(store, keys[place][other["row"]])
    assert stays["rounds"][0]["outcome"] in ("selected", "not_selected", "later_round")

    # The next round goes on; with other settings it begins a new epoch.
    later = run_round(recipe, base=world)
    assert later.lineage["windows"]["through"] == manifest.lineage["windows"]["through"]
    without = run_round(recipe_of(world, warm, selection__sub_batch_size=8), base=world)
    assert without.lineage["windows"]["through"] != later.lineage["windows"]["through"]
    assert without.lineage["dedup"] is None
    assert without.tallies[1].dropped.keys() == {"duplicate_exact"}
