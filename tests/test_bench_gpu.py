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


def test_a_part_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--device=cpu", "--small", "--only=card,ranks", f"--json={out}"])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")  # so that ranks do not find each other
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 1
    report = json.loads(out.read_text())
    assert "failed" not in report["card"]
    assert "failed" in report["ranks"]
    assert "1 of 2 parts ran; failed: ranks" in capfd.readouterr().out


def test_a_card_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (([], "expected a CUDA device, found none"), (["--only", "x"], "--only: expected card")):
        monkeypatch.setattr("sys.argv", ["gpu", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
