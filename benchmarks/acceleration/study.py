"""Train learners on batches chosen in many ways, and see which of them learn faster.

    python -m benchmarks.acceleration benchmarks/acceleration/quick.toml

Sets, references and runs are files below --out, each named by all that decides it: what is there is not done again,
so a killed study goes on where it was, and a plan that is added costs only its own runs. Tables, curves and figures
are written to --report.
"""

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.acceleration.config import UNIFORM, PlanSection, StudySection, load_study
from benchmarks.acceleration.flops import forward_flops, spent_flops
from benchmarks.acceleration.loop import ArmSection, Loop, Reference, embed
from benchmarks.acceleration.report import write_report
from benchmarks.acceleration.sets import WANTED, Pairs, load_pairs, make_set
from benchmarks.acceleration.variants import without_near_duplicates
from curate.errors import UserError
from curate.models.create import OpenClip, create_model
from curate.models.encoder import Encoder
from curate.models.spec import EncoderSpec
from curate.recipe import EncoderSection
from curate.select.draw import Scale

HERE = Path(__file__).parent
FORMAT = 2
"""Of the records of runs; another one makes all anew."""
_ends = math.inf
"""Time at which this process halts what it does."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a learner, on a set, by an arm."""

    study: StudySection
    plan: PlanSection
    arm: str
    seed: int
    out: Path
    data: Path | None
    device: str

    @property
    def path(self) -> Path:
        """Where its record lies."""
        identity = {
            "training": self._training,
            "set": self.set_key,
            "arm": self.study.arms[self.arm].model_dump(mode="json"),
            "reference": self.reference_path.name,
            "every": self.study.evaluate_every,
            "steps": self.steps,
            "warm": self.warm_path and self.warm_path.name,
            "seed": self.seed,
            "cosine": self.plan.cosine,
        }
        name = f"{self.plan.set}-{self.plan.pool_seed}-{self.arm}-{self.steps}-s{self.seed}-{_digest(identity)}"
        return self.out / "runs" / f"{name}.json"

    @property
    def steps(self) -> int:
        """Of this learner."""
        return self.plan.steps_of(self.arm)

    @property
    def set_key(self) -> str:
        """Names the set's folder by all that its pictures depend on."""
        section = self.study.sets[self.plan.set]
        real = section.source != "drawn" and self.data is not None
        return f"{self.plan.set}-{self.plan.pool_seed}-{_digest([FORMAT, section.model_dump(mode='json'), real])}"

    @property
    def set_folder(self) -> Path:
        """Where its shards lie."""
        return self.out / "sets" / self.set_key

    @property
    def reference_path(self) -> Path:
        """Where the weights lie; sets whose reference pairs are alike share one."""
        section = self.study.sets[self.plan.set]
        alike: Any = self.set_key
        kind = self.study.arms[self.arm].reference
        if kind == "clean" and section.source in {"drawn", "web"}:
            alike = [self.plan.pool_seed, section.reference_rows, section.words, section.image_size]
        identity = [self._training, alike, kind, self.study.reference.steps]
        return self.out / "references" / f"{_digest(identity)}.pt"

    @property
    def vectors_path(self) -> Path:
        """Where the reference's embeddings of this pool lie."""
        return self.reference_path.with_name(f"{self.reference_path.stem}-{self.set_key}.npz")

    @property
    def warm_path(self) -> Path | None:
        """Where the weights lie that its learner begins with; None if it begins with random ones."""
        if not self.plan.warm_steps:
            return None
        identity = [self._training, self.set_key, self.plan.warm_steps, self.seed]
        return self.out / "warm" / f"{_digest(identity)}.pt"

    @property
    def _training(self) -> list[Any]:
        """What all that is trained depends on."""
        return [
            FORMAT,
            (HERE / self.study.model).read_text(),
            self.study.training.model_dump(mode="json"),
            self.study.arms[UNIFORM].model_dump(mode="json"),
            self.device,
        ]


