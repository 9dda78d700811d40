"""Garbage: what lies in a root and is needed by nobody any more, after a period of grace.

Never what a reader or a trainer may still read (manifests, curated files, learners, models, checkpoints), what a round
in progress has made, what a later round compares with or `curate show` explains rounds by (the selected rows of
committed rounds, their index and windows), or the embeddings of a reference. Of a candidate that was not chosen `show`
knows the learner's loss no more.

Two things go only if somebody asks: the rows of old rounds, whose manifests stay, and the models of old learners, whose
records stay. Both begin where the newest learner has been: a round that it was not trained on is never touched.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from curate.errors import UserError
from curate.models.learners import LearnerCheckpoint, newest_learner, read_learner
from curate.rounds.manifest import Manifest, expire, last_round, read_manifest, round_folder, steps_folder
from curate.rounds.plan import Plan, plan_name
from curate.storage import Store

GRACE_S = 24 * 3600.0
SCOPE = re.compile(r"embeddings/[^/]+/(window|sample)-[^/]+")
PARTS = re.compile(r"(rounds/[^/]+/steps-[^/]+|windows/[^/]+|(index|dedup)/[^/]+/[^/]+)/[a-z]+(-[^/.]+)*-\d{6}")
"""Files of parts, which whoever wants them makes again: alone among a root's files they have no suffix."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A file that can go."""

    kind: str
    """Why, for people."""
    name: str
    """Within the root; or, of what a killed process left on a local disk, its path."""
    size: int
    expires: int | None = None
    """Number of the round that can be read no more without it."""


Old = Callable[[str, str], Iterator[Garbage]]
"""From a kind and a name: the file, if it is there and old enough."""


def find_garbage(
    store: Store,
    *,
    grace_s: float = GRACE_S,
    now: float | None = None,
    keep_rounds: int | None = None,
    keep_learners: int | None = None,
    in_use: Collection[str] = (),
) -> Iterator[Garbage]:
    """What can go, by kinds. Reads every manifest and every learner's record: a job that is run once in a while.

    Args:
        store: the root.
        grace_s: files that were written less than so many seconds ago stay, whatever they are.
        now: seconds since 1970; the time of this machine if None. A store has a clock of its own: grace covers both.
        keep_rounds: how many of the newest rounds keep their rows; all if None.
        keep_learners: how many of the newest learners keep their models; all if None.
        in_use: models that stay in any case, by name: what a checkpoint of the trainer starts from.

    Raises:
        UserError: nothing is there.
    """
    if not store.list():
        raise UserError(f"{store.url}: expected a root, found nothing there; correct it")
    until = (time.time() if now is None else now) - grace_s

    def old(kind: str, name: str) -> Iterator[Garbage]:
        written, size = store.modified(name), store.size(name)
        if written is not None and size is not None and written <= until:
            yield Garbage(kind=kind, name=name, size=size)

    newest = last_round(store)
    rounds = [found[0] for number in range(newest + 1) if (found := read_manifest(store, number))]
    learners = _learners(store)
    kept = _models_in_use(store, rounds) | set(in_use)
    yield from _of_learners(store, learners, kept, old)
    if keep_learners is not None:
        yield from _models(store, learners, keep_learners, kept, old)
    trained = learners[-1].next_batch if learners else 0
    for manifest in rounds:
        expired = keep_rounds is not None and manifest.round <= newest - keep_rounds and manifest.stop_batch <= trained
        yield from _of_round(store, manifest, old, expired=expired)
    for folder in (
        *store.list("windows"),
        *(inner for kind in ("index", "dedup") for outer in store.list(kind) for inner in store.list(outer)),
    ):
        for name in store.list(folder):
            if PARTS.fullmatch(name):
                yield from old("parts that a killed step left", name)
    yield from _of_killed(store, until)


