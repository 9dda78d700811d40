"""When the next round begins is read from the root alone; what fails is tried again, what cannot succeed is not."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import curate.jobs.rounds
from curate.errors import CommitConflictError, InputChangedError, UserError
from curate.jobs.rounds import Decision, RoundFailedError, decide, schedule_rounds
from curate.models.learners import record_learner
from curate.models.spec import EncoderSpec
from curate.pool.shards import Pool
from curate.recipe import ScheduleSection
from curate.rounds.manifest import last_round, manifest_name
from curate.rounds.plan import plan_name
from curate.rounds.stream import end_stream, stream_end
from curate.storage import Store
from tests.helpers import commit_round, drawn_pool

NOW = 1e9
ENCODER = EncoderSpec(
    model="0123456789abcdef",
    source="tiny",
    weights_sha256="0" * 64,
    embed_dim=16,
    logit_scale=10.0,
    logit_bias=-10.0,
    precision="fp32",
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return drawn_pool(tmp_path_factory.mktemp("rounds") / "pool", rows=16)


@pytest.fixture
def committed(store: Store, pool: Pool) -> Callable[..., None]:
    """Commits the next round: two batches, chosen by this learner."""

    def commit(learner: int | None = None) -> None:
        number = last_round(store) + 1
        commit_round(store, pool, [[(0, 0), (0, 1)], [(0, 2), (0, 3)]], number=number, learner=learner)

    return commit


def publish(store: Store, next_batch: int = 0) -> None:
    record_learner(store, ENCODER, step=next_batch, next_batch=next_batch)


def next_of(store: Store, **schedule: Any) -> Decision:
    return decide(store, ScheduleSection(**schedule), now=NOW)


# --- decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["learner", "ahead", "clock"])
def test_round_0_waits_for_nothing(store: Store, policy: str):
    assert next_of(store, policy=policy) == Decision(run=0)


@pytest.mark.parametrize("policy", ["learner", "ahead", "clock"])
def test_a_round_that_was_begun_is_finished(store: Store, committed, policy: str):
    committed()
    os.utime(store.local_path(manifest_name(0)), (NOW, NOW))
    if policy == "ahead":
        committed()
    assert next_of(store, policy=policy, ahead=1).run is None
    number = last_round(store) + 1
    store.put_bytes(plan_name(number), b"{}")
    assert next_of(store, policy=policy, ahead=1) == Decision(run=number)


def test_a_round_for_each_learner(store: Store, committed):
    publish(store)
    committed(learner=0)
    assert next_of(store) == Decision(wait_for="learner 1")
    publish(store, 2)
    publish(store, 2)
    assert next_of(store) == Decision(run=1)
    committed(learner=2)  # of two learners the newest was taken
    assert next_of(store) == Decision(wait_for="learner 3")


def test_a_round_for_each_learner_where_selection_does_not_look_at_it(store: Store, committed):
    committed(learner=None)
    assert next_of(store) == Decision(wait_for="learner 0")
    publish(store)
    assert next_of(store) == Decision(run=1)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_rounds_ahead_of_the_trainer(store: Store, committed, ahead: int):
    for number in range(ahead):
        assert next_of(store, policy="ahead", ahead=ahead) == Decision(run=number)
        committed()
    assert next_of(store, policy="ahead", ahead=ahead) == Decision(wait_for="round 0 to be trained on")
    publish(store, next_batch=1)
    assert next_of(store, policy="ahead", ahead=ahead).wait_for == "round 0 to be trained on"
    publish(store, next_batch=2)
    assert next_of(store, policy="ahead", ahead=ahead) == Decision(run=ahead)
    committed()
    assert next_of(store, policy="ahead", ahead=ahead).wait_for == "round 1 to be trained on"


def test_rounds_by_the_clock(root: str, pool: Pool):
    store = Store(root)
    commit_round(store, pool, [[(0, 0), (0, 1)]], number=0)
    when = store.modified(manifest_name(0))
    assert abs(when - time.time()) < 60
    schedule = ScheduleSection(policy="clock", every_s=100)
    waiting = decide(store, schedule, now=when + 60)
    assert (waiting.wait_for, round(waiting.wait_s)) == ("the clock", 40)
    assert decide(store, schedule, now=when + 100.1) == Decision(run=1)


def test_enough_rounds_or_an_end(store: Store, committed):
    committed()
    publish(store)
    assert next_of(store, rounds=2) == Decision(run=1)
    assert next_of(store, rounds=1).done
    assert not next_of(store).done
    end_stream(store)
    assert next_of(store).done


# --- running them ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate.jobs.rounds, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(curate.jobs.rounds, "LONGEST_WAIT_S", 0.01)


def scheduled(store: Store, run: Callable[[int], object], **schedule: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    section = ScheduleSection(policy="ahead", ahead=9, backoff_s=0.001, **schedule)
    return schedule_rounds(store, section, run, said.append), said


def test_rounds_until_there_are_enough(store: Store, committed):
    ran: list[int] = []
    assert scheduled(store, lambda number: (ran.append(number), committed()), rounds=3)[0] == 3
    assert ran == [0, 1, 2]
    assert stream_end(store) == 3
    assert scheduled(store, ran.append, rounds=3) == (3, ["the stream ends after 3 rounds"])
    assert ran == [0, 1, 2]


def test_a_wait_is_said_once(store: Store, committed):
    publish(store)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waits" in line:
            publish(store, next_batch=2 * (last_round(store) + 1))

    def run(number: int) -> None:
        committed(learner=number)

    assert schedule_rounds(store, ScheduleSection(rounds=2), run, say) == 2
    assert said == [
        "round 0",
        "round 0: 2 sub-batches of 2 chosen",
        "round 1 waits for learner 1",
        "round 1",
        "round 1: 2 sub-batches of 2 chosen",
        "the stream ends after 2 rounds",
    ]


def test_what_fails_is_tried_again(store: Store, committed):
    failures = [OSError("a node died\nwith a long story"), RuntimeError("again")]

    def run(number: int) -> None:
        if failures:
            raise failures.pop(0)
        committed()

    _, said = scheduled(store, run, rounds=1)
    assert said[1] == "round 0: try 1 of 3 failed: a node died with a long story; again in 0.001 s"
    assert said[2] == "round 0: try 2 of 3 failed: again; again in 0.002 s"
    assert last_round(store) == 0


def test_what_fails_too_often_is_given_up_with_the_reason(store: Store):
    tries: list[int] = []

    def run(number: int) -> None:
        tries.append(number)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        scheduled(store, run, attempts=2)
    assert tries == [0, 0]
    assert stream_end(store) is None


@pytest.mark.parametrize("mistake", [UserError("recipe: wrong"), InputChangedError("shard 3 changed")])
def test_mistakes_are_not_tried_again(store: Store, mistake: Exception):
    tries: list[int] = []

    def run(number: int) -> None:
        tries.append(number)
        raise mistake

    with pytest.raises(type(mistake)):
        scheduled(store, run)
    assert tries == [0]


def test_somebody_elses_commit_is_as_good(store: Store, committed):
    def run(number: int) -> None:
        committed()
        raise CommitConflictError("round 0 is there")

    assert scheduled(store, run, rounds=2)[0] == 2


def test_a_round_that_is_said_to_be_made_and_is_not(store: Store):
    with pytest.raises(RoundFailedError, match=r"said to be made, but .* does not hold it; .*ray job delete"):
        scheduled(store, lambda number: None)


def test_an_ended_stream_takes_no_round(store: Store, committed, tmp_path: Path):
    from curate.pipelines.round import run_round
    from curate.recipe import Recipe

    committed()
    end_stream(store)
    fields = {"root": store.url, "pool": {"path": "x"}, "learner": {"model": "x"}, "selection": {"sub_batch_size": 16}}
    recipe = Recipe.model_validate(fields)
    assert run_round(recipe, base=tmp_path, number=0).round == 0
    with pytest.raises(UserError, match=r"ended after round 0; delete rounds/end\.json to go on"):
        run_round(recipe, base=tmp_path)
