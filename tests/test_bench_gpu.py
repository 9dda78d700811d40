"""`make bench-gpu` in little, on a CPU: what first runs on a rented card has run before."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import SECTIONS, Where, main, run_section
from tests.helpers import CPU

pytestmark = pytest.mark.filterwarnings("ignore")  # as the command is run


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "ranks"])
def test_a_part_runs(tmp_path: Path, name: str) -> None:
    where = Where(device=CPU, small=True, deadline=time.monotonic() + 60)
    run_section(name, where, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"]
    if name == "dedup":
        cells, whole = found["rows"]
        assert cells["found of planted"] == whole["cells found of them"] == 1
        assert whole["cells found others"] == 0
    if name == "resume":
        assert found["rows"][0]["largest difference"] == 0
    if name == "embed":
        assert all(row["cosine to fp32"] > 0.9999 for row in found["rows"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["gpu", "--device=cpu", "--small", *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    return status.value.code


def test_the_command_runs_parts_and_keeps_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--only=card", f"--json={tmp_path / 'out.json'}") == 0
    (first, rates) = json.loads((tmp_path / "out.json").read_text())["card"]["rows"]
    assert first["torch"] == torch.__version__
    assert rates["fp32"] > 0


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--only=dedup,card", "--minutes=0.001", f"--json={tmp_path / 'out.json'}") == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert report.keys() == {"dedup", "card"}
    assert report["dedup"]["failed"] == "no end within 0 s"


def test_a_part_that_fails_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Where):
        yield {"one": 1}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(SECTIONS, "card", broken)
    where = Where(device=CPU, small=True, deadline=time.monotonic() + 60)
    with pytest.raises(SystemExit):
        run_section("card", where, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {"rows": [{"one": 1}], "failed": "RuntimeError: out of memory"}


def test_a_card_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (([], "expected a CUDA device, found none"), (["--only", "x"], "--only: expected card")):
        monkeypatch.setattr("sys.argv", ["gpu", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
