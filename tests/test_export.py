"""Rounds in the formats of others, read by these libraries themselves: each batch whole, each row the one committed."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from typer.testing import CliRunner

from curate import CuratedReader
from curate.errors import UserError
from curate.jobs.cli import app
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.pool.inventory import take_inventory
from curate.pool.shards import read_batches
from curate.recipe import PoolSection
from curate.rounds.manifest import read_manifest
from curate.storage import Store
from tests.helpers import commit_rounds, drawn_pool, write_tiny
from tests.stand_in import without_ray
from tests.test_wanted import recipe

B = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of two sub-batches."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "parquet", rows=96, shards=2, seed=0, image_size=32)
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for number in range(2):
            run_round(recipe(folder, folder / "root"), base=folder, number=number, say=lambda line: None)
    return folder / "root"


def export(root: Path, *arguments: Any) -> str:
    found = CliRunner().invoke(app, ["export", str(root), *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def committed(root: Path) -> list[dict[str, Any]]:
    """All rows, in the order of training."""
    rows: list[dict[str, Any]] = []
    for number in range(2):
        found = read_manifest(Store(str(root)), number)
        assert found is not None
        for file in found[0].files:
            rows += pq.read_table(root / f"rounds/r{number:06d}" / file.name).to_pylist()
    return rows


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def test_a_tar_for_each_sub_batch(root: Path, tmp_path: Path) -> None:
    said = export(root, "--to", "webdataset", tmp_path / "out")
    assert said == f"4 sub-batches in place: {tmp_path}/out/{{00000000..00000003}}.tar\n"
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {f"{n:08d}.tar": B for n in range(4)}
    rows = committed(root)
    for number in range(4):
        found = members(tmp_path / f"out/{number:08d}.tar")
        assert len(found) == 3 * B
        for place, row in enumerate(rows[B * number : B * (number + 1)]):
            key = f"{number:08d}-{place:06d}"
            assert found[f"{key}.jpg"] == row["jpg"]
            assert found[f"{key}.txt"].decode() == row["caption"]
            told = json.loads(found[f"{key}.json"])
            assert told["curate"] == row["curate"]
            assert (told["key"], told["swapped"]) == (row["key"], row["swapped"])
            assert "jpg" not in told


def test_an_export_goes_on_and_is_the_same_bytes(root: Path, tmp_path: Path) -> None:
    export(root, "--to", "webdataset", tmp_path / "a")
    export(root, "--to", "webdataset", tmp_path / "b", "--last", 0)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "00000000.tar",
        "00000001.tar",
        "rounds.json",
        "sizes.json",
    ]
    (tmp_path / "b/00000000.tar").unlink()
    kept = (tmp_path / "b/00000001.tar").stat().st_mtime_ns
    export(root, "--to", "webdataset", tmp_path / "b")
    assert (tmp_path / "b/00000001.tar").stat().st_mtime_ns == kept
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_is_exported_is_a_pool_of_its_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(root, "--to", "webdataset", tmp_path / "tars")
    pool = take_inventory(PoolSection(path=str(tmp_path / "tars")))
    batches = [batch for shard in pool.shards for batch in read_batches(shard, ["txt"], batch_rows=99)]
    captions = [caption for batch in batches for caption in batch.column("txt").to_pylist()]
    assert captions == [row["caption"] for row in committed(root)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_it(root: Path, tmp_path: Path) -> None:
    export(root, "--to", "webdataset", tmp_path / "out")
    found = list(webdataset.WebDataset(f"{tmp_path}/out/{{00000000..00000003}}.tar", shardshuffle=False).decode("pil"))
    assert [sample["txt"] for sample in found] == [row["caption"] for row in committed(root)]
    assert found[0]["jpg"].size == (32, 32)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_datasets_shows_pictures_at_once(root: Path, tmp_path: Path) -> None:
    said = export(root, "--to", "datasets", tmp_path / "set")
    assert said.endswith(f'in place: datasets.load_dataset("{tmp_path}/set", split="train")\n')
    found = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["jpg"], datasets.Image)
    rows = committed(root)
    assert found[0]["jpg"].size == (32, 32)
    assert found["caption"][:] == [row["caption"] for row in rows]
    raw = found.cast_column("jpg", datasets.Image(decode=False))
    assert [one["jpg"]["bytes"] for one in raw] == [row["jpg"] for row in rows]
    assert [one["curate"]["uid"] for one in raw] == [row["curate"]["uid"] for row in rows]
    card = (tmp_path / "set/README.md").read_text()
    assert "16 image-text pairs in 4 batches of 4" in card
    assert "joint learnability, filter ratio 0.75" in card


def test_uids_are_what_pool_keep_takes(root: Path, tmp_path: Path) -> None:
    said = export(root, "--to", "uids", tmp_path / "chosen.npy")
    found = np.load(tmp_path / "chosen.npy")
    uids = {row["curate"]["uid"] for row in committed(root)}
    assert said.startswith(f"{tmp_path}/chosen.npy: {len(uids)} uids")
    assert sorted(found.tolist()) == sorted(uids)
    pool = take_inventory(PoolSection(path=str(root.parent / "parquet"), uid="key", keep=str(tmp_path / "chosen.npy")))
    assert pool.columns.keep_sha


def test_exports_go_to_s3(root: Path, s3_root: str) -> None:
    export(root, "--to", "webdataset", f"{s3_root}/tars", "--last", 0)
    data = Store(s3_root).read_bytes("tars/00000001.tar")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getmembers()) == 3 * B


@pytest.mark.parametrize("form", ["webdataset", "datasets"])
def test_a_folder_of_other_rounds_is_refused(root: Path, tmp_path: Path, form: str) -> None:
    export(root, "--to", form, tmp_path / "out", "--first", 1)
    with pytest.raises(UserError, match="found an export of 1 others"):
        export(root, "--to", form, tmp_path / "out")


def test_sub_batches_that_do_not_end_with_a_row_group(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=600), rounds=1, sub_batches=3, b=130)
    export(tmp_path / "root", "--to", "webdataset", tmp_path / "out")
    assert [len(members(tmp_path / f"out/{n:08d}.tar")) for n in range(3)] == [3 * 130] * 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--first", "7"], "--first 7: expected a committed round, found rounds 0 to 1; correct it"),
        (["--last", "9"], "--last 9: expected a committed round, found rounds 0 to 1; correct it"),
        (["--first", "1", "--last", "0"], "--first 1 --last 0: expected the first before the last; exchange them"),
        (["--to", "uids", "/usr"], "--to uids /usr: expected a file to write, found a folder; add the file's name"),
        (["--to", "uids", "/nowhere/x.npy"], "--to uids /nowhere/x.npy: expected it in a folder"),
    ],
)
def test_mistakes_are_one_line(root: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    to = [] if "--to" in arguments else ["--to", "datasets", str(tmp_path / "out")]
    with pytest.raises(Exception, match=line):
        CliRunner().invoke(app, ["export", str(root), *to, *arguments], catch_exceptions=False)


def test_the_readers_batches_are_those_of_the_tars(root: Path, tmp_path: Path) -> None:
    export(root, "--to", "webdataset", tmp_path / "out")
    for batch in CuratedReader(str(root)):
        told = [
            data for name, data in members(tmp_path / f"out/{batch.number:08d}.tar").items() if name.endswith("json")
        ]
        assert [json.loads(one)["curate"]["uid"] for one in told] == batch.uids
