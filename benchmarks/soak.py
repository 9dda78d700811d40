"""Many tiny rounds in a row: do memory, open files and disk outside the root stay flat?

    python -m benchmarks.soak                    50 rounds
    python -m benchmarks.soak --rounds 20 --json out.json

One process is scheduler and driver of all rounds, as `curate rounds` is. After every tenth the trainer goes through all
of them, and the next round scores with its learner; then the garbage of the root goes, and with it the rows of all but
the newest five rounds and the models of all learners but the first and the newest. Printed after every fifth: what
this process holds, what Ray's processes hold together, and what lies outside the root in the temporary folder and in
shared memory.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from curate.jobs.cli import silence_open_clip
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.rounds import in_own_ray, schedule_rounds
from curate.jobs.train import train
from curate.recipe import Recipe
from curate.rounds.gc import find_garbage, remove_garbage
from curate.storage import Store

MIB = 1 << 20
KEPT_ROUNDS = 5
LEARNER = {
    "embed_dim": 16,
    "init_logit_scale": 2.302585,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--trainer-every", type=int, default=10, help="rounds between the trainer's turns")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silence_open_clip()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        recipe = make(base, arguments.rounds)
        store = Store(recipe.root)
        run_round = in_own_ray(recipe, base, print)
        begun = time.monotonic()

        def run(number: int) -> None:
            run_round(number)
            if (number + 1) % arguments.trainer_every == 0:
                train(recipe, base=base)
                for garbage in find_garbage(store, grace_s=0, keep_rounds=KEPT_ROUNDS, keep_learners=1):
                    remove_garbage(store, garbage)
            if (number + 1) % 5 == 0:
                found.append({"rounds": number + 1, "s": round(time.monotonic() - begun), **held(base)})
                print("  ".join(f"{name} {value:>6,}" for name, value in found[-1].items()), flush=True)

        schedule_rounds(store, recipe.schedule, run, lambda line: None)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def make(base: Path, rounds: int) -> Recipe:
    """A pool and a recipe of tiny rounds, each of a tenth of an epoch."""
    draw_pool(base / "pool", rows=1_600, shards=2, seed=0, image_size=32)
    (base / "tiny.json").write_text(json.dumps(LEARNER))
    return Recipe.model_validate(
        {
            "root": str(base / "root"),
            "pool": {"path": str(base / "pool")},
            "reference": {"model": "tiny.json"},
            "learner": {"model": "tiny.json"},
            "selection": {"sub_batch_size": 16, "n_chunks": 4},
            "resources": {"workers": 1},
            "schedule": {"policy": "ahead", "ahead": rounds, "rounds": rounds},
        }
    )


def held(base: Path) -> dict[str, Any]:
    """What is held now: memory and disk in MiB, open files and Ray's processes by number."""
    ours, rays = Path("/proc/self"), [folder for folder in Path("/proc").glob("[0-9]*") if is_rays(folder)]
    outside = [path for path in Path(tempfile.gettempdir()).iterdir() if path != base]
    return {
        "rss_mib": rss(ours) // MIB,
        "open_files": len(os.listdir(ours / "fd")),
        "ray_processes": len(rays),
        "ray_rss_mib": sum(map(rss, rays)) // MIB,
        "temporary_mib": sum(map(size, outside)) // MIB,
        "shared_memory_mib": size(Path("/dev/shm")) // MIB,
        "root_mib": size(base / "root") // MIB,
    }


def is_rays(folder: Path) -> bool:
    try:
        command = (folder / "cmdline").read_bytes()
    except OSError:
        return False
    return b"ray::" in command or b"/ray/" in command


def rss(folder: Path) -> int:
    """Resident memory of a process without what it shares, in bytes."""
    try:
        _, resident, shared, *_ = map(int, (folder / "statm").read_text().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def size(path: Path) -> int:
    """Bytes that a file or folder takes on disk."""
    found = 0
    for one in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            found += one.lstat().st_blocks * 512
        except OSError:
            continue
    return found


if __name__ == "__main__":
    main()
