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

from curate.jobs.drawn_pool import draw_pool

RECIPES = Path(__file__).parents[1] / "jobs/recipes"
TINY = """
reference.model = "tiny-clip.json"
learner.model = "tiny-clip.json"
selection = {sub_batch_size = 256, filter_ratio = 0.8, criterion = "learnability", super_batches = %d}
"""
"""B = 1,280."""
LARGE = """
reference.model = "ViT-B-32"
learner.model = "ViT-B-32"
selection = {sub_batch_size = 128, loss = "softmax"}
"""
KINDS = {
    "dedup": (12_000, 12, TINY % 4 + "dedup.threshold = 0.9999"),
    "window": (16_000, 48, TINY % 1),
    "large": (2000, 4, LARGE),
}
"""Rows, shards and the rest of a recipe."""
ROUNDS = {
    "the first round: 12,000 rows, near-duplicates, learner": "dedup",
    "the second: no reference is missing": "dedup",
    "a window of 16 of 48 shards, 16,000 rows, the first round": "window",
    "the second, in another window": "window",
    "ViT-B-32 over 2,000 rows, easy-reference": "large",
}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=KINDS, nargs="+", help="recipes")
    asked = parser.parse_args()
    print("| round | start, said | all, said | all, taken | taken / said | written, said | written | written / said |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for title, kind in ROUNDS.items():
        if kind not in (asked.only or ROUNDS.values()):
            continue
        folder = asked.folder / kind
        rows, shards, how = KINDS[kind]
        if not (folder / "pool").exists():  # drawn anew, it would be another pool
            draw_pool(folder / "pool", rows=rows, shards=shards, seed=0, image_size=256)
        recipe = folder / "recipe.toml"
        recipe.write_text(f'root = "{folder}/root"\npool = {{path = "{folder}/pool", uid = "key"}}\n{how}\n')
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
        [sys.executable, "-m", "curate.jobs.cli", verb, recipe], check=True, stdout=subprocess.PIPE, text=True
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
