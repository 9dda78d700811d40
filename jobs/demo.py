"""`make demo`: the whole loop on a small drawn pool, in a few minutes on a laptop without a GPU.

Each step is a command of `curate` that is printed before it runs, so everything here can be repeated by hand.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curate.embed.files import embedding_name, read_embeddings
from curate.errors import CurateError
from curate.jobs import cli
from curate.jobs.drawn_pool import PoolTruth, draw_pool
from curate.models.spec import EncoderSpec
from curate.pool.shards import load_pool
from curate.rounds.manifest import last_round, read_manifest, round_folder
from curate.storage import Store

FOLDER = Path("demo")
RECIPES = os.path.relpath(Path(__file__).resolve().parent / "recipes")
ROOT, UNIFORM = FOLDER / "root", FOLDER / "uniform"
BAR_WIDTH = 50


def main() -> None:
    """Run the demo in the working directory; what an earlier run left in `demo/` is removed.

    Raises:
        CurateError: a step failed.
    """
    begun = time.monotonic()
    # Of this and its processes, before any imports torch: models so small are fastest on one thread, and curation and
    # trainer run beside each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cli.silence_open_clip()
    shutil.rmtree(FOLDER, ignore_errors=True)

    say("a pool of drawn pictures: some captions belong to other pictures, some rows are broken, some are copies")
    drawn: dict[str, Any] = {"image_size": 24, "words": 4}
    draw_pool(FOLDER / "clean", rows=6_000, shards=2, seed=1, **drawn)
    draw_pool(FOLDER / "held-out", rows=1_000, shards=1, seed=2, **drawn)
    truth = draw_pool(
        FOLDER / "pool",
        rows=11_400,
        shards=6,
        seed=0,
        swapped_share=0.3,
        broken_share=0.01,
        duplicate_share=0.05,
        **drawn,
    )
    say("a small reference model, trained on other pairs that are all clean; a learner, trained on the pool as it is")
    start = {"pool.path": FOLDER / "pool", "root": FOLDER / "start", "train.steps": 900}
    train = ("train", f"{RECIPES}/demo-reference.toml")
    side_by_side(
        {
            "reference": (*train, "--save-to", str(FOLDER / "reference-model")),
            "learner": (*train, *_sets(start), "--save-to", str(FOLDER / "start-model")),
        }
    )
    say("curation and trainer, two processes that meet in files alone: each round is chosen for the newest learner")
    side_by_side({"curation": ("rounds", f"{RECIPES}/demo.toml"), "trainer": ("train", f"{RECIPES}/demo.toml")})
    say("the same start and as many steps on uniform batches, to compare with")
    curate("train", f"{RECIPES}/demo.toml", *_sets({"train.data": "pool", "root": UNIFORM}))

    say("what was chosen, what was dropped, and why")
    curate("show", str(ROOT), "rounds")
    for uid in examples():
        curate("show", str(ROOT), "uid", uid)
    say(verdict(truth))
    say("recall at 1 on held-out pairs, of chosen and of uniform batches")
    print("\n".join(curves({"chosen": ROOT, "uniform": UNIFORM})))
    say("pictures of what was chosen and what was left, in one HTML file")
    curate("report", str(ROOT), "--to", str(FOLDER / "report.html"))
    print(f"\ndone in {time.monotonic() - begun:.0f} s; everything is in {FOLDER}/; open {FOLDER / 'report.html'}")


def _sets(fields: Mapping[str, object]) -> list[str]:
    """Fields of a recipe as options."""
    return [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


def say(text: str) -> None:
    """A heading."""
    print(f"\n── {text}", flush=True)


def curate(*arguments: str) -> None:
    """Run a command of `curate` in this process, which keeps Ray running between commands."""
    print(f"$ curate {shlex.join(arguments)}", flush=True)
    cli.app(arguments, standalone_mode=False)


def side_by_side(commands: dict[str, tuple[str, ...]]) -> None:
    """Run commands of `curate` as processes of their own, each line of theirs headed by its name.

    Raises:
        CurateError: one of them failed; the others are stopped, for they might wait for it.
    """
    processes: dict[str, subprocess.Popen[str]] = {}
    readers = []
    width = max(map(len, commands))
    for name, arguments in commands.items():
        print(f"$ curate {shlex.join(arguments)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "curate.jobs.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes[name] = process
        readers.append(threading.Thread(target=_pass_on, args=(process, f"{name:>{width}} │ "), daemon=True))
        readers[-1].start()
    try:
        while any(process.poll() is None for process in processes.values()):
            for name, process in processes.items():
                if process.poll():
                    raise CurateError(f"the {name} ended with status {process.returncode}; its last lines say why")
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()
        for reader in readers:
            reader.join()


def _pass_on(process: "subprocess.Popen[str]", head: str) -> None:
    for line in process.stdout or ():
        print(f"{head}{line}", end="", flush=True)


def examples() -> Sequence[str]:
    """Keys of a chosen row, of a row that could not be used and of an exact duplicate."""
    store = Store(str(ROOT))
    found = read_manifest(store, 1)
    assert found is not None
    manifest = found[0]
    pool = load_pool(store, manifest.lineage["pool"]["fingerprint"])
    reference = EncoderSpec(**manifest.lineage["reference"])
    chosen = pq.read_table(ROOT / round_folder(1) / manifest.files[0].name, columns=["key"])["key"][0].as_py()
    broken = next(
        uid
        for shard in pool.shards
        for uid, status in zip(
            *read_embeddings(store, embedding_name(reference.sha, shard), ["uid", "status"]).to_pydict().values(),
            strict=True,
        )
        if status != "ok"
    )
    duplicate = next(
        key
        for path in sorted((FOLDER / "pool").iterdir())
        for key, original in zip(
            *pq.read_table(path, columns=["key", "duplicate_of"]).to_pydict().values(), strict=True
        )
        if original is not None
    )
    return [chosen, broken, duplicate]


def verdict(truth: PoolTruth) -> str:
    """How many swapped captions got into each round, against the pool: what the reference is for."""
    lines = [f"captions of another picture: {truth.swapped / truth.rows:.1%} of the pool"]
    store = Store(str(ROOT))
    for number in range(last_round(store) + 1):
        found = read_manifest(store, number)
        assert found is not None
        files = [ROOT / round_folder(number) / file.name for file in found[0].files]
        swapped = [value for file in files for value in pq.read_table(file, columns=["swapped"])["swapped"].to_pylist()]
        lines.append(f"{sum(swapped) / len(swapped):.1%} of round {number}")
    return ", ".join(lines)


def curves(roots: Mapping[str, Path]) -> list[str]:
    """What trainers measured as they went, a line for each step and a bar for each root."""
    measured = {name: _measured(root) for name, root in roots.items()}
    longest = max(value for curve in measured.values() for value in curve.values())
    lines = []
    for step in sorted(set().union(*measured.values())):
        label = f"step {step}"
        for name, curve in measured.items():
            if step in curve:
                lines.append(f"{label:>9} {name:>8} {curve[step]:.3f} {'█' * round(BAR_WIDTH * curve[step] / longest)}")
                label = ""
    return lines


def _measured(root: Path) -> dict[int, float]:
    """Recall at 1, the mean of both ways, by step, from a trainer's log."""
    found = map(json.loads, (root / "trainer" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        line["step"]: (line["image_to_text_r1"] + line["text_to_image_r1"]) / 2
        for line in found
        if "image_to_text_r1" in line
    }


if __name__ == "__main__":
    main()
