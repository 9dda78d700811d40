"""What a round costs as the pool grows, and what an epoch costs: bytes, CPU, memory, objects of the driver.

    python -m benchmarks.scale                              both, over pools of 1 ×, 4 ×, 16 × and 64 ×
    python -m benchmarks.scale --sizes 1 4 --only round     a quick look
    python -m benchmarks.scale --json docs/scale/scale.json --picture docs/scale/scale.png

The pools: shards of 512 rows, 64 of them at 1 × and 4,096 (2.1 million rows) at 64 ×; pictures of 32 pixels, each row
with a caption of its own; embeddings of the reference are drawn at random, as if the reference had run.

    round    the second of two rounds of 4 super-batches of 2,048, learnability, with the pass of a learner: what the
             first one makes once for a pool (inventory, index) is there
    epoch    one round over the whole pool in windows of 65,536 rows, easy-reference, so that no model runs

Bytes are counted where the product reads and writes them, in every process; CPU seconds and memory (resident, less what
is shared) over the driver and all processes of Ray, sampled five times a second; references that the driver owns as
Ray's core counts them.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from curate import access
from curate.embed.files import embedding_name, embedding_schema, pair_hashes
from curate.jobs.cli import silence_open_clip
from curate.parquet import CHECKED
from curate.pipelines.round import run_round
from curate.pool.inventory import take_inventory
from curate.recipe import Recipe
from curate.rounds.plan import store_reference
from curate.storage import Store

ROWS, SHARDS, SIZES = 512, 64, (1, 4, 16, 64)
"""Rows of a shard; shards at 1 ×."""
B, FILTER_RATIO, SUPER_BATCHES = 2048, 0.875, 4
WINDOW_ROWS = 65_536
PICTURES = 256
D = 16
MIB = 1 << 20
COUNTS = "SCALE_COUNTS"
"""Environment variable: the folder in which each process counts its bytes."""
MODEL = {
    "embed_dim": D,
    "init_logit_scale": 2.302585,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# --- counting --------------------------------------------------------------------------------------------------------


def count_bytes() -> None:
    """Count, in this process, what the product reads from pool and root and writes into the root."""
    folder = Path(os.environ[COUNTS])

    def note(kind: str, size: int) -> None:
        with (folder / str(os.getpid())).open("a") as file:
            file.write(f"{kind} {size}\n")

    def whence(name: str) -> str:
        return "pool" if "/pool/" in name else "root"

    def reading(act: Callable[..., bytes]) -> Callable[..., bytes]:
        def wrapped(source: Any, *arguments: Any, **named: Any) -> bytes:
            data = act(source, *arguments, **named)
            note(whence(source._url if isinstance(source, access._Input) else f"/{arguments[0]}"), len(data))
            return data

        return wrapped

    def putting(act: Callable[..., None]) -> Callable[..., None]:
        def wrapped(store: Store, one: Any, other: Any) -> None:  # a path and a name, or a name and data
            note("written", len(other) if isinstance(other, bytes) else os.path.getsize(one))
            act(store, one, other)

        return wrapped

    access.open_for_arrow = access.open_input  # for what Arrow reads itself nobody can count
    Store.open_for_arrow = Store.open_input  # type: ignore[method-assign]
    for target, name in ((access._Input, "read"), (Store, "read_bytes"), (Store, "read_range")):
        setattr(target, name, reading(getattr(target, name)))
    for name in ("put_file", "put_bytes", "put_if_absent"):
        setattr(Store, name, putting(getattr(Store, name)))


def counted_bytes(folder: Path) -> Counter[str]:
    found = Counter[str]()
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            kind, size = line.split()
            found[kind] += int(size)
    return found


class Watch:
    """Samples the driver and the processes below it, while it is entered."""

    def __enter__(self) -> "Watch":
        self.cpu: dict[tuple[int, float], tuple[float, float]] = {}
        self.largest: dict[str, int] = defaultdict(int)
        self.references = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.began = time.monotonic()
        self._sample()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self._sample()
        self.seconds = time.monotonic() - self.began

    def _run(self) -> None:
        while not self.over.wait(0.2):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times, memory, key = process.cpu_times(), process.memory_info(), (process.pid, process.create_time())
            except psutil.Error:
                continue
            now = times.user + times.system
            # What a process had used before; one that was born since had used nothing.
            self.cpu[key] = (self.cpu.get(key, (0.0 if self.thread.ident else now, now))[0], now)
            kind = "driver" if process.pid == me.pid else "workers"
            self.largest[kind] = max(self.largest[kind], memory.rss - memory.shared)
        counts = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
        self.references = max(self.references, len(counts))

    def cpu_seconds(self) -> float:
        """Of all processes together."""
        return sum(last - first for first, last in self.cpu.values())


# --- pools -----------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(PICTURES):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(data, "JPEG", quality=60)
        found.append(data.getvalue())
    return found


def make_shard(number: int, folder: Path) -> None:
    """A shard and, beside it, its embeddings by the reference."""
    rng = np.random.default_rng(number)
    drawn = pictures()
    images = [drawn[i] for i in rng.integers(0, PICTURES, ROWS)]
    captions = [f"picture {number} {row}" for row in range(ROWS)]
    pq.write_table(
        pa.table({"jpg": pa.array(images, pa.binary()), "caption": captions}),
        folder / f"{number:06d}.parquet",
        row_group_size=128,
        use_dictionary=False,
        compression="none",
    )
    hashes = [pair_hashes(image, caption.encode()) for image, caption in zip(images, captions, strict=True)]
    z = rng.standard_normal((2, ROWS, D)).astype(np.float32)
    z = (z / np.linalg.norm(z, axis=2, keepdims=True)).astype(np.float16)
    columns = [
        pa.array([content.hex() for _, content in hashes]),
        pa.array(["ok"] * ROWS),
        pa.nulls(ROWS, pa.string()),
        pa.array([content for _, content in hashes], pa.binary(16)),
        pa.array([picture for picture, _ in hashes], pa.binary(16)),
        pa.array([32] * ROWS, pa.int32()),
        pa.array([32] * ROWS, pa.int32()),
        *(pa.FixedSizeListArray.from_arrays(pa.array(tower.reshape(-1)), D) for tower in z),
    ]
    table = pa.Table.from_arrays(columns, schema=embedding_schema(D))
    pq.write_table(table, folder / f"{number:06d}.embeddings", compression="zstd", use_dictionary=["status"], **CHECKED)


def make_root(base: Path, made: Path, size: int) -> Recipe:
    """A pool of `size` × shards and a root with the reference's embeddings; both are links."""
    pool = base / "pool"
    pool.mkdir()
    for number in range(size * SHARDS):
        os.link(made / f"{number:06d}.parquet", pool / f"{number:06d}.parquet")
    (base / "model.json").write_text(json.dumps(MODEL))
    recipe = Recipe.model_validate(
        {
            "root": str(base / "root"),
            "pool": {"path": str(pool)},
            "reference": {"model": "model.json"},
            "learner": {"model": "model.json"},
            "resources": {"device": "cpu", "workers": 2},
            "selection": {"sub_batch_size": int(B * (1 - FILTER_RATIO)), "filter_ratio": FILTER_RATIO},
        }
    )
    store = Store(recipe.root)
    reference = store_reference(store, recipe, base=base, device_type="cpu")
    (base / "root" / "embeddings" / reference.sha).mkdir(parents=True)
    for shard in take_inventory(recipe.pool).shards:
        os.link(made / f"{Path(shard.path).stem}.embeddings", base / "root" / embedding_name(reference.sha, shard))
    return recipe


