"""What nobody needs goes, and nothing else: rounds, readers, trainers and explanations are as if it had not."""

import os
import shutil
import time
from pathlib import Path

import pytest

from curate.errors import UserError
from curate.jobs.train import train
from curate.pipelines.round import run_round
from curate.reader.curated import CuratedReader
from curate.rounds.explain import describe_round
from curate.rounds.gc import PARTS, find_garbage, remove_garbage
from curate.rounds.manifest import read_manifest
from curate.rounds.trace import explain_uid
from curate.storage import Store
from tests.small_round import Killed, published, recipe, world
from tests.stand_in import without_ray

__all__ = ["without_ray", "world"]

pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def curated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, each by a learner of its own, and a trainer after each."""
    root = tmp_path_factory.mktemp("curated") / "root"
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for _ in range(2):
            run_round(recipe(world, str(root)), base=world)
            train(recipe(world, str(root)), base=world)
    return root


def collect(root: Path, grace_s: float = -5, **keep: int) -> dict[str, set[str]]:
    """What was removed, by kinds."""
    store, found = Store(str(root)), {}
    for garbage in list(find_garbage(store, grace_s=grace_s, **keep)):
        remove_garbage(store, garbage)
        found.setdefault(garbage.kind, set()).add(Path(garbage.name).name)
    return found


def go_on(world: Path, root: Path) -> tuple[dict[str, str], list[list[str]]]:
    """The next round and the trainer after it; what readers meet then."""
    run_round(recipe(world, str(root)), base=world)
    train(recipe(world, str(root)), base=world)
    return published(str(root)), [list(batch.uids) for batch in CuratedReader(str(root))]


def test_a_root_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected a root, found nothing there; correct it"):
        collect(tmp_path / "nowhere")


def test_all_goes_on_as_if_nothing_had_gone(world: Path, curated: Path, tmp_path: Path) -> None:
    whole, cleaned = tmp_path / "whole", tmp_path / "cleaned"
    shutil.copytree(curated, whole)
    shutil.copytree(curated, cleaned)
    before = {uid: explain_uid(Store(str(whole)), uid) for batch in CuratedReader(str(whole)) for uid in batch.uids[:2]}
    (kind,) = collect(cleaned)
    assert kind == "embeddings by learners that no round scores with any more"
    assert collect(cleaned) == {}
    assert {uid: explain_uid(Store(str(cleaned)), uid) for uid in before} == before
    assert go_on(world, cleaned) == go_on(world, whole)


def test_rounds_expire_if_asked(world: Path, curated: Path, tmp_path: Path) -> None:
    whole, expired = tmp_path / "whole", tmp_path / "expired"
    shutil.copytree(curated, whole)
    run_round(recipe(world, str(whole)), base=world)
    train(recipe(world, str(whole)), base=world)
    shutil.copytree(whole, expired)
    uid = next(iter(CuratedReader(str(whole)))).uids[0]
    removed = collect(expired, keep_rounds=1, keep_learners=1)
    assert "rows of earlier rounds" in removed
    assert removed["models of earlier learners"] == {"open_clip_config.json", "open_clip_model.safetensors"}
    left = {path.name for path in (expired / "rounds/r000000").iterdir() if path.is_file()}
    assert {name for name in left if not name.startswith("attempt-")} == {"manifest.json", "plan.json", "expired.json"}
    # Whoever needs the rows is told; whoever does not goes on as if they were there.
    with pytest.raises(UserError, match=r"rows of round 0 were removed by curate gc --keep-rounds; go on from .* \d+"):
        next(iter(CuratedReader(str(expired))))
    store = Store(str(expired))
    stop = read_manifest(store, 1)[0].stop_batch
    (found,) = explain_uid(store, uid)
    assert found["rounds"][0] == {"round": 0, "outcome": "round_expired"}
    assert describe_round(store, 0)["expired"]
    assert not describe_round(store, 2)["expired"]
    for root in (whole, expired):
        run_round(recipe(world, str(root)), base=world)
        train(recipe(world, str(root)), base=world)
    after = [[list(batch.uids) for batch in _from(str(root), stop)] for root in (whole, expired)]
    assert after[0] == after[1] != []
    newer = [{k: v for k, v in published(str(root)).items() if k > "rounds/r000002"} for root in (whole, expired)]
    assert newer[0] == newer[1]


def _from(root: str, batch: int) -> CuratedReader:
    reader = CuratedReader(root)
    reader.load_state_dict({"next_batch": batch})
    return reader


def test_a_round_that_no_learner_has_seen_does_not_expire(world: Path, curated: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(curated, root)
    for _ in range(2):  # beyond what the newest learner was trained on
        run_round(recipe(world, str(root)), base=world)
    collect(root, keep_rounds=1)
    expired = [path.parent.name for path in sorted(root.glob("rounds/*/expired.json"))]
    assert expired == ["r000000", "r000001"]


def test_what_killed_commands_left_goes(world: Path, curated: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(curated, root)
    (steps,) = (root / "rounds/r000000").glob("steps-*")
    index = next((root / "index").rglob("index.json")).parent
    window = next((root / "windows").iterdir())
    left = [
        root / "rounds/r000000/curated-0000.parquet",
        root / "rounds/r000000/steps-ffffffffffff/selected-000000.parquet",
        steps / "rows-000000-000003",
        index / "parts-all-shards-000000",
        window / "keys-000001",
        root / ".tmp-abc/0.parquet",
        root / "rounds/.probe-abc",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    collect(root, grace_s=3600)
    assert all(path.exists() for path in left)
    then = time.time() - 7200
    for path in left:
        os.utime(path, (then, then))
        os.utime(path.parent, (then, then))
    removed = collect(root, grace_s=3600)
    assert not [path for path in left if path.exists()]
    assert {name for names in removed.values() for name in names} == {
        *(path.name for path in left if ".tmp-" not in str(path)),
        ".tmp-abc",
    }


def test_a_round_in_progress_keeps_all_that_it_made(
    world: Path, curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(curated, root)
    collect(root)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("curate.pipelines.write._write_file", killed)
        with pytest.raises(Killed):
            run_round(recipe(world, str(root)), base=world)
    steps = {path.name for path in (root / "rounds/r000002").rglob("*") if path.is_file()}
    assert any(PARTS.fullmatch(f"rounds/r000002/steps-x/{name}") for name in steps)
    collect(root)
    assert {path.name for path in (root / "rounds/r000002").rglob("*") if path.is_file()} == steps