def make_pairs(job: Job) -> None:
    """Draw the set and decode it."""
    make_set(job.study.sets[job.plan.set], job.set_folder, seed=job.plan.pool_seed, data=job.data)
    load_parts(job)


def train_reference(job: Job) -> None:
    """Train the reference on its clean pairs, or on the pool where the arm wants a weak one."""
    if job.reference_path.exists():
        return
    parts = load_parts(job)
    pairs = parts["pool" if job.study.arms[job.arm].reference == "weak" else "reference"]
    training = job.study.training.model_copy(update={"steps": job.study.reference.steps})
    model, config, tokenizer = make_model(job, 1_000_000 + job.plan.pool_seed)
    loop = Loop(
        pairs,
        model,
        tokenizer,
        spec_of(model, config),
        _no_reference(len(pairs), config["embed_dim"]),
        job.study.arms[UNIFORM],
        training,
        rows=np.arange(len(pairs)),
        seed=1_000_000 + job.plan.pool_seed,
        device=torch.device(job.device),
    )
    if not _train(loop, job.study.reference.steps, job.reference_path):
        return
    quality = loop.retrieve(parts["held-out"])
    _save(job.reference_path, partial(torch.save, {"weights": model.state_dict(), "quality": quality}))


def warm_learner(job: Job) -> None:
    """Train a learner uniformly, for the arms of its seed to begin with."""
    path = job.warm_path
    if path is None or path.exists():
        return
    loop = _loop(job, job.study.arms[UNIFORM], load_parts(job)["pool"])
    if not _train(loop, job.plan.warm_steps, path):
        return
    _save(path, partial(torch.save, loop.model.state_dict()))


def embed_reference(job: Job) -> None:
    """Embed the pool with the reference, once for all runs."""
    if job.vectors_path.exists():
        return
    model, config, tokenizer = make_model(job, 0)
    model.load_state_dict(torch.load(job.reference_path)["weights"])
    pool = load_parts(job)["pool"]
    encoder = Encoder(spec_of(model, config), model, tokenizer, torch.device(job.device))
    zimg, ztxt = embed(encoder, pool, np.arange(len(pool)))
    scale = [encoder.spec.logit_scale, encoder.spec.logit_bias]
    _save(job.vectors_path, lambda file: np.savez(file, zimg=zimg, ztxt=ztxt, scale=scale))


def run(job: Job) -> None:
    """Train one learner and write what came of it."""
    if job.path.exists():
        return
    begun = time.perf_counter()
    arm = job.study.arms[job.arm]
    parts = load_parts(job)
    pool = parts["pool"]
    if arm.pool == "reference":
        pool = parts["reference"]
    loop = _loop(job, arm, pool)
    if job.warm_path is not None:
        loop.model.load_state_dict(torch.load(job.warm_path))
    config = json.loads((HERE / job.study.model).read_text())
    curve: list[dict[str, Any]] = []

    def evaluate(step: int) -> None:
        cost = loop.account
        if step % job.study.evaluate_every == 0:
            curve.append(
                {
                    "step": step,
                    "examples": cost.trained,
                    "unique": len(cost.seen),
                    "flops": spent_flops(
                        config,
                        trained=cost.trained,
                        trained_smaller=cost.trained_smaller,
                        scored=cost.learner_scored,
                        smaller=arm.scoring_resolution,
                    ),
                    "wall_s": cost.train_s + cost.score_s + cost.select_s,
                    **loop.retrieve(parts["held-out"]),
                }
            )

    if not _train(loop, job.steps, job.path, curve, evaluate):
        return
    cost = loop.account
    record = {
        "set": job.plan.set,
        "arm": job.arm,
        "seed": job.seed,
        "pool_seed": job.plan.pool_seed,
        "steps": job.steps,
        "curve": curve,
        "kinds": {kind: count / cost.trained for kind, count in sorted(cost.kinds.items())},
        "walked_rows": len(loop.rows),
        "candidates": cost.candidates,
        "learner_scored": cost.learner_scored,
        "decided": dict(sorted(cost.decided.items())),
        "reference_flops": forward_flops(config) * len(pool) if reference_is_read(arm) else 0.0,
        "train_s": cost.train_s,
        "score_s": cost.score_s,
        "select_s": cost.select_s,
        "total_s": time.perf_counter() - begun,
        "reference_quality": torch.load(job.reference_path)["quality"],
        "device": torch.cuda.get_device_name() if job.device == "cuda" else _processor(),
        **({"others": loop.retrieve(parts["others"])} if "others" in parts else {}),
    }
    _save(job.path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))


