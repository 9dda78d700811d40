"""Time of `dedup_pool`, and the memory of each of its processes, as the pool grows fourfold; memory of grouping.

    python -m benchmarks.dedup.memory                                  250,000, 500,000 and 1,000,000 × 512: 15 minutes
    python -m benchmarks.dedup.memory --rows 250000 --json out.json
    python -m benchmarks.dedup.memory --pairs 1000000 4000000          the tasks that group so many pairs: 5 minutes

The embeddings are those of benchmarks/dedup/planted.py in shards of 10,000 rows, as embedding files in a root of their
own. Each size runs in a Ray of its own with --cpus CPUs and an object store of 1 GiB, which spills what it cannot hold.
Twenty times a second each process of that Ray is asked for its resident memory, with the part that it shares with the
object store and without. Rows dropped are compared with those that were planted.

With --pairs there are no embeddings: planted are files of pairs, no two of which share a row, a tenth of the pool's
rows near-duplicates. Each task that groups them runs in a process of its own, once with all pairs in one bucket, once
in buckets of the usual size or four smaller ones; its peak is that of its resident memory above what it began with.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.dedup.planted import COPIES, D, planted
from curate.dedup.files import nodes_name, pairs_name, write_records
from curate.dedup.grouping import NODE, PAIR
from curate.embed.files import embedding_name, embedding_schema, pair_hashes
from curate.models.spec import EncoderSpec
from curate.pipelines import grouping
from curate.pipelines.dedup import dedup_pool
from curate.pipelines.neighbours import MOST_TASKS, ROWS_PER_TASK, Compared
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.recipe import DedupSection
from curate.sealed import seal
from curate.storage import Store

SHARD_ROWS, THRESHOLD, STORE_BYTES = 10_000, 0.95, 2**30
SPEC = EncoderSpec(
    model="planted", source="planted", weights_sha256="", embed_dim=D, logit_scale=1.0, logit_bias=0.0, precision="fp32"
)
MIB = 1024  # of /proc's kB
PAIRS_SHARD_ROWS = 100_000
ASKED = {
    "_decide_all": grouping.DECIDE_BYTES,
    "_decide_bucket": grouping.DECIDE_BYTES,
    "_plant": grouping.PLANT_BYTES,
    "_join": grouping.JOIN_BYTES,
    "_spread": grouping.SPREAD_BYTES,
    "_write_run": grouping.WRITE_BYTES,
}
"""Bytes for each pair or row, by task."""


def write_pool(store: Store, rows: int) -> Pool:
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = []
    blocks = rows // SHARD_ROWS
    for block in range(blocks):
        name = f"{block:05d}.parquet"
        shard = Shard(index=block, name=name, path=name, size=1, version="1", rows=SHARD_ROWS, columns=columns)
        zimg = planted(block, blocks, SHARD_ROWS).astype(np.float16)
        ztxt = np.random.default_rng([3, block]).standard_normal(zimg.shape, np.float32).astype(np.float16)
        hashes = [pair_hashes(b"%d/%d" % (block, row), b"") for row in range(SHARD_ROWS)]
        towers = [pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), D) for z in (zimg, ztxt)]
        arrays = [
            pa.array([content.hex() for _, content in hashes]),
            pa.array(["ok"] * SHARD_ROWS),
            pa.nulls(SHARD_ROWS, pa.string()),
            pa.array([content for _, content in hashes], pa.binary(16)),
            pa.array([picture for picture, _ in hashes], pa.binary(16)),
            pa.array([256] * SHARD_ROWS, pa.int32()),
            pa.array([256] * SHARD_ROWS, pa.int32()),
            *towers,
        ]
        with store.local_scratch() as scratch:
            path = scratch / "e.parquet"
            pq.write_table(pa.Table.from_arrays(arrays, schema=embedding_schema(D)), path, compression="zstd")
            store.put_file(path, embedding_name(SPEC.sha, shard))
        shards.append(shard)
    return Pool(shards=tuple(shards), columns=columns, schema=pa.schema([]), ignored=(), skipped=())


class Watch(threading.Thread):
    """Peak resident memory, by process, of everything that descends from this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, dict[str, int]] = defaultdict(lambda: {"resident": 0, "own": 0})
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look, twenty times a second, until told to stop."""
        while not self.stopped.wait(0.05):
            for process in descendants():
                try:
                    status = Path(f"/proc/{process}/status").read_text()
                except OSError:
                    continue
                found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                if "VmRSS" not in found:
                    continue
                resident, shared = (int(found[key].split()[0]) for key in ("VmRSS", "RssShmem"))
                kind = "object store" if found["Name"].strip() == "raylet" else "largest other"
                peak = self.peaks[kind]
                peak["resident"] = max(peak["resident"], resident)
                peak["own"] = max(peak["own"], resident - shared)


def descendants() -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [int(Path("/proc/self").resolve().name)]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def measure(rows: int, cpus: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/root")
        pool = write_pool(store, rows)
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=f"{folder}/ray",
        )
        watch = Watch()
        watch.start()
        started = time.monotonic()
        dedup = dedup_pool(store, pool, SPEC, DedupSection(threshold=THRESHOLD))
        seconds = time.monotonic() - started
        watch.stopped.set()
        watch.join()
        ray.shutdown()
    return {
        "rows": rows,
        "seconds": round(seconds, 1),
        "cells": dedup.cells,
        "largest_cell": dedup.largest_cell,
        "pairs": dedup.pairs,
        "dropped": sum(dedup.dropped.values()),
        "planted": round(rows * COPIES),
        "beyond": dedup.beyond,
        "peak_mib": {kind: {name: size // MIB for name, size in peak.items()} for kind, peak in watch.peaks.items()},
    }


def write_pairs(store: Store, count: int) -> tuple[str, Compared]:
    """Plant `count` pairs, in as many files as search a pool of ten times the rows."""
    columns = Columns(image="jpg", caption="caption", uid=None)
    rows = 10 * count
    shards = tuple(
        Shard(index=i, name=f"{i:05d}", path="", size=1, version="1", rows=PAIRS_SHARD_ROWS, columns=columns)
        for i in range(rows // PAIRS_SHARD_ROWS)
    )
    tasks = max(1, min(MOST_TASKS, rows // ROWS_PER_TASK))
    rng = np.random.default_rng(count)
    near = rng.choice(rows, 2 * count, replace=False).reshape(-1, 2)
    for task, some in enumerate(np.array_split(near, tasks)):
        pairs, nodes = np.zeros(len(some), PAIR), np.zeros(2 * len(some), NODE)
        pairs["better"], pairs["worse"], pairs["cosine"] = *some.T, 0.97
        nodes["id"] = np.sort(some.reshape(-1))
        nodes["score"] = rng.random(len(nodes))
        nodes["uid"], nodes["key"] = rng.integers(2**63, size=(2, len(nodes)), dtype=np.uint64)
        write_records(store, nodes_name("dedup/s/p", task), nodes)
        write_records(store, pairs_name("dedup/s/p", task), pairs, largest_cell=0, beyond=0)
    store.put_bytes("dedup/s/p/counts.json", seal({"tasks": tasks}))
    return "dedup/s/p", Compared(shards=shards, generations=(0,) * len(shards), newest=0, stand=True)


def peak_of(task: Callable[..., Any], item: Any, shared: Any) -> tuple[Any, int]:
    """What a task returns, and by how many bytes resident memory grew at most, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    # A fork has what the parent imported, so that no library's pages count.
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(task, item, shared, theirs))
    process.start()
    found: tuple[Any, int] = ours.recv()
    process.join()
    return found


