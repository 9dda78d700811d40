"""How busy embedding keeps its device, and what the thread that drives it spends on a pair.

    python -m benchmarks.embed                                        # a stand-in for the device; a few minutes
    python -m benchmarks.embed --latency-ms 30                        # pool and root behind a slow S3 server
    python -m benchmarks.embed --device cuda --model ViT-B-16 --loaders 14 --rows 4000 --shards 40

The stand-in decodes and tokenises as a model of 224 px does, and in place of the towers waits, off the lock, as long as
an H100 needs for 256 pairs of ViT-B/16: 21 ms. Where decoding cannot keep up with that, `--wait-ms` waits longer.
"""

import argparse
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.gpu import GFLOPS, Where, matmul_tflops
from curate.access import filesystem
from curate.embed.decode import Watched, decode_row
from curate.embed.pieces import Slice
from curate.embed.room import Rooms
from curate.embed.run import Embedder, reading_for
from curate.jobs.drawn_pool import draw_pool
from curate.models.encoder import Encoder, load_encoder, store_encoder
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, Shard
from curate.recipe import EmbedSection, EncoderSection, PoolSection
from curate.storage import Store

TINY = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
WARM = 4
"""Batches that are left out at the start, while the loader fills up."""


@dataclass(frozen=True)
class Waiting:
    """In place of a crop: a wait as long as decoding takes, so that few cores have many who decode."""

    image_size: tuple[int, int]
    wait_s: float

    def __call__(self, picture: Any) -> Any:
        """The same grey picture [H, W, 3] for any."""
        time.sleep(self.wait_s)
        return _grey(self.image_size)


@functools.cache
def _grey(image_size: tuple[int, int]) -> Any:
    return np.full((*image_size, 3), 128, np.uint8)


