"""How far long work is: a true estimate, one line a minute where nobody watches, one view where somebody does."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curate.pipelines import progress
from curate.pipelines.progress import Bar, bar, over


def test_the_time_that_is_left_is_that_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of 30 s, then 100 shards at about 2 s each: from the first tenth on within 20 %, at ten moments."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one = Bar("embed", 10_000, "row")
    clock[0] += 30
    ends = []
    estimates = []
    for shard in range(100):
        clock[0] += 2 + (shard * 7 % 5 - 2) / 4
        one.update(100)
        ends.append(clock[0])
        estimates.append(one.estimate()[1])
    assert estimates[0] is None  # one shard makes no rate
    for shard in range(9, 99, 10):
        left = ends[-1] - ends[shard]
        assert estimates[shard] == pytest.approx(left, rel=0.2)


def test_workers_who_end_together_make_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one = Bar("embed", 6_000, "row")
    for at in (60.0, 60.1, 90.0, 90.2):
        clock[0] = at
        one.update(1_000)
    assert one.estimate() == (pytest.approx(2_000 / 30.2), pytest.approx(30.2))


def test_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TOGETHER_S", 0)
    one = Bar("embed", 2_000, "row")
    assert one.told() == "0 of 2,000 rows"
    one.update(1_000)
    one.add(image_truncated=3)
    one.add(image_truncated=1, caption_empty=2)
    assert one.told() == "1,000 of 2,000 rows, image_truncated 4, caption_empty 2"
    one.update(500)
    assert re.fullmatch(r"1,500 of 2,000 rows, [\d,]+ a second, 0 s left, image_truncated 4, .*", one.told())
    endless = Bar("train", None, "step")
    endless.update(1, loss=0.5)
    assert endless.told() == "1 step, loss 0.5"
    assert endless.to_json()["left_s"] is None


@pytest.mark.parametrize("as_json", [False, True])
def test_where_nobody_watches_a_line_comes_now_and_then(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    monkeypatch.setattr(progress, "TOGETHER_S", 0.1)
    monkeypatch.setenv("CURATE_PROGRESS", "json" if as_json else "plain")
    with bar("embed", 10, unit="shard") as one:
        for _ in range(10):
            time.sleep(0.05)
            one.update(loss=0.5)
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.splitlines()
    assert 3 <= len(lines) <= 7
    if as_json:
        found = [json.loads(line) for line in lines]
        assert [one["ended"] for one in found] == [False] * (len(found) - 1) + [True]
        assert found[-1]["done"] == found[-1]["total"] == 10
        assert {"stage", "done", "total", "unit", "seconds", "per_second", "left_s", "loss"} <= set(found[0])
        return
    assert all(re.match(r"embed: \d+ of 10 shards", line) for line in lines)
    assert re.fullmatch(r"embed: 10 of 10 shards, \d+ a second, loss 0.5 after \d s", lines[-1])


def test_work_that_stands_still_is_told_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.1)
    with bar("embed", 10, unit="shard"):
        time.sleep(0.35)
    assert 2 <= capsys.readouterr().err.count("embed: 0 of 10 shards") <= 5


def test_short_work_and_none_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(over([1, 2], 2, title="short", unit="thing")) == [1, 2]
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    monkeypatch.setenv("CURATE_PROGRESS", "none")
    with bar("quiet", 2):
        time.sleep(0.1)
    monkeypatch.delenv("CURATE_PROGRESS")
    with bar("another rank's", 2, shown=False):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


WORK = """
import sys, threading, time
from curate.pipelines import progress

def work(title):
    with progress.bar(title, 40) as one:
        for i in range(40):
            time.sleep(.05)
            one.update(1)
            one.add(image_truncated=1)

other = threading.Thread(target=work, args=("select",))
other.start()
with progress.bar("embed", 40) as one:
    for i in range(40):
        time.sleep(.05)
        one.update(1)
        if i == 20:
            print("a line [not markup]")
            print("a note", file=sys.stderr)
other.join()
print("the answer")
"""


def on_a_terminal(program: str, stdout: Callable[[int], int]) -> str:
    """What a terminal of 100 columns is sent by a program; `stdout` makes of it what the program's stdout is."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=stdout(theirs),
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        cwd=Path(__file__).parents[1],
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            more = os.read(ours, 65_536)
        except OSError:
            break
        if not more:
            break
        sent += more
    os.close(ours)
    assert process.wait() == 0
    return sent.decode()


def test_on_a_terminal_all_that_goes_on_is_one_view(tmp_path: Path) -> None:
    sent = on_a_terminal(WORK, lambda terminal: terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    assert "a line [not markup]\r\n" in text
    assert "a note\r\n" in text
    assert text.rstrip().endswith("the answer")
    frames = text.split("embed ")
    assert any("select" in frame and re.search(r"of 40 rows, \d+ a second", frame) for frame in frames)
    assert "40 of 40 rows" in text
    assert "image_truncated" in text
    with (tmp_path / "answer").open("wb") as answer:
        sent = on_a_terminal(WORK, lambda _: answer.fileno())
    assert (tmp_path / "answer").read_text() == "a line [not markup]\nthe answer\n"
    assert "the answer" not in sent
    assert "a note" in sent