def _alone(task: Callable[..., Any], item: Any, shared: Any, answer: Any) -> None:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    answer.send((task(item, shared), 1024 * (resident("VmHWM") - before)))


def resident(key: str) -> int:
    """Of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure_grouping(count: int, most_pairs: int) -> list[dict[str, Any]]:
    """Group planted pairs, and tell of each kind of task its largest peak, and for how much it asks of Ray."""
    found: list[dict[str, Any]] = []

    def run_tasks(task: Callable[..., Any], items: Sequence[Any], shared: Any, *, title: str, memory: int) -> list[Any]:
        started = time.monotonic()
        told = [peak_of(task, item, shared) for item in items]
        if told:
            peak = max(peak for _, peak in told)
            units = items[0] if task.__name__ == "_join" else memory // ASKED[task.__name__]
            facts = {"pairs": count, "step": title, "tasks": len(told), "pairs or rows of the largest": units}
            figures = {"peak MiB": peak >> 20, "bytes each": round(peak / units), "asked": ASKED[task.__name__]}
            found.append(facts | figures | {"seconds": round(time.monotonic() - started, 1)})
        return [answer for answer, _ in told]

    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/root")
        name, compared = write_pairs(store, count)
        with mock.patch.multiple(grouping, run_tasks=run_tasks, TASK_PAIRS=most_pairs):
            dropped = grouping.group_pairs(store, [name], compared, "components").dropped
    assert dropped == {"near_duplicate": count}, dropped
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--pairs", type=int, nargs="+", help="measure the tasks that group so many pairs instead")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.rows[0], arguments.cpus)))
        return
    found = []
    for count in arguments.pairs or ():
        for most_pairs in (count, min(grouping.TASK_PAIRS, count // 4)):
            for record in measure_grouping(count, most_pairs):
                found.append(record)
                print(json.dumps(record))
    for rows in () if arguments.pairs else arguments.rows:
        command = [sys.executable, "-m", "benchmarks.dedup.memory", "--one", "--rows", str(rows)]
        done = subprocess.run([*command, "--cpus", str(arguments.cpus)], stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
