"""Run the study: settings on a pilot seed, then every arm on fresh seeds, each run a file of its own.

    python -m benchmarks.heads --data FOLDER --out out/heads --report docs/acceleration

What is there is not done again, so a killed study goes on where it was. Each arm has six tries of its settings on a
pilot seed of each world, at 30 % untrue captions with the strong reference, and keeps the best for everything else.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from benchmarks.heads.learner import (
    FORWARD,
    START_BATCH,
    START_RATE,
    START_STEPS,
    TRAIN,
    Arm,
    Heads,
    recall_at_1,
    run,
    train_uniformly,
)
from benchmarks.heads.worlds import POOL, WORLDS, Name, World, make_world

FORMAT = 1
"""Of the records of runs; another one makes all anew."""
PIECE = 12
"""Runs that a process does before it asks for others: a minute or two, beside which a world is made in seconds."""
PILOT_SEED, SEEDS = 100, (1, 2, 3, 4, 5)
SWEPT_SEEDS = SEEDS[:3]
"""Where one thing is changed at a time."""
DIRT, DIRTS = 0.3, (0.0, 0.3, 0.6)
REFERENCES = {
    "strong": {"steps": 2500, "batch": 1024, "rate": 4e-3},
    "weak": {"steps": 600, "batch": 256, "rate": 2e-3},
}
"""Training on the reference's pairs: 2.6 and .15 million examples."""

GAINS = (1.0, 10.0, 100.0)
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 6e-3)
Settings = dict[str, float | int]

JOINT = Arm(method="joint")
JOINT_OPERATIONS = JOINT.steps * (TRAIN * JOINT.batch + FORWARD * JOINT.super_batch)
REFERENCE_OPERATIONS = TRAIN * 2500 * 1024 + FORWARD * POOL
"""Of training the strong reference, and of the pool's embeddings."""
RANDOM = Arm(start="random", steps=2000)
_SELECTED: list[Settings] = [{"gain": gain, "rate": rate} for gain in GAINS for rate in (1e-3, 3e-3)]
_UNIFORM: list[Settings] = [{"rate": rate} for rate in RATES]


