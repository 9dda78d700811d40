"""`make clients`: real clients at both ends, each in an environment of its own, versions pinned.

    python tests/clients.py FOLDER

img2dataset downloads pictures from a server on this machine into tars; `curate init`, `check` and two rounds over
these; open_clip's trainer on two ranks, every batch one sub-batch, its losses those of our trainer. clip-retrieval
embeds a tar, and its embeddings are taken over. A Lance data set becomes Parquet as docs/formats.md has it. Prints each
command and what came of it. Needs `uv` and the package index.
"""

import functools
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curate.models.encoder import fetch_model
from curate.models.learners import read_learner
from curate.storage import Store

HOUSE = Path(__file__).parents[1]
UV = ["uv"] if shutil.which("uv") else [sys.executable, "-m", "uv"]
CURATE = [sys.executable, "-m", "curate.jobs.cli"]
IMG2DATASET = "img2dataset==1.47.0"
# Its own dependencies are not pinned: with setuptools from 70 on one of them does not start.
CLIP_RETRIEVAL = ("clip-retrieval==2.45.0", "setuptools<70", "torch", "torchvision")
LANCE = ("pylance==14.0.2", "pyarrow")
ROWS, LOST = 640, 20
SETTINGS = {
    "reference.model": "demo-clip.json",
    "learner.model": "demo-clip.json",
    "root": "root",
    "selection.sub_batch_size": 16,
    "selection.filter_ratio": 0.5,
    "selection.super_batches": 4,
    "selection.criterion": "learnability",
    "selection.loss": "softmax",
    "resources.workers": 1,
}