@dataclass
class Driven:
    """An encoder that keeps time; a stand-in for one, if it is told how long to wait."""

    encoder: Encoder
    wait_s: float | None
    batch_size: int
    crop: Any
    calls: list[tuple[float, float, float, int]] = field(default_factory=list)
    """Of each batch: begun and done, s; CPU time of the thread before it, s; pairs."""
    events: list[tuple[Any, Any]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, pixels: Tensor, texts: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Encoder.encode`."""
        begun, spent = time.perf_counter(), time.thread_time()
        if self.wait_s is not None:
            time.sleep(self.wait_s * len(pixels) / self.batch_size)
            found = torch.ones(len(pixels), 512), torch.ones(len(pixels), 512)
        elif self.encoder.device.type == "cuda":
            around = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            around[0].record()
            found = self.encoder.encode(pixels, texts, of)
            around[1].record()
            self.events.append(around)
        else:
            found = self.encoder.encode(pixels, texts, of)
        self.calls.append((begun, time.perf_counter(), spent, len(pixels)))
        return found

    def report(self) -> dict[str, float]:
        """What the thread and the device did."""
        begun, done, spent, pairs = (np.array(column) for column in zip(*self.calls[WARM:], strict=True))
        wall = done[-1] - begun[0]
        gaps = begun[1:] - done[:-1]
        if self.events:
            torch.cuda.synchronize()
            busy = sum(a.elapsed_time(b) for a, b in self.events[WARM:]) / 1000
            wall = self.events[WARM][0].elapsed_time(self.events[-1][1]) / 1000
        else:
            busy = float((done - begun).sum())
        return {
            "pairs_per_s": pairs.sum() / wall,
            "thread_us_per_pair": 1e6 * (spent[-1] - spent[0]) / pairs[:-1].sum(),
            "busy_share": busy / wall,
            "longest_gap_ms": 1000 * gaps.max(),
            "gap_p50_ms": 1000 * float(np.median(gaps)),
        }


def make_pool(folder: Path, rows: int, shards: int, image_size: int) -> Pool:
    """A drawn shard, and as many copies of it."""
    draw_pool(folder, rows=rows, shards=1, seed=0, image_size=image_size)
    (first,) = folder.iterdir()
    table = pq.read_table(first)
    pq.write_table(table, first, row_group_size=min(rows, 1000))
    for number in range(1, shards):
        shutil.copy(first, folder / f"copy-{number:05d}.parquet")
    return take_inventory(PoolSection(path=str(folder), uid="key"))


def bare_rate(pool: Pool, encoder: Encoder, batch_size: int, turns: int = 8) -> tuple[float, float]:
    """What one thread does that decodes and crops the rows of a shard, and nothing else.

    Returns:
        Rows in a second of its CPU time; and the share that this is of the CPU time of a whole piece's work: reading,
        hashing, decoding, cropping and tokenising. Medians of turns, as cores that are shared change their speed.
    """
    reading, shard = reading_for({"x": encoder}), pool.shards[0]
    table = pq.read_table(shard.path, columns=["jpg", "caption"])
    pairs = list(zip(table["jpg"].to_pylist(), table["caption"].cast("binary").to_pylist(), strict=True))
    some = Slice(job=0, shard=shard, start=0, stop=len(pairs), rows=None, piece_rows=batch_size, encoders=("x",))
    rooms = Rooms(1, 1, batch_size * math.prod((3, *encoder.image_size)))
    watched = Watched(reading.crops)

    def bare() -> None:
        for pair in pairs:
            decode_row(pair, reading.crops)

    def pieces() -> None:
        for raw in reading.raw(some):
            room = rooms.take(0, lambda: False)
            assert room is not None
            reading.piece(raw, watched, room)
            rooms.give_back(room)

    def seconds(work: Callable[[], None]) -> float:
        begun = time.thread_time()
        work()
        return time.thread_time() - begun

    for work in (bare, pieces):  # warm
        work()
    spent = [(seconds(bare), seconds(pieces)) for _ in range(turns)]
    return len(pairs) / median(one for one, _ in spent), median(one / all_of_it for one, all_of_it in spent)


def drive(
    pool: Pool, driven: Driven, store: Store, settings: EmbedSection, at_once: int, **how: Any
) -> tuple[float, float, float]:
    """Embed a pool as one actor does, with warm loaders; returns seconds, CPU seconds of this process and of them."""
    embedder = Embedder({"x": driven}, settings, **how)  # type: ignore[dict-item]

    def embed(shards: Sequence[Shard], folder: str) -> None:
        with ThreadPoolExecutor(at_once) as callers:
            for asked in [callers.submit(embedder.embed, s, {"x": f"{folder}/{s.index}"}, store) for s in shards]:
                asked.result()

    embed(pool.shards[: 2 * at_once], "warm")
    driven.calls.clear()
    driven.events.clear()
    begun, own, spent = time.perf_counter(), time.process_time(), children_s()
    embed(pool.shards, "x")
    found = time.perf_counter() - begun, time.process_time() - own, children_s() - spent
    embedder.close()
    return found


def children_s() -> float:
    """CPU time, s, of all processes below this one."""
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def serve(latency_ms: float) -> None:
    """An S3 server, in memory, that thinks before it answers; until it is killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import make_server  # noqa: PLC0415

    answer = DomainDispatcherApplication(create_backend_app)

    def slowly(environ: Any, start: Any) -> Any:
        time.sleep(latency_ms / 1000)
        return answer(environ, start)

    server = make_server("127.0.0.1", 0, slowly, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


def on_s3(pool: Pool, latency_ms: float) -> tuple[Pool, Store, subprocess.Popen[str]]:
    """The pool, and an empty root, on such a server."""
    command = [sys.executable, "-m", "benchmarks.embed", "--serve", str(latency_ms)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    fs, _ = filesystem("s3://bench/pool")
    fs.mkdir("bench")
    for shard in pool.shards:
        fs.put_file(shard.path, f"bench/pool/{Path(shard.path).name}")
    return take_inventory(PoolSection(path="s3://bench/pool", uid="key")), Store("s3://bench/root"), server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="an open_clip name, for real towers; a stand-in that waits if not given")
    parser.add_argument("--exact-pixels", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--wait-ms", type=float, default=21.0, help="of the stand-in, for a batch")
    parser.add_argument("--decode-us", type=float, help="a row, which loaders wait for instead of decoding")
    parser.add_argument("--loaders", type=int, default=1, help="decoding processes; 0 decodes in a thread")
    parser.add_argument("--pool", type=Path, help="folder of shards; drawn if not given")
    parser.add_argument("--rows", type=int, default=2048, help="of a drawn shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=4, help="shards")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


def measure(args: argparse.Namespace, scratch: Path) -> None:
    store = Store(str(scratch / "root"))
    (scratch / "tiny.json").write_text(json.dumps(TINY))
    section = EncoderSection(model=args.model or "tiny.json")
    spec = store_encoder(store, section, role="reference", base=scratch, seed=0, device_type=args.device)
    spec = replace(spec, exact_pixels=args.exact_pixels)
    settings = EmbedSection(batch_size=args.batch_size, chunk_rows=4 * args.batch_size)
    compile_for = args.batch_size if args.compile else None
    encoder = load_encoder(store, spec, torch.device(args.device), compile_for=compile_for)
    pool = (
        take_inventory(PoolSection(path=str(args.pool)))
        if args.pool
        else make_pool(scratch / "pool", args.rows, args.shards, args.image_size)
    )
    bare, share = bare_rate(pool, encoder, args.batch_size)
    server = None
    if args.latency_ms:
        pool, store, server = on_s3(pool, args.latency_ms)
    crop = Waiting(encoder.image_size, args.decode_us / 1e6) if args.decode_us else encoder.crop
    driven = Driven(encoder, None if args.model else args.wait_ms / 1000, args.batch_size, crop)
    try:
        took, own, spent = drive(pool, driven, store, settings, args.at_once, loaders=args.loaders)
    finally:
        if server is not None:
            server.kill()
    found = driven.report()
    found |= {
        "rows_per_s": pool.rows / took,
        "process_us_per_pair": 1e6 * own / pool.rows,
        "loaders_us_per_pair": 1e6 * spent / pool.rows,
        "bare_rows_per_cpu_s": bare,
        "bare_share_of_a_piece": share,
        "of_bare_per_worker": pool.rows / spent / bare if spent else np.nan,
    }
    if args.device == "cuda":
        rate = matmul_tflops(Where(device=torch.device("cuda"), small=False, deadline=np.inf))
        found["matmul_tflops"] = rate
        found["share_of_matmul"] = found["pairs_per_s"] * sum(GFLOPS.get(args.model, (np.nan,))) / 1000 / rate
        print(torch.cuda.get_device_name())
    for name, value in found.items():
        print(f"{name:26s} {value:12.3f}")


if __name__ == "__main__":
    main()
