"""A crash or an error at every storage operation of a small complete curation: nothing half-done is ever seen.

Deduplication, round and trainer, each from what the one before left. An operation is a call of the store on a local
root, and a request on S3. After each disturbance all files that are to be seen are those of an undisturbed run, byte
for byte. The run ended as if nothing had been, or it told in one line that the store or the disk failed, or it was
killed. In the latter two cases the same command, run again, leaves what an undisturbed one leaves.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest

from curate import access
from curate.jobs.checkpoint import checkpoints, load_checkpoint
from curate.storage import Store
from tests.small_round import (
    STAGES,
    Killed,
    OnS3,
    Stage,
    left,
    on_s3,
    recipe,
    run_stage,
    s3_stages,
    stages,
    told,
    world,
)
from tests.stand_in import without_ray

__all__ = ["on_s3", "s3_stages", "stages", "without_ray", "world"]

READS = ("read_bytes", "read_range", "size", "list", "open_input", "open_for_arrow", "modified")
PUTS = ("put_if_absent", "put_bytes", "put_file")
WRITES = (*PUTS, "delete", "local_scratch")


def check(root: str, seen: dict[str, str], after: dict[str, str]) -> None:
    """Nothing else is ever seen; parts and checkpoints come and go, but each checkpoint can be read."""
    stay = {
        (name, digest) for name, digest in seen.items() if PurePath(name).suffix and not name.startswith("trainer/")
    }
    assert stay <= set(after.items())
    for name in checkpoints(Store(root)):
        load_checkpoint(Store(root), name)


# --- a local root ----------------------------------------------------------------------------------------------------


class Disturbed:
    """Numbers the operations of a store, and does something at one of them.

    before      die before it
    torn        leave half of what was to be put under a temporary name, and die
    after       die after it
    lost        do it, then fail: on a network file system a quota is told late
    full        fail because the disk is full
    refused     fail because this user may not
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, how: str = "") -> None:
        self.names: list[str] = []
        self.at, self.how = at, how
        for name in READS + WRITES:
            patch.setattr(Store, name, self._wrapped(name, getattr(Store, name)))

    def _wrapped(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(store: Store, *arguments: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 != self.at:
                return act(store, *arguments, **named)
            if self.how in ("after", "lost"):
                act(store, *arguments, **named)
            if self.how == "torn":
                _leave_half(store, *arguments)
            if self.how == "lost":
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
            if self.how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.how == "refused":
                with access.explained(store.url):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            raise Killed

        return wrapped


def _leave_half(store: Store, one: Any, other: Any) -> None:
    """What a crash amid a put leaves behind: beside the name, or in the scratch folder that the file came from."""
    root, hidden = Path(store.url), f".tmp-{uuid.uuid4().hex}"
    data = other if isinstance(other, bytes) else Path(one).read_bytes()
    path = (root / one).parent / hidden if isinstance(other, bytes) else root / hidden / Path(one).name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) // 2])


def local_cases(stages: dict[str, Stage], world: Path, root: Path, stage: str) -> list[tuple[str, int, str]]:
    """Stage, number of the operation, and what is done there."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Disturbed(patch)
        run_local(stages, world, stage, root)
    found = []
    for at, name in enumerate(counted.names):
        hows = ["before", "refused"]
        hows += ["after", "lost", "full"] if name in WRITES else []
        hows += ["torn"] if name in PUTS else []
        found += [(stage, at, how) for how in hows]
    return found


def run_local(
    stages: dict[str, Stage], world: Path, stage: str, root: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    shutil.copytree(stages[stage].before, root)
    run_stage(stage, recipe(world, str(root)), world, say)


def disturb_local(stages: dict[str, Stage], world: Path, root: Path, stage: str, at: int, how: str) -> str:
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        Disturbed(patch, at, how)
        outcome = told(lambda: run_local(stages, world, stage, root, said.append))
    check(str(root), left(root), stages[stage].after)
    if outcome != "done":
        run_stage(stage, recipe(world, str(root)), world, said.append)
    assert left(root) == stages[stage].after
    assert not any("made again" in line for line in said)
    shutil.rmtree(root)
    return outcome


@pytest.mark.usefixtures("without_ray")
def test_a_crash_or_an_error_at_some_operations(stages, world: Path, tmp_path: Path) -> None:
    cases = [case for stage in STAGES for case in local_cases(stages, world, tmp_path / stage, stage)]
    assert len({(stage, at) for stage, at, _ in cases}) > 150
    for i in np.random.default_rng(0).permutation(len(cases))[:8].tolist():
        disturb_local(stages, world, tmp_path / "root", *cases[i])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_or_an_error_at_each_operation(stages, world: Path, tmp_path: Path, stage: str) -> None:
    outcomes = Counter[tuple[str, str, str]]()
    failed = []
    for case in local_cases(stages, world, tmp_path / "counted", stage):
        try:
            outcomes[case[0], case[2], disturb_local(stages, world, tmp_path / "root", *case)] += 1
        except Exception as error:  # all that fail are wanted
            failed.append((*case, repr(error)[:500]))
            shutil.rmtree(tmp_path / "root", ignore_errors=True)
    show(outcomes)
    assert not failed, "\n".join(map(str, failed))


def show(outcomes: Counter[tuple[str, str, str]]) -> None:
    for (stage, how, outcome), times in sorted(outcomes.items()):
        print(f"{stage:8}{how:12}{outcome:8}{times:6}")
    print(f"{outcomes.total()} disturbances")


# --- S3 --------------------------------------------------------------------------------------------------------------

WAITED_OUT = ("drop-ack", "503", "409")
"""What a moment mends: it ends no run."""


def s3_cases(methods: Sequence[str]) -> list[tuple[int, str]]:
    """Number of the request, and what becomes of it.

    waited      one of `WAITED_OUT`; the others befall other requests of the run, for what is waited out leaves no trace
    403         refused, and the next request is answered
    gone        the store is gone from this request on: a crash before it, and a failure that outlasts all patience
    gone-after  gone from the next one on; for a put that is cut off there is "gone", as S3 keeps nothing of it
    507         the store is full from this put on, while what is there can be read
    """
    puts = [at for at, method in enumerate(methods) if method == "PUT"]
    found = [(at, how) for at in range(len(methods)) for how in ("waited", "403", "gone")]
    return found + [(at, how) for at in puts for how in ("gone-after", "507")]


def disturb_on_s3(s3_stages: OnS3, stage: str, at: int, how: str) -> str:
    prefix, proxy = f"{stage}-{at}-{how}", s3_stages.proxy
    methods, after = s3_stages.methods[stage], s3_stages.after[stage]
    said: list[str] = []
    s3_stages.copy(f"before-{stage}", prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(access, "DEADLINE_S", 10.0 if how in ("waited", "403") else 0.0)
        patch.setattr(access, "PAUSES_S", (0.01, 0.1))
        if how == "waited":
            for i, mode in enumerate(WAITED_OUT):
                proxy.fail(mode, method="", skip=(at + i * len(methods) // len(WAITED_OUT)) % len(methods))
        elif how == "507":
            proxy.fail(how, skip=methods[:at].count("PUT"), times=10**9)
        else:
            proxy.fail(how, method="", skip=at)
        outcome = told(lambda: s3_stages.run(stage, prefix, said.append))
    proxy.mend()
    assert how != "waited" or outcome == "done"
    seen = s3_stages.left(prefix)
    check(f"s3://{s3_stages.bucket}/{prefix}", seen, after)
    # What a rerun does depends on what is there and on nothing else, so that one rerun from each state will do.
    if outcome == "done":
        assert seen == after
    elif (state := (stage, frozenset(seen.items()))) not in s3_stages.mended:
        s3_stages.run(stage, prefix, said.append)
        assert s3_stages.left(prefix) == after
        s3_stages.mended.add(state)
    assert not any("made again" in line for line in said)
    s3_stages.delete(prefix)
    return outcome


def test_some_requests_that_fail(s3_stages: OnS3) -> None:
    cases = [(stage, at, how) for stage in STAGES for at, how in s3_cases(s3_stages.methods[stage])]
    assert len({(stage, at) for stage, at, _ in cases}) > 250
    for i in np.random.default_rng(0).permutation(len(cases))[:4].tolist():
        disturb_on_s3(s3_stages, *cases[i])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_each_request_that_fails(s3_stages: OnS3, stage: str) -> None:
    outcomes = Counter[tuple[str, str, str]]()
    failed = []
    for at, how in s3_cases(s3_stages.methods[stage]):
        try:
            outcomes[stage, how, disturb_on_s3(s3_stages, stage, at, how)] += 1
        except Exception as error:  # all that fail are wanted
            failed.append((at, s3_stages.methods[stage][at], how, repr(error)[:500]))
            s3_stages.proxy.mend()
            with contextlib.suppress(Exception):
                s3_stages.delete(f"{stage}-{at}-{how}")
    show(outcomes)
    assert not failed, "\n".join(map(str, failed))