def _train(
    loop: Loop,
    steps: int,
    path: Path,
    curve: list[dict[str, Any]] | None = None,
    each: Callable[[int], None] = lambda step: None,
) -> bool:
    """Train a loop to its end, or until time is up; what was halted goes on from there. Returns whether it ended."""
    halted = path.with_suffix(".halted")
    curve = [] if curve is None else curve
    if halted.exists():
        state = torch.load(halted, weights_only=False)  # our own, of a minute ago
        loop.load_state_dict(state["loop"])
        curve += state["curve"]
    batches = loop.batches()
    while loop.step < steps:
        if _time_is_up():
            _save(halted, partial(torch.save, {"loop": loop.state_dict(), "curve": curve}))
            return False
        loop.train(next(batches))
        each(loop.step)
    halted.unlink(missing_ok=True)
    return True


def reference_is_read(arm: ArmSection) -> bool:
    """Whether the arm's scores, or its deduplication, need the reference's embeddings of the pool."""
    selection = arm.selection
    return arm.pool in ("deduplicated", "filtered") or (
        selection.method != "uniform" and selection.criterion != "hard_learner"
    )


def main() -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.acceleration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="a TOML file beside this module")
    parser.add_argument("--out", type=Path, default=Path("out/acceleration"), help="sets, references and runs")
    parser.add_argument("--report", type=Path, help="folder for table, JSON and figures; OUT/report if not given")
    parser.add_argument("--data", type=Path, help="folder of emoji-en, openstax-dev and openstax-physics-ml")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, help="processes, each with one thread; one per core, or one with CUDA")
    parser.add_argument(
        "--minutes", type=float, help="halt after so many, with status 75; the same command goes on from there"
    )
    arguments = parser.parse_args()
    try:
        _run_study(arguments)
    except UserError as error:
        parser.exit(2, "".join(f"{line}\n" for line in error.lines))
    except _HaltedError as halted:
        parser.exit(os.EX_TEMPFAIL, f"{halted}\n")


def _run_study(arguments: argparse.Namespace) -> None:
    study = load_study(arguments.study)
    jobs = [
        Job(
            study=study,
            plan=plan,
            arm=arm,
            seed=seed,
            out=arguments.out,
            data=arguments.data,
            device=arguments.device,
        )
        for plan in study.plans
        for seed in plan.seeds
        for arm in dict.fromkeys([UNIFORM, *plan.arms])
    ]
    workers = arguments.workers or (1 if arguments.device == "cuda" else os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    ends = math.inf if arguments.minutes is None else time.time() + 60 * arguments.minutes
    _begin_worker(ends)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(ends,)) as executor:
        _all(executor, "sets", make_pairs, {job.set_folder: job for job in jobs})
        _all(executor, "references", train_reference, {job.reference_path: job for job in jobs})
        _all(executor, "embeddings", embed_reference, {job.vectors_path: job for job in jobs})
        _all(executor, "warm learners", warm_learner, {job.warm_path: job for job in jobs if job.warm_path})
        _all(executor, "runs", run, {job.path: job for job in jobs})
    runs = [(job.plan, json.loads(job.path.read_text())) for job in jobs]
    write_report(runs, arguments.report or arguments.out / "report", source=arguments.study)