def _as_many_operations(operations: int, batches: Sequence[int]) -> list[Settings]:
    """Uniform steps that cost so much."""
    return [
        {"rate": rate, "batch": batch, "steps": operations // (TRAIN * batch)}
        for batch in batches for rate in (3e-4, 1e-3, 3e-3)
    ]  # fmt: skip


_FILTERED: list[Settings] = [{"kept": kept, "rate": rate} for kept in (0.3, 0.5, 0.7) for rate in (1e-3, 3e-3)]

ARMS: dict[str, tuple[Arm, list[Settings]]] = {
    "joint learnability": (JOINT, _SELECTED),
    "independent learnability": (Arm(method="independent"), _SELECTED),
    "uniform": (Arm(), _UNIFORM),
    "joint easy-reference": (Arm(method="joint", criterion="easy_reference"), _SELECTED),
    "independent easy-reference": (Arm(method="independent", criterion="easy_reference"), _SELECTED),
    "joint, the reference is the start": (Arm(method="joint", reference="start"), _SELECTED),
    "independent, the reference is the start": (Arm(method="independent", reference="start"), _SELECTED),
    "auto": (Arm(method="joint", criterion="auto"), _SELECTED),
    "auto, the reference is the start": (Arm(method="joint", criterion="auto", reference="start"), _SELECTED),
    "uniform, same operations": (Arm(), _as_many_operations(JOINT_OPERATIONS, (32, 256))),
    "uniform, operations of joint and a tenth of the reference": (
        Arm(),
        _as_many_operations(JOINT_OPERATIONS + REFERENCE_OPERATIONS // 10, (128, 512)),
    ),
    "uniform, operations of joint and the reference": (
        Arm(),
        _as_many_operations(JOINT_OPERATIONS + REFERENCE_OPERATIONS, (256, 1024)),
    ),
    "uniform, 4 × the steps": (Arm(steps=4000), _UNIFORM),
    "filtered once, uniform": (Arm(rows="filtered"), _FILTERED),
    "the reference's own pairs, uniform": (Arm(rows="reference's"), _UNIFORM),
    "independent learnability, super-batch loss": (Arm(method="super_batch"), _SELECTED),
    "joint hard-learner": (Arm(method="joint", criterion="hard_learner"), _SELECTED),
    "joint, rounds of 10": (Arm(method="joint", round_steps=10), _SELECTED),
    "joint, rounds of 10, shuffled": (Arm(method="joint", round_steps=10, shuffled=True), _SELECTED),
    "joint, normalised by the rows drawn": (Arm(method="joint", terms="normalised"), _SELECTED),
    "joint, without false negatives": (Arm(method="joint", terms="no false negatives"), _SELECTED),
    "random start, joint learnability": (replace(RANDOM, method="joint"), _SELECTED),
    "random start, easy-reference for 300": (replace(RANDOM, method="joint", easy_steps=300), _SELECTED),
    "random start, easy-reference for 1,000": (replace(RANDOM, method="joint", easy_steps=1000), _SELECTED),
    "random start, joint easy-reference": (replace(RANDOM, method="joint", criterion="easy_reference"), _SELECTED),
    "random start, auto": (replace(RANDOM, method="joint", criterion="auto"), _SELECTED),
    "random start, uniform": (RANDOM, _UNIFORM),
}
CORE = (
    "joint learnability",
    "independent learnability",
    "uniform",
    "joint easy-reference",
    "independent easy-reference",
    "auto",
    "uniform, same operations",
)
"""Arms that are run with every share of dirt and both references."""
PRIMARY = (
    "joint learnability",
    "independent learnability",
    "uniform",
    "joint, the reference is the start",
    "independent, the reference is the start",
)
"""Arms of the primary outcome and its control."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run."""

    world: Name
    dirt: float
    seed: int
    arm: Arm
    crowding: float = 1.0

    def path(self, out: Path) -> Path:
        """Where its record lies, named by all that decides it."""
        identity = json.dumps([FORMAT, REFERENCES, asdict(self)], sort_keys=True)
        return out / "runs" / f"{hashlib.sha256(identity.encode()).hexdigest()[:20]}.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders of a study."""

    out: Path
    data: Path


# --- one run ---------------------------------------------------------------------------------------------------------


def run_job(job: Job, place: Place) -> dict[str, Any]:
    """The record of a run; made if it is not there."""
    torch.set_num_threads(1)
    path = job.path(place.out)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    world = _world(job.world, job.seed, job.dirt, job.crowding, place)
    kind: Literal["strong", "weak"] = "weak" if job.arm.reference == "weak" else "strong"
    reference = _reference(job.world, job.seed, job.crowding, kind, place)
    start = _start(job.world, job.seed, job.dirt, job.crowding, job.arm.loss, place)
    learner = Heads(job.seed)
    if job.arm.start == "trained":
        learner.load_state_dict(start.state_dict())
    begun = time.process_time()
    outcome = run(
        job.arm,
        world.pool,
        world.held_out,
        start=learner,
        reference=start if job.arm.reference == "start" else reference,
        reference_pairs=world.reference,
        seed=job.seed,
    )
    record = (
        asdict(job)
        | asdict(outcome)
        | {
            "reference_r1": recall_at_1(reference, world.held_out),
            "start_r1": recall_at_1(start, world.held_out),
            "cpu_s": time.process_time() - begun,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(record))
    scratch.replace(path)
    return record


@functools.lru_cache(1)  # jobs of one world follow each other
def _world(name: Name, seed: int, dirt: float, crowding: float, place: Place) -> World:
    return make_world(name, seed=seed, dirt=dirt, crowding=crowding, data=place.data, cache=place.out)


@functools.lru_cache(4)
def _reference(name: Name, seed: int, crowding: float, kind: str, place: Place) -> Heads:
    how: dict[str, Any] = REFERENCES[kind]
    pairs = _world(name, seed, DIRT, crowding, place).reference
    return _trained(
        ["reference", name, seed, crowding, how], place, lambda model: train_uniformly(model, pairs, seed=seed, **how)
    )


@functools.lru_cache(2)
def _start(name: Name, seed: int, dirt: float, crowding: float, loss: Any, place: Place) -> Heads:
    pool = _world(name, seed, dirt, crowding, place).pool
    return _trained(
        ["start", name, seed, dirt, crowding, loss, START_STEPS, START_BATCH, START_RATE],
        place,
        lambda model: train_uniformly(
            model, pool, steps=START_STEPS, batch=START_BATCH, rate=START_RATE, seed=seed, loss=loss, decays=False
        ),
    )


def _trained(identity: Sequence[Any], place: Place, train: Callable[[Heads], None]) -> Heads:
    """A model that is trained once."""
    digest = hashlib.sha256(json.dumps([FORMAT, *identity]).encode()).hexdigest()[:16]
    path = place.out / "models" / f"{identity[0]}-{identity[1]}-{digest}.pt"
    model = Heads(1000 + int(identity[2]) if identity[0] == "reference" else int(identity[2]))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    train(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), scratch)
    scratch.replace(path)
    return model


# --- what is run -----------------------------------------------------------------------------------------------------


def pilot_jobs(worlds: Iterable[Name] = WORLDS, arms: Iterable[str] = ARMS) -> list[tuple[str, Job]]:
    """Six tries of each arm in each world."""
    return [
        (name, Job(world=world, dirt=DIRT, seed=PILOT_SEED, arm=replace(arm, **some)))  # type: ignore[arg-type]
        for world in worlds for name in arms for arm, tries in [ARMS[name]] for some in tries
    ]  # fmt: skip


def settled(place: Place, worlds: Iterable[Name] = WORLDS, arms: Iterable[str] = ARMS) -> dict[tuple[Name, str], Arm]:
    """Each arm in each world with the settings that were best on the pilot seed."""
    best: dict[tuple[Name, str], tuple[float, Arm]] = {}
    for name, job in pilot_jobs(worlds, arms):
        r1 = float(run_job(job, place)["r1"])
        if r1 > best.get((job.world, name), (-1.0, job.arm))[0]:
            best[job.world, name] = r1, job.arm
    return {key: arm for key, (_, arm) in best.items()}


def main_jobs(arms: dict[tuple[Name, str], Arm], seeds: Sequence[int] = SEEDS) -> list[tuple[str, Job]]:
    """Every arm at 30 %, and the core ones, where all are asked for, at every share and with the weak reference."""
    jobs = []
    for seed in seeds:
        for (world, name), arm in arms.items():
            jobs.append((name, Job(world=world, dirt=DIRT, seed=seed, arm=arm)))
    if set(CORE) - {name for _, name in arms}:
        return jobs
    for seed in seeds:
        for (world, name), arm in arms.items():
            if name not in CORE:
                continue
            jobs += [(name, Job(world=world, dirt=dirt, seed=seed, arm=arm)) for dirt in DIRTS if dirt != DIRT]
            if arm.selects:
                weak = replace(arm, reference="weak")
                jobs.append((f"{name}, weak reference", Job(world=world, dirt=DIRT, seed=seed, arm=weak)))
    return jobs


_ALIKE: Settings = {"gain": 10.0, "rate": 1e-3}
"""Of joint and independent selection, where what was best for 1,000 steps at b = 32 may be so no more."""


def sweep_jobs(arms: dict[tuple[Name, str], Arm], seeds: Sequence[int] = SWEPT_SEEDS) -> list[tuple[str, Job]]:
    """One thing changed at a time, joint and independent learnability and uniform, in `concepts` at 30 %."""
    changes: dict[str, dict[str, Any]] = {
        **{f"f {f}": {"filter_ratio": f} for f in (0.5, 0.8, 0.9, 0.95)},
        **{f"scored every {n}": {"round_steps": n} | _ALIKE for n in (10, 100)},
        # The super-batch stays and so do the steps, as in figure 7 of arXiv 2406.17711.
        **{f"b {b}": {"batch": b, "filter_ratio": 1 - b / 10_240} | _ALIKE for b in (32, 128, 512, 1024)},
        "softmax": {"loss": "softmax"} | _ALIKE,
        "a quarter uniform": {"uniform_share": 0.25},
        **{f"{n} chunks": {"n_chunks": n} for n in (4, 32)},
    }
    jobs = []
    for seed in seeds:
        for change, how in changes.items():
            for name in ("joint learnability", "independent learnability", "uniform"):
                if name == "uniform" and not {"batch", "loss"} & set(how):
                    continue
                own = {key: value for key, value in how.items() if name != "uniform" or key not in _ALIKE}
                arm = replace(arms["concepts", name], **own)
                jobs.append((f"{name}, {change}", Job(world="concepts", dirt=DIRT, seed=seed, arm=arm)))
        for crowding in (0.25, 4.0):
            for name in ("joint learnability", "independent learnability", "uniform"):
                arm = arms["concepts", name]
                job = Job(world="concepts", dirt=DIRT, seed=seed, arm=arm, crowding=crowding)
                jobs.append((f"{name}, {round(400 / crowding)} clusters", job))
    return jobs


def run_all(jobs: Iterable[tuple[str, Job]], place: Place, *, processes: int, label: str) -> list[dict[str, Any]]:
    """Run what is not there; the records of all, each with its arm's name.

    Jobs of one world and seed are run in pieces by one process each, which makes world, reference and start once.
    """
    jobs = list(jobs)
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for _, job in jobs:
        if not job.path(place.out).exists():
            groups.setdefault((job.seed, job.world, job.crowding, job.dirt), []).append(job)
    missing = sum(map(len, groups.values()))
    if missing:
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(processes, mp_context=context) as pool,
            tqdm(total=missing, desc=label, unit="run", disable=None) as bar,
        ):
            pieces = [group[i : i + PIECE] for group in groups.values() for i in range(0, len(group), PIECE)]
            for done in pool.map(_run_piece, pieces, [place] * len(pieces)):
                bar.update(done)
    return [{"name": name} | run_job(job, place) for name, job in jobs]


def _run_piece(jobs: list[Job], place: Place) -> int:
    for job in jobs:
        run_job(job, place)
    return len(jobs)


def main() -> None:
    """Run the study, or those parts of it that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of emoji-en and openstax-*; without it two worlds are run")
    parser.add_argument("--out", type=Path, default=Path("out/heads"))
    parser.add_argument("--report", type=Path, help="folder for the tables and figures")
    parser.add_argument("--parts", default="pilot,main,sweeps", help="of pilot, main, sweeps")
    parser.add_argument("--primary", action="store_true", help="only the arms of the primary outcome, at 30 %%")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    place = Place(out=arguments.out, data=arguments.data or Path())
    worlds: tuple[Name, ...] = WORLDS if arguments.data else WORLDS[:2]
    parts, seeds = arguments.parts.split(","), SEEDS[: arguments.seeds]
    names = PRIMARY if arguments.primary else tuple(ARMS)
    run_all(pilot_jobs(worlds, names), place, processes=arguments.processes, label="pilot")
    arms = settled(place, worlds, names)
    records = []
    if "main" in parts:
        records += run_all(main_jobs(arms, seeds), place, processes=arguments.processes, label="main")
    if "sweeps" in parts and not arguments.primary:
        swept = [seed for seed in SWEPT_SEEDS if seed in seeds]
        records += run_all(sweep_jobs(arms, swept), place, processes=arguments.processes, label="sweeps")
    if arguments.report:
        from benchmarks.heads.report import write_report  # noqa: PLC0415  matplotlib, which workers need not import

        write_report(records, arms, arguments.report)