def run(folder: Path, *command: str | Path, show: int = 1) -> str:
    """Print a command and the last lines of what it says; it must succeed."""
    parts = list(map(str, command))
    shown = ["curate", *parts[3:]] if parts[:3] == CURATE else [Path(parts[0]).name, *parts[1:]]
    print("$", shlex.join(shown), flush=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOUSE), "NO_ALBUMENTATIONS_UPDATE": "1"}
    done = subprocess.run(parts, cwd=folder, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for line in done.stdout.strip().splitlines()[-show:] if show else ():
        print("   ", line, flush=True)
    return done.stdout


def install(folder: Path, name: str, *packages: str) -> Path:
    """A new environment with some packages; where its commands are."""
    environment = folder / f"env-{name}"
    run(folder, *UV, "venv", "--quiet", "--python", "3.11", environment)
    run(folder, *UV, "pip", "install", "--quiet", "--python", environment / "bin/python", *packages)
    return environment / "bin"


def serve(folder: Path) -> str:
    """A server of the files of a folder, until this process ends."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def download(folder: Path) -> None:
    """Tars as img2dataset makes them; some pictures are not there."""
    run(folder, sys.executable, "-m", "curate.jobs.drawn_pool", "drawn", "--rows", str(ROWS), "--shards", "1", show=0)
    (folder / "www").mkdir()
    rows = pq.read_table(folder / "drawn").to_pylist()
    for row in rows[LOST:]:
        (folder / "www" / f"{row['key']}.jpg").write_bytes(row["jpg"] or b"")
    url = serve(folder / "www")
    urls = [f"{url}/{row['key']}.jpg" for row in rows]
    pq.write_table(pa.table({"url": urls, "caption": [row["caption"] for row in rows]}), folder / "urls.parquet")
    client = install(folder, "img2dataset", IMG2DATASET)
    said = {"url_list": "urls.parquet", "input_format": "parquet", "url_col": "url", "caption_col": "caption"}
    how = {
        "output_format": "webdataset",
        "output_folder": "tars",
        "resize_mode": "no",
        "number_sample_per_shard": "160",
    }
    few = {"processes_count": "1", "thread_count": "8", "enable_wandb": "False", "retries": "0"}
    options = [f"--{name}={value}" for name, value in (said | how | few).items()]
    run(folder, client / "img2dataset", *options, show=0)
    print("   ", " ".join(sorted(path.name for path in (folder / "tars").iterdir())))


def curate_rounds(folder: Path) -> None:
    """Init, check, two rounds."""
    shutil.copy(HOUSE / "jobs/recipes/demo-clip.json", folder)
    run(folder, *CURATE, "init", "tars", "--to", "recipe.toml", show=2)
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('pretrained = "webli"\n', ""))  # no hub is asked here
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    run(folder, *CURATE, "check", "recipe.toml", "--no-measure", *sets, show=20)
    for _ in range(2):
        run(folder, *CURATE, "round", "recipe.toml", *sets, show=0)
    shown = json.loads(run(folder, *CURATE, "show", "root", "round", "0", "--json", show=0))
    (embedded, *_) = shown["steps"]
    print("   ", embedded)
    assert embedded["rows_in"] == ROWS
    assert embedded["dropped"]["download_failed"] >= LOST


def train_by_open_clip(folder: Path) -> None:
    """Two gloo ranks of open_clip's trainer, beside ours on a copy of the root; steps so small that weights stay."""
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    how = {"learning_rate": 1e-12, "warmup_steps": 0, "log_every": 1, "follow": "stop"}
    slow = [part for name, value in how.items() for part in ("--set", f"train.{name}={value}")]
    shutil.copytree(folder / "root", folder / "ours")
    # Before the first step the learner is the root's own; saved, open_clip finds it by a name.
    store = Store(str(folder / "root"))
    fetch_model(store, read_learner(store, 0).encoder, folder / "model")
    run(folder, *CURATE, "train", "recipe.toml", *sets, "--set", "root=ours", *slow)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.open_clip_on_cpu"]
    theirs = ["--model", "local-dir:model", "--precision", "fp32", "--lr", "1e-12", "--warmup", "0", "--workers", "0"]
    log = ["--report-to", "tensorboard", "--log-every-n-steps", "1", "--logs", "logs", "--name", "run"]
    run(folder, *ranks, "open-clip", "root", "--", *theirs, *log, "--gather-with-grad", show=2)
    lines = [json.loads(line) for line in (folder / "ours/trainer/log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if "loss" in line]
    events = EventAccumulator(str(folder / "logs/run/tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/contrastive_loss")]
    apart = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    print(f"    {len(found)} batches of open_clip's, {len(expected)} sub-batches; losses at most {apart:.1e} apart")
    assert len(found) == 8
    assert apart < 1e-5


def embed_by_clip_retrieval(folder: Path) -> None:
    """A tar embedded there with a ViT-B-32 of random weights, and taken over here, with all of its shards in place."""
    client = install(folder, "clip-retrieval", *CLIP_RETRIEVAL)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), folder / "vitb32.pt")
    how = {
        "input_dataset": "tars/00000.tar",
        "output_folder": "embeddings",
        "input_format": "webdataset",
        "clip_model": f"open_clip:ViT-B-32/{folder}/vitb32.pt",
        "enable_metadata": "False",
        "enable_wandb": "False",
        "num_prepro_workers": "1",
        "batch_size": "16",
    }
    run(folder, client / "clip-retrieval", "inference", *(f"--{name}={value}" for name, value in how.items()), show=0)
    model = {"model": "ViT-B-32", "pretrained": "vitb32.pt", "trusted": "true"}
    sets = [part for name, value in model.items() for part in ("--set", f"reference.{name}={value}")]
    other = ("--set", "root=root-b32", "--set", "pool.path=tars/00000.tar", "--set", "pool.uid=key")
    said = run(folder, *CURATE, "embeddings", "import", "recipe.toml", "embeddings", *sets, *other)
    assert "embeddings of 1 shard of 1 are in place" in said


def convert_from_lance(folder: Path) -> None:
    """Lance to Parquet, by the lines of the page."""
    client = install(folder, "lance", *LANCE)
    (code,) = re.findall(r"```python\n(import lance\n.*?)```", (HOUSE / "docs/formats.md").read_text(), re.DOTALL)
    (folder / "lance").mkdir()
    write = "import glob, lance, pyarrow.parquet as pq\nrows = pq.read_table(glob.glob('../drawn/*'))\n"
    run(
        folder / "lance",
        client / "python",
        "-c",
        write + "lance.write_dataset(rows, 'pool.lance', max_rows_per_file=200)",
    )
    run(folder / "lance", client / "python", "-c", code)
    found = pq.read_table(sorted((folder / "lance").glob("*.parquet")))
    assert found.equals(pq.read_table(folder / "drawn"))
    print(f"    {len(found)} rows, as they were")


def main() -> None:
    """One after the other."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    download(folder)
    curate_rounds(folder)
    train_by_open_clip(folder)
    embed_by_clip_retrieval(folder)
    convert_from_lance(folder)


if __name__ == "__main__":
    main()