def _learners(store: Store) -> list[LearnerCheckpoint]:
    """All published learners, the newest last."""
    newest = newest_learner(store)
    found = []
    for number in range(newest.number if newest else 0):
        with contextlib.suppress(FileNotFoundError):  # a trainer may pass over numbers
            found.append(read_learner(store, number))
    return [*found, newest] if newest else []


def _models_in_use(store: Store, rounds: Sequence[Manifest]) -> set[str]:
    """Models that some round's reference is, and those of the newest round and of one in progress."""
    kept = {manifest.lineage["reference"]["model"] for manifest in rounds}
    if rounds and rounds[-1].lineage["learner"]:
        kept.add(rounds[-1].lineage["learner"]["model"])
    begun = plan_name(len(rounds))
    if store.exists(begun):
        plan = Plan.from_bytes(store.read_bytes(begun), begun)
        kept |= {plan.reference.model, *([plan.learner.model] if plan.learner else [])}
    return kept


def _of_learners(
    store: Store, learners: Sequence[LearnerCheckpoint], kept: Collection[str], old: Old
) -> Iterator[Garbage]:
    """Embeddings by learners that are neither the newest nor in use."""
    gone = {learner.encoder.model for learner in learners[:-1]} - {*kept, *(one.encoder.model for one in learners[-1:])}
    for folder in store.list("embeddings"):
        if folder.rpartition("/")[2].partition("-")[0] not in gone:
            continue
        for name in store.list(folder):
            for file in store.list(name) if SCOPE.fullmatch(name) else [name]:
                yield from old("embeddings by learners that no round scores with any more", file)


def _models(
    store: Store, learners: Sequence[LearnerCheckpoint], keep: int, kept: Collection[str], old: Old
) -> Iterator[Garbage]:
    """Models of learners but the first, which trainings start from, and the newest."""
    stay = {learner.encoder.model for learner in (*learners[:1], *learners[-max(1, keep) :])}
    for model in sorted({learner.encoder.model for learner in learners} - stay - set(kept)):
        for name in store.list(f"models/{model}"):
            yield from old("models of earlier learners", name)


def _of_round(store: Store, manifest: Manifest, old: Old, *, expired: bool) -> Iterator[Garbage]:
    """What a committed round did not need: steps of other plans, and curated files that no manifest names.

    Of one that is expired also what it needed; manifest and plan stay.
    """
    folder = round_folder(manifest.round)
    steps = steps_folder(manifest.round, manifest.lineage["plan"])
    named = {f"{folder}/{file.name}" for file in manifest.files}
    for name in store.list(folder):
        for file in store.list(name) if "/steps-" in name else [name] if "/curated-" in name else []:
            if "/steps-" in name and name != steps:
                yield from old("steps of attempts that were not committed", file)
            elif PARTS.fullmatch(file):
                yield from old("parts that a killed step left", file)
            elif "/curated-" in name and name not in named:
                yield from old("curated files that no manifest names", file)
            elif expired:
                for garbage in old("rows of earlier rounds", file):
                    yield replace(garbage, expires=manifest.round)


def _of_killed(store: Store, until: float) -> Iterator[Garbage]:
    """Temporary files and folders of killed processes, which only a local root has."""
    inside = store.local_path("root")
    if inside is None:
        return
    for path in sorted([*inside.parent.rglob(".tmp-*"), *inside.parent.rglob(".probe-*")]):
        if path.exists() and path.stat().st_mtime <= until:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            yield Garbage(kind="temporary files of killed processes", name=str(path), size=size)


def remove_garbage(store: Store, garbage: Garbage) -> None:
    """Remove it; nothing to do if somebody else did."""
    if garbage.expires is not None:
        expire(store, garbage.expires)  # first, so that whoever misses a file is told why
    if not Path(garbage.name).is_absolute():
        store.delete(garbage.name)
    elif Path(garbage.name).is_dir():
        shutil.rmtree(garbage.name, ignore_errors=True)
    else:
        Path(garbage.name).unlink(missing_ok=True)
