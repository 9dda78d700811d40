"""Reports of four curations: how long, how much memory, how large, and what they look like.

    python -m benchmarks.report --data FOLDER_OF_THE_REAL_SETS                     all, about fifteen minutes on 2 cores
    python -m benchmarks.report --data FOLDER --only large --json out.json

    demo       what `make demo` left in demo/
    openstax   textbooks; half of the captions belong to other pictures, and a reference knows the true ones
    emoji      crowded concepts, with near-duplicates that leave
    large      200,000 drawn rows, 10 rounds

Pictures are taken by a headless Chromium if there is one: on a desktop by day, on a phone by night.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curate.jobs.drawn_pool import draw_pool

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
SECTIONS = ("chosen", "left", "losses", "duplicates", "rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with openstax-dev and emoji-en")
    parser.add_argument("--out", type=Path, default=Path("out/report"))
    parser.add_argument("--only", action="append", choices=("demo", "openstax", "emoji", "large"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.only or ["demo", "openstax", "emoji", "large"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = []
    for name in wanted:
        root = MAKERS[name](arguments.data, arguments.out / name)
        found.append({"report": name} | measure(root, arguments.out / f"{name}.html"))
        print(json.dumps(found[-1]), flush=True)
        for screen in take_pictures(arguments.out / f"{name}.html"):
            print(screen, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def curate(*arguments: object) -> None:
    print("$ curate", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "curate.jobs.cli", *map(str, arguments)], check=True)


def measure(root: Path, page: Path) -> dict[str, Any]:
    """Write the report in a process of its own."""
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "curate.jobs.cli", "report", str(root), "--to", str(page)])
    _, status, usage = _wait(process)
    assert status == 0, status
    seconds = time.monotonic() - begun
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "mib": round(page.stat().st_size / 2**20, 2),
    }


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int, resource.struct_rusage]:
    return os.wait4(process.pid, 0)


def take_pictures(page: Path) -> Iterator[Path]:
    """What a reader sees of a page, and of its sections."""
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no Chromium here, and so no pictures")
        return
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for screen, how in SCREENS.items():
            shown = browser.new_page(**how)
            shown.goto(page.absolute().as_uri())
            yield _shoot(shown, page.with_name(f"{page.stem}-{screen}.png"))
            for section in SECTIONS:
                shown.evaluate("id => document.getElementById(id).scrollIntoView()", section)
                yield _shoot(shown, page.with_name(f"{page.stem}-{screen}-{section}.png"))
        browser.close()


def _shoot(shown: Any, path: Path) -> Path:
    shown.screenshot(path=str(path))
    return path


def demo(_: Path, __: Path) -> Path:
    return Path("demo/root")


def openstax(data: Path, out: Path) -> Path:
    """A reference that was trained on the true captions, and a pool in which half of them were exchanged."""
    pool = out / "pool"
    if not pool.exists():
        pool.mkdir(parents=True)
        table = pq.read_table(data / "openstax-dev")
        swapped = np.random.default_rng(0).permutation(len(table))[: len(table) // 2]
        captions = np.array(table["caption"].to_pylist(), object)
        captions[swapped] = captions[np.roll(swapped, 1)]
        table = table.set_column(table.column_names.index("caption"), "caption", pa.array(captions))
        marks = np.zeros(len(table), bool)
        marks[swapped] = True
        pq.write_table(table.append_column("swapped", pa.array(marks)), pool / "00000.parquet", row_group_size=256)
    recipe, model = RECIPES / "openstax-dev.toml", out / "reference-model"
    if not model.exists():
        uniform = [
            "--set",
            "train.data=pool",
            "--set",
            f"pool.path={data / 'openstax-dev'}",
            "--set",
            "train.steps=400",
        ]
        curate("train", recipe, *uniform, "--set", f"root={out / 'reference'}", "--save-to", model)
    curate("round", recipe, "--round", 0, *_at(out, pool, model), "--set", "selection.criterion=learnability")
    report_on_truth(out / "root")
    return out / "root"


def report_on_truth(root: Path) -> None:
    """How many of the chosen captions are true, beside half of the pool's."""
    chosen = pq.read_table(sorted((root / "rounds").glob("*/curated-*.parquet")), columns=["swapped"])["swapped"]
    print(
        f"captions of another picture: .5 of the pool, {np.mean(chosen.to_pylist()):.3f} of what was chosen", flush=True
    )


def emoji(data: Path, out: Path) -> Path:
    model = out / "reference-model"
    recipe = RECIPES / "emoji-en.toml"
    if not model.exists():
        how = ["--set", "train.data=pool", "--set", f"pool.path={data / 'emoji-en'}", "--set", "train.steps=300"]
        curate("train", recipe, *how, "--set", f"root={out / 'reference'}", "--save-to", model)
    dedup = ["--set", "dedup.threshold=0.99", "--set", "dedup.max_dropped_share=0.9"]
    curate("round", recipe, "--round", 0, *_at(out, data / "emoji-en", model), *dedup)
    return out / "root"


def large(_: Path, out: Path) -> Path:
    draw_pool(out / "pool", rows=200_000, shards=20, seed=0, image_size=24, broken_share=0.01, duplicate_share=0.02)
    (out / "recipe.toml").write_text(LARGE.format(out=out, model=RECIPES / "demo-clip.json"))
    curate("rounds", out / "recipe.toml")
    return out / "root"


LARGE = """root = "{out}/root"

[pool]
path = "{out}/pool"
uid = "key"

[reference]
model = "{model}"

[learner]
model = "{model}"

[selection]
criterion = "learnability"
sub_batch_size = 128
super_batches = 8

[schedule]
policy = "ahead"
ahead = 10
rounds = 10
"""


def _at(out: Path, pool: Path, model: Path) -> list[str]:
    fields = {"root": out / "root", "pool.path": pool, "reference.model": f"local-dir:{model}"}
    return [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]


MAKERS = {"demo": demo, "openstax": openstax, "emoji": emoji, "large": large}

if __name__ == "__main__":
    main()
