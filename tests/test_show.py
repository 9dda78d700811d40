"""What `curate show` says to people: no wider than a terminal, and the same facts as `--json` has."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from curate.errors import UserError
from curate.jobs import tables
from curate.jobs.cli import app, main
from curate.jobs.drawn_pool import draw_pool
from curate.pipelines.round import run_round
from curate.recipe import Recipe
from curate.rounds import compare
from curate.rounds.compare import compare_rounds
from curate.rounds.manifest import expire
from curate.storage import Store
from tests.helpers import write_tiny
from tests.stand_in import without_ray

ROWS = 320


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds; the third is another method's, over the whole pool."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    drawn: dict[str, Any] = {"image_size": 32, "broken_share": 0.05, "duplicate_share": 0.1}
    draw_pool(folder / "pool", rows=ROWS, shards=4, seed=0, **drawn)
    fields: dict[str, Any] = {
        "root": str(folder / "root"),
        "pool": {"path": str(folder / "pool"), "uid": "key"},
        "reference": {"model": "reference.json"},
        "learner": {"model": "learner.json"},
        "dedup": {"threshold": 0.9999},
        "selection": {"sub_batch_size": 16, "filter_ratio": 0.75, "criterion": "learnability", "super_batches": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for number in range(3):
            if number == 2:
                fields["selection"] |= {"method": "independent", "super_batches": None}
            run_round(Recipe.model_validate(fields), base=folder, number=number)
    return folder / "root"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LOG_COLUMNS", 80)


def shown(capsys: pytest.CaptureFixture[str], root: Path, *what: str) -> str:
    app(["show", str(root), *what], standalone_mode=False)
    return capsys.readouterr().out


def chosen(root: Path, number: int) -> list[str]:
    paths = sorted((root / f"rounds/r{number:06d}").glob("curated-*.parquet"))
    return [key for path in paths for key in pq.read_table(path)["key"].to_pylist()]


@pytest.mark.usefixtures("narrow")
def test_nothing_is_wider_than_a_terminal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = pq.ParquetDataset(root.parent / "pool").read(columns=["key"])["key"].to_pylist()
    asked = [["rounds"], ["round", "1"], ["diff", "0", "2"], ["orphans"], *(["uid", key] for key in keys[::40])]
    for what in asked:
        text = shown(capsys, root, *what)
        assert text
        assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80, what


@pytest.mark.usefixtures("narrow")
def test_each_pair_has_its_story_on_one_screen(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = pq.ParquetDataset(root.parent / "pool").read(columns=["key"])["key"].to_pylist()
    said = set()
    for key in keys[::5]:
        text = shown(capsys, root, "uid", key)
        assert len(text.splitlines()) <= 24
        (row,) = json.loads(shown(capsys, root, "uid", key, "--json"))
        outcomes = [one["outcome"] for one in row.get("rounds", [])]
        assert text.count("chosen: sub-batch") == outcomes.count("selected")
        assert text.count("not chosen: a candidate") == outcomes.count("not_selected")
        said |= {*outcomes, row["status"]}
        for outcome, phrase in (
            ("duplicate_exact", "left out, duplicate_exact: of row"),
            ("near_duplicate", ", cosine "),
            ("later_round", "comes in a later round"),
            ("earlier_round", "was in an earlier round"),
        ):
            assert outcome not in outcomes or phrase in text
        if row["status"] != "ok":
            assert f"cannot be used: {row['status']}" in text
    assert said >= {"selected", "not_selected", "later_round", "duplicate_exact", "caption_empty"}


def test_by_how_much_a_pair_missed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = pq.ParquetDataset(root.parent / "pool").read(columns=["key"])["key"].to_pylist()
    seen = 0
    for key in keys[::8]:
        (row,) = json.loads(shown(capsys, root, "uid", key, "--json"))
        for one in row.get("rounds", []):
            if one["outcome"] == "not_selected":
                missed = one["least_chosen"] - one["independent_score"]
                how = f"{missed:.4f} below" if missed > 0 else f"{-missed:.4f} above"
                assert f"alone it scores {one['independent_score']:.4f}: {how}" in shown(capsys, root, "uid", key)
                seen += 1
    assert seen > 5


def test_two_rounds_are_compared(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, root, "diff", "1", "2", "--json"))
    both = len(set(chosen(root, 1)) & set(chosen(root, 2)))
    assert (found["rows"], found["in_both"]) == ([len(chosen(root, 1)), len(chosen(root, 2))], both)
    assert both > 0
    assert found["fields"]["chosen_by"] == ["joint learnability", "independent learnability"]
    assert found["fields"]["recipe.selection.super_batches"] == [2, None]
    assert "recipe.selection.criterion" not in found["fields"]
    text = shown(capsys, root, "diff", "1", "2")
    assert f"chosen by both: {both:,}, {both / len(chosen(root, 2)):.1%} of round 2" in text
    same = json.loads(shown(capsys, root, "diff", "1", "1", "--json"))
    assert (same["in_both"], same["fields"]) == (len(chosen(root, 1)), {})
    assert "nothing else differs" in shown(capsys, root, "diff", "1", "1")


def test_what_two_rounds_share_is_not_guessed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MOST_ROWS", 3)
    assert compare_rounds(Store(str(root)), 0, 1)["in_both"] is None
    monkeypatch.undo()
    shutil.copytree(root, tmp_path / "root")
    expire(Store(str(tmp_path / "root")), 0)
    assert compare_rounds(Store(str(tmp_path / "root")), 0, 1)["in_both"] is None
    with pytest.raises(UserError, match="round 9 is not committed"):
        compare_rounds(Store(str(root)), 0, 9)


def test_orphans_are_what_nothing_needs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "everything in it is needed, or younger than 24 hours" in shown(capsys, root, "orphans")
    shutil.copytree(root, tmp_path / "root")
    (tmp_path / "root/rounds/r000001/curated-0000.parquet").write_bytes(b"x" * 2**20)
    (tmp_path / "root/rounds/r000001/steps-0000").mkdir()
    (tmp_path / "root/rounds/r000001/steps-0000/selected-000000.parquet").write_bytes(b"x")
    assert json.loads(shown(capsys, tmp_path / "root", "orphans", "--json")) == []  # a round may be writing them now
    for path in (tmp_path / "root/rounds/r000001").rglob("*0000*"):
        os.utime(path, (0, 0))
    found = json.loads(shown(capsys, tmp_path / "root", "orphans", "--json"))
    assert {one["name"]: one["bytes"] for one in found} == {
        "rounds/r000001/curated-0000.parquet": 2**20,
        "rounds/r000001/steps-0000/selected-000000.parquet": 1,
    }
    text = shown(capsys, tmp_path / "root", "orphans")
    assert "curated files that no manifest names" in text
    assert (tmp_path / "root/rounds/r000001/curated-0000.parquet").exists()


def test_a_pairs_picture_is_saved_as_it_lies_in_the_pool(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.ParquetDataset(root.parent / "pool").read(columns=["key", "jpg"]).to_pylist()
    row = next(row for row in rows if row["key"] == chosen(root, 0)[0])
    shown(capsys, root, "uid", row["key"], "--picture", str(tmp_path / "pair.jpg"))
    assert (tmp_path / "pair.jpg").read_bytes() == row["jpg"]
    with pytest.raises(UserError, match=r"--picture p\.jpg: expected with uid U, found show rounds"):
        shown(capsys, root, "rounds", "--picture", "p.jpg")
    empty = next(row for row in rows if not row["jpg"])
    with pytest.raises(UserError, match="expected a picture, found none in "):
        shown(capsys, root, "uid", empty["key"], "--picture", str(tmp_path / "none.jpg"))


def test_a_file_that_is_gone_is_a_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (uid, *_) = chosen(root, 0)
    other = shutil.copytree(root, tmp_path / "root")
    for path in [*other.rglob("selected-*.parquet"), *other.rglob("curated-*.parquet")]:
        path.unlink()
    for verb in (["show", str(other), "uid", uid], ["export", str(other), "--to", "uids", str(tmp_path / "uids.npy")]):
        monkeypatch.setattr(sys, "argv", ["curate", *verb])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        line = rf"{other}/rounds/.*\.parquet: No such file or directory; it was there .*: put it back from a copy, .*\n"
        assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize("closed", ["1", "0 1 2"])
def test_a_stream_that_is_closed_is_no_mistake(root: Path, closed: str) -> None:
    streams = " ".join(f"{number}>&-" for number in closed.split())
    command = shlex.join([sys.executable, "-c", "from curate.jobs.start import main; main()", "show", str(root)])
    done = subprocess.run(f"{command} {streams}", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert ("easy_reference" in done.stdout or "learnability" in done.stdout) == ("1" not in closed)
