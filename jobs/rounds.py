"""The scheduler: which round begins when, decided from the root alone.

    curate rounds RECIPE                       rounds run here, in this process's Ray
    curate rounds RECIPE --address URL         each round runs as a job of a cluster

It keeps nothing: what is to be done follows from the rounds, learners and plans that are in the root, so it can be
killed and started again anywhere. Two of them on one root do no harm: a round's plan and manifest are published once.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from curate.errors import ClusterError, CommitConflictError, CurateError, InputChangedError, UserError
from curate.jobs.job_client import JobClient
from curate.jobs.submit import submit
from curate.messages import counted, one_line
from curate.models.learners import newest_learner
from curate.recipe import Recipe, ScheduleSection
from curate.rounds.manifest import Manifest, last_round, manifest_name, read_manifest
from curate.rounds.plan import plan_name
from curate.rounds.stream import end_stream, stream_end
from curate.storage import Store

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
FINAL = (UserError, InputChangedError)
"""A second try of the same round cannot end otherwise."""

Runner = Callable[[int], object]
"""Runs a round by its number, or finishes it."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a look at the root says: run a round, wait for something, or stop."""

    run: int | None = None
    wait_for: str | None = None
    wait_s: float | None = None
    """Longest useful wait, where it is known."""

    @property
    def done(self) -> bool:
        """Whether no round will follow."""
        return self.run is None and self.wait_for is None


class RoundFailedError(CurateError):
    """A job that was to run a round ended otherwise."""


def decide(store: Store, schedule: ScheduleSection, *, now: float) -> Decision:
    """What to do next.

    Args:
        store: the root.
        schedule: the policy.
        now: seconds since 1970, for policy = clock.
    """
    newest = last_round(store)
    number = newest + 1
    if stream_end(store) is not None or (schedule.rounds is not None and number >= schedule.rounds):
        return Decision()
    found = read_manifest(store, newest)
    # A round that was begun is finished, whatever the policy says of beginning one.
    if found is None or store.exists(plan_name(number)):
        return Decision(run=number)
    return _wait_by_policy(store, schedule, found[0], now=now) or Decision(run=number)


def _wait_by_policy(store: Store, schedule: ScheduleSection, newest: Manifest, *, now: float) -> Decision | None:
    """What the round after `newest` waits for; None if it may begin."""
    learner = newest_learner(store)
    match schedule.policy:
        case "learner":
            before = -1 if newest.quality["learner"] is None else newest.quality["learner"]
            if learner is None or learner.number <= before:
                return Decision(wait_for=f"learner {before + 1}")
        case "ahead":
            oldest = newest.round + 1 - schedule.ahead
            found = read_manifest(store, oldest) if oldest >= 0 else None
            if found is not None and found[0].stop_batch > (learner.next_batch if learner else 0):
                return Decision(wait_for=f"round {oldest} to be trained on")
        case "clock":
            left = (store.modified(manifest_name(newest.round)) or now) + schedule.every_s - now
            if left > 0:
                return Decision(wait_for="the clock", wait_s=left)
    return None


def schedule_rounds(store: Store, schedule: ScheduleSection, run: Runner, say: Callable[[str], None]) -> int:
    """Run rounds as the policy says until there are enough or somebody ends the stream; returns their number.

    Args:
        store: the root.
        schedule: the policy, and how often a round is tried.
        run: what makes a round.
        say: told of every decision, once.

    Raises:
        CurateError: a round failed in a way that no further try could mend, or as often as `attempts` says.
    """
    wait, told = FIRST_WAIT_S, ""
    while not (decision := decide(store, schedule, now=time.time())).done:
        if decision.run is None:
            if told != (told := f"round {last_round(store) + 1} waits for {decision.wait_for}"):
                say(told)
            time.sleep(min(wait, LONGEST_WAIT_S if decision.wait_s is None else decision.wait_s))
            wait = min(2 * wait, LONGEST_WAIT_S)
            continue
        say(f"round {decision.run}")
        _persist(store, decision.run, schedule, run, say)
        wait, told = FIRST_WAIT_S, ""
    rounds = end_stream(store) if stream_end(store) is None else last_round(store) + 1
    say(f"the stream ends after {counted(rounds, 'round')}")
    return rounds


def in_own_ray(recipe: Recipe, base: Path, say: Callable[[str], None]) -> Runner:
    """Rounds in this process, whose Ray stays up from one to the next."""
    # Not at the top: a scheduler of jobs needs neither torch nor a Ray of its own.
    import ray  # noqa: PLC0415

    from curate.jobs.round_log import try_to_log  # noqa: PLC0415
    from curate.pipelines.round import run_round  # noqa: PLC0415

    def run(number: int) -> None:
        try:
            run_round(recipe, base=base, number=number, say=say)
            try_to_log(Store(recipe.root), recipe.train.logs, number, say)
        except Exception as error:
            if isinstance(error, ClusterError) or not isinstance(error, CurateError):
                # Ray itself may be what failed: the next try starts, or joins, another one.
                with contextlib.suppress(Exception):
                    ray.shutdown()
            raise

    return run


def as_jobs(recipe_path: Path, overrides: list[str], address: str, image: str | None) -> Runner:
    """Rounds as jobs of a cluster, each found again by its name if this process dies while it runs.

    Raises:
        UserError: no job server answers at the address. Later on its absence is a failure that is tried again.
    """
    client = JobClient(address)

    def run(number: int) -> None:
        command = ["round", "--round", str(number)]
        status = submit(recipe_path, command, address=address, overrides=overrides, image=image, client=client)
        match status:
            case 0:
                return
            case 130:
                raise KeyboardInterrupt
            case 2:
                raise UserError(f"round {number}: its job found a mistake in recipe or input, see its log above")
            case 3:
                raise CommitConflictError(f"round {number}: somebody else committed it")
            case _:
                raise RoundFailedError(f"round {number}: its job ended with status {status}, see its log above")

    return run


def _persist(store: Store, number: int, schedule: ScheduleSection, run: Runner, say: Callable[[str], None]) -> None:
    """Run a round, again if it fails, until it is committed."""
    pause = schedule.backoff_s
    for attempt in range(1, schedule.attempts + 1):
        try:
            run(number)
        except FINAL:
            raise
        except Exception as error:
            # Somebody else's commit is as good as ours; anything else may be a node that died.
            if isinstance(error, CommitConflictError) and last_round(store) >= number:
                return
            reason = one_line(error, 300)
            if attempt == schedule.attempts:
                say(f"round {number}: given up after {counted(attempt, 'try', 'tries')}: {reason}")
                raise
            say(f"round {number}: try {attempt} of {schedule.attempts} failed: {reason}; again in {pause:g} s")
            time.sleep(pause)
            pause *= 2
        else:
            break
    found = read_manifest(store, number)
    if found is None:
        raise RoundFailedError(
            f"round {number}: is said to be made, but {store.url} does not hold it; if the root was emptied, delete "
            "the job that made it (ray job delete)"
        )
    manifest = found[0]
    looked = any(value is not None for value in manifest.learnability)
    chosen = f"{counted(manifest.sub_batches, 'sub-batch', 'sub-batches')} of {manifest.sub_batch_size:,}"
    say(f"round {number}: {chosen} chosen" + (f" by learner {manifest.quality['learner']}" if looked else ""))
