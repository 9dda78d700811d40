"""What `curate check` says that a round costs, beside what the round then takes; prints a table.

    python -m benchmarks.check FOLDER        # a quarter of an hour on two cores

Pools are drawn into the folder. Each line is two commands as a user would run them, one after the other: `check`, and
`round` with its imports and its Ray. Bytes are those by which the root grows.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from jobs.drawn_pool import draw_pool

RECIPES = Path(__file__).parents[1] / "jobs/recipes"
SELECTION = '{sub_batch_size = 256, filter_ratio = 0.8, criterion = "learnability", gain = 1.0, super_batches = %d}'
"""B = 1,280."""
ROUNDS = {
    "the first round: reference over 12,000 rows, near-duplicates, learner": ("dedup", 12_000, 12, 4),
    "the second: no reference is missing": ("dedup", 12_000, 12, 4),
    "a window of 16 of 48 shards, the first round": ("window", 16_000, 48, 1),
    "the second, in another window": ("window", 16_000, 48, 1),
}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    print("| round | start, said | all, said | all, taken | taken / said | written, said | written | written / said |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for title, (kind, rows, shards, super_batches) in ROUNDS.items():
        folder = asked.folder / kind
        draw_pool(folder / "pool", rows=rows, shards=shards, seed=0, image_size=256)
        recipe = folder / "recipe.toml"
        recipe.write_text(
            f'root = "{folder}/root"\npool = {{path = "{folder}/pool", uid = "key"}}\n'
            f"selection = {SELECTION % super_batches}\n"
            + "".join(f'{role}.model = "tiny-clip.json"\n' for role in ("reference", "learner"))
            + ("dedup.threshold = 0.9999\n" if kind == "dedup" else "")
        )
        (folder / "tiny-clip.json").write_bytes((RECIPES / "tiny-clip.json").read_bytes())
        said, _ = run("check", recipe)
        print(said, file=sys.stderr)
        (start, _), (whole, megabytes) = (line_of(said, name) for name in ("start", "all"))
        before = bytes_below(folder / "root")
        _, took = run("round", recipe)
        written = (bytes_below(folder / "root") - before) / 1e6
        print(
            f"| {title} | {start:.0f} s | {whole:.0f} s | {took:.0f} s | {took / whole:.2f} "
            f"| {megabytes:.1f} MB | {written:.1f} MB | {written / megabytes:.2f} |",
            flush=True,
        )


def run(verb: str, recipe: Path) -> tuple[str, float]:
    """What a command says, and how long it takes."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", verb, recipe], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout, time.perf_counter() - begun


def line_of(said: str, name: str) -> tuple[float, float]:
    """Seconds and megabytes written of a line of the table."""
    found = re.search(rf"^  {name} .*? ([\d.]+) (s|min|h|d) .*?(?:([\d.]+) MB)?$", said, re.MULTILINE)
    assert found, said
    return float(found[1]) * SECONDS[found[2]], float(found[3] or 0)


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