# --- runs ------------------------------------------------------------------------------------------------------------


def rounds_of(recipe: Recipe, what: str) -> list[Recipe]:
    """Of a run the rounds, of which the last one is measured."""
    if what == "epoch":
        chosen = recipe.selection.model_copy(update={"window_rows": WINDOW_ROWS})
        return [recipe.model_copy(update={"selection": chosen})]
    chosen = recipe.selection.model_copy(update={"super_batches": SUPER_BATCHES, "criterion": "learnability"})
    return [recipe.model_copy(update={"selection": chosen})] * 2


def measure(made: Path, size: int, what: str) -> dict[str, Any]:
    """One run, in this process."""
    silence_open_clip()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as counts:
        base = Path(scratch)
        rounds = rounds_of(make_root(base, made, size), what)
        os.environ[COUNTS] = counts
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": count_bytes},
        )
        count_bytes()
        for recipe in rounds[:-1]:
            run_round(recipe, base=base)
        before = counted_bytes(Path(counts))
        with Watch() as watch:
            manifest = run_round(rounds[-1], base=base)
        bytes_ = counted_bytes(Path(counts)) - before
        looked_at = manifest.tallies[2].kept
        row_bytes = sum(path.stat().st_size for path in base.joinpath("pool").iterdir()) / (size * SHARDS * ROWS)
        found = {
            "size": size,
            "rows": size * SHARDS * ROWS,
            "shards": size * SHARDS,
            "rows_looked_at": looked_at,
            "picture_bytes_per_row": round(row_bytes),
            "pool_read_mib": round(bytes_["pool"] / MIB, 2),
            "root_read_mib": round(bytes_["root"] / MIB, 2),
            "pool_read_per_row_looked_at": round(bytes_["pool"] / (looked_at * row_bytes), 3),
            "written_mib": round(bytes_["written"] / MIB, 2),
            "cpu_s": round(watch.cpu_seconds(), 1),
            "wall_s": round(watch.seconds, 1),
            "driver_mib": round(watch.largest["driver"] / MIB),
            "largest_worker_mib": round(watch.largest["workers"] / MIB),
            "driver_peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "references": watch.references,
        }
        ray.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--only", choices=["round", "epoch"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MADE", "SIZE", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        made, size, what = arguments.one
        print(json.dumps(measure(Path(made), int(size), what)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with ProcessPoolExecutor() as processes:
            shards = range(max(arguments.sizes) * SHARDS)
            list(processes.map(partial(make_shard, folder=Path(scratch)), shards, chunksize=16))
        for what in [arguments.only] if arguments.only else ["round", "epoch"]:
            for size in arguments.sizes:
                command = [sys.executable, "-m", "benchmarks.scale", "--one", scratch, str(size), what]
                out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
                found.setdefault(what, []).append(row := json.loads(out.splitlines()[-1]))
                print(what, "  ".join(f"{name} {value:,}" for name, value in row.items()), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.picture:
        draw(found, arguments.picture)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each quantity: a round is flat, an epoch is linear."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 for pictures alone

    names = ["pool_read_mib", "written_mib", "cpu_s", "driver_mib", "largest_worker_mib", "references"]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for what, rows in found.items():
            axis.plot([row["rows"] for row in rows], [row[name] for row in rows], "o-", label=f"one {what}")
        axis.set(xscale="log", xlabel="rows of the pool", title=name.replace("_", " ").replace("mib", "MiB"))
        if name in ("driver_mib", "largest_worker_mib", "references"):
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
