"""`make wheels`: build sdist and wheel, install each extra in an empty environment, and use what it brings.

    python tests/wheel.py FOLDER [--python 3.11 3.12 3.13]

Prints a line for each environment: Python, extra, seconds to install, MiB, what was tried. Needs `uv` and the package
index; about ten minutes, and as many gigabytes, as every environment has a torch of its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HOUSE = Path(__file__).parents[1]
UV = [sys.executable, "-m", "uv"] if shutil.which("uv") is None else ["uv"]
EXTRAS = ("train", "curate", "s3", "text", "webdataset", "all")
RECIPE = """\
root = "root"
pool = {path = "pool", uid = "key"}
reference = {model = "demo-clip.json"}
learner = {model = "demo-clip.json"}
selection = {sub_batch_size = 16, filter_ratio = 0.5, super_batches = 2, criterion = "learnability"}
resources = {workers = 1}
"""
READ = """\
import importlib.util
from curate import CuratedReader, publish_learner
assert not any(importlib.util.find_spec(name) for name in ("ray", "faiss", "typer", "s3fs")), "the base brings too much"
batches = list(CuratedReader("root"))
assert [len(batch.uids) for batch in batches] == [16, 16]
import open_clip
open_clip.add_model_config("demo-clip.json")
published = publish_learner("root", open_clip.create_model("demo-clip"), "demo-clip", step=2, next_batch=2)
assert published.next_batch == 2
try:
    list(CuratedReader("s3://bucket/root"))
except Exception as error:
    assert "pip install 'curate-clip[s3]'" in str(error), error
"""


def run(command: list[str | Path], folder: Path, **env: str) -> str:
    """Output of a command, which must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env=os.environ | env
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def install(wheel: Path, extra: str, python: str, folder: Path) -> tuple[Path, float]:
    """A new environment with the wheel and one extra; how long that took."""
    environment = folder / f"{python}-{extra or 'base'}"
    run([*UV, "venv", "--quiet", "--python", python, environment], folder)
    begun = time.monotonic()
    what = f"{wheel}[{extra}]" if extra else str(wheel)
    run([*UV, "pip", "install", "--quiet", "--compile-bytecode", "--python", environment / "bin/python", what], folder)
    return environment / "bin", time.monotonic() - begun


def curate_there(path: Path, folder: Path) -> str:
    """A whole round beside a user's own `jobs` and `pipelines`; how long `--help` takes."""
    for name in ("jobs", "pipelines"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text("raise ImportError('these are somebody else')\n")
    (folder / "recipe.toml").write_text(RECIPE)
    shutil.copy(HOUSE / "jobs/recipes/demo-clip.json", folder)
    shutil.rmtree(folder / "root", ignore_errors=True)
    run([path / "python", "-m", "curate.jobs.drawn_pool", "pool", "--rows", "96", "--shards", "2"], folder)
    run([path / "curate", "check", "recipe.toml", "--no-measure"], folder)
    run([path / "curate", "round", "recipe.toml"], folder, OMP_NUM_THREADS="1")
    run([path / "curate", "report", "root", "--to", "report.html"], folder)
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        run([path / "curate", "--help"], folder)
        seconds.append(time.monotonic() - begun)
    return f"a round, a report; --help {min(seconds):.2f} s"


def main() -> None:
    """Build, install, use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", nargs="+", default=["3.11", "3.12", "3.13"])
    parser.add_argument("--extras", nargs="*", default=EXTRAS, help="each on the first Python")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    folder.mkdir(parents=True)
    run([*UV, "build", "--quiet", "--out-dir", folder / "dist", "."], HOUSE)
    (wheel,) = (folder / "dist").glob("*.whl")
    names = {
        name.split("/")[0] for name in run([sys.executable, "-m", "zipfile", "-l", wheel], folder).splitlines()[1:]
    }
    assert {name for name in names if ".dist-info" not in name} == {"curate"}, names
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
    for python in asked.python:
        for extra in ("curate", "", *(asked.extras if python == asked.python[0] else ())):
            if extra == "curate" and (folder / f"{python}-curate").exists():
                continue
            path, seconds = install(wheel, extra, python, folder)
            said = "imports"
            if extra == "curate":
                said = curate_there(path, folder)
            elif not extra:
                run([path / "python", "-c", READ], folder)
                line = subprocess.run([path / "curate"], capture_output=True, text=True, check=False).stderr
                assert "pip install 'curate-clip[train]'" in line, line
                said = "reads the round, publishes a learner; curate says what to install"
            else:
                run([path / "python", "-c", "import curate.reader.curated"], folder)
            size = sum(file.lstat().st_size for file in path.parent.rglob("*")) / 2**20
            print(f"{python:>5} {extra or '(base)':>10} {seconds:5.0f} s {size:7,.0f} MiB  {said}", flush=True)
            if extra != "curate":
                shutil.rmtree(path.parent)


if __name__ == "__main__":
    main()
