"""Rounds for TensorBoard: the numbers of the manifest, a step for each round."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curate.jobs.round_log import log_round
from curate.rounds.explain import describe_round
from curate.storage import Store
from tests.helpers import commit_rounds, drawn_pool


def test_each_round_is_a_step(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=48), rounds=2, sub_batches=3, b=8)
    for number in (0, 1, 1):
        folder = log_round(store, None, number)
        assert folder == tmp_path / "root/trainer/rounds"
    assert log_round(store, str(tmp_path / "logs"), 0) == tmp_path / "logs/rounds"
    assert log_round(Store("s3://bucket/root"), None, 0) is None
    board = EventAccumulator(str(tmp_path / "root/trainer/rounds"))
    board.Reload()
    kept = {event.step: event.value for event in board.Scalars("round/rows/select/kept")}
    assert kept == {number: describe_round(store, number)["steps"][-1]["kept"] for number in range(2)}