def _all(executor: ProcessPoolExecutor, title: str, work: Callable[[Job], None], jobs: Mapping[Path, Job]) -> None:
    """Do one step of a study for each file that it makes.

    Raises:
        _HaltedError: time was up before all were made.
    """
    pending = {executor.submit(_in_time, work, job) for job in jobs.values()}
    with tqdm(total=len(pending), desc=title, unit="", disable=None) as bar:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            bar.update(len(done))
    if left := sum(not path.exists() for path in jobs):
        raise _HaltedError(f"time is up: {left} of {len(jobs)} {title} are left; the same command goes on")


def _in_time(work: Callable[[Job], None], job: Job) -> None:
    if not _time_is_up():
        work(job)


class _HaltedError(Exception):
    """Time was up before all was done."""


def _time_is_up() -> bool:
    return time.time() >= _ends


def _begin_worker(ends: float) -> None:
    global _ends  # noqa: PLW0603  of a process that does nothing else
    _ends = ends
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of every model that begins with random weights


def _loop(job: Job, arm: ArmSection, pool: Pairs) -> Loop:
    """A learner with random weights before its first step."""
    reference = load_reference(job)
    training, rows = job.study.training, np.arange(len(pool))
    if job.plan.cosine:
        training = training.model_copy(update={"steps": job.steps})
    if arm.pool == "wanted":
        rows = np.flatnonzero(pool.kind == WANTED)
    elif arm.pool == "deduplicated":
        rows = without_near_duplicates(reference.vectors[0])
    elif arm.pool == "filtered":
        cosines = (reference.vectors[0].astype(np.float32) * reference.vectors[1]).sum(1)
        rows = np.sort(np.argsort(-cosines, kind="stable")[: round(arm.kept * len(pool))])
    elif arm.pool == "reference":
        reference = _no_reference(len(pool), reference.vectors[0].shape[1])
    model, config, tokenizer = make_model(job, job.seed)
    return Loop(
        pool,
        model,
        tokenizer,
        spec_of(model, config),
        reference,
        arm,
        training,
        rows=rows,
        seed=job.seed,
        device=torch.device(job.device),
    )


def _no_reference(rows: int, width: int) -> Reference:
    """What uniform batches are drawn beside, which look at nothing."""
    nothing = np.ones((rows, width), np.float16)
    return Reference(vectors=(nothing, nothing), scale=Scale(logit_scale=1.0, logit_bias=0.0))


def load_reference(job: Job) -> Reference:
    """The reference's embeddings of the job's pool."""
    stored = np.load(job.vectors_path)
    return Reference(
        vectors=(stored["zimg"], stored["ztxt"]),
        scale=Scale(logit_scale=float(stored["scale"][0]), logit_bias=float(stored["scale"][1])),
    )


def load_parts(job: Job) -> dict[str, Pairs]:
    """The job's set in memory, by folder."""
    model, config, tokenizer = make_model(job, 0)
    encoder = Encoder(spec_of(model, config), model, tokenizer, torch.device(job.device))
    names = [name for name in ("pool", "reference", "held-out", "others") if (job.set_folder / name).is_dir()]
    return {name: load_pairs(job.set_folder / name, encoder) for name in names}


def make_model(job: Job, seed: int) -> OpenClip:
    """The study's model with random weights."""
    section = EncoderSection(model=job.study.model)
    model, config, tokenizer = create_model(section, role="learner", base=HERE, seed=seed)
    return model.to(job.device), config, tokenizer


def spec_of(model: Any, config: dict[str, Any]) -> EncoderSpec:
    """What an encoder must know of a model that is in no root."""
    return EncoderSpec(
        model="in memory",
        source="benchmark",
        weights_sha256="",
        embed_dim=config["embed_dim"],
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=float(model.logit_bias.detach()),
        precision="fp32",
    )


def _save(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file such that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        write(file)
    scratch.rename(path)


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
