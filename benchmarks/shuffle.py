"""Rows from many tasks to many others: files of parts, as a round sends them, beside Ray Data's hash shuffle.

    python -m benchmarks.shuffle                      32, 64, 128 and 256 tasks on either side
    python -m benchmarks.shuffle --tasks 64 --json FILE

Each of n tasks makes the same number of rows for each of n others: a key and 2 KiB that do not compress, as vectors
are. Those count what they were sent and add it up; the sums must agree. Every run has a process and a Ray of its own.
CPU seconds and memory (resident, less what is shared) are of the driver and of all processes of Ray; references are
those that the driver owns at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from benchmarks.scale import MIB, Watch
from curate.parts import read_part, write_parts
from curate.pipelines.cluster import run_tasks
from curate.storage import Store

ROW_BYTES = 2048
PART_ROWS = 2
WAYS = ("files of parts", "Ray Data", "Ray Data, on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=WAYS, help="one run in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(run(arguments.way, arguments.tasks[0])))
        return
    found = []
    for tasks in arguments.tasks:
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.shuffle", "--way", way, "--tasks", str(tasks)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
        assert len({(row["rows"], row["sum"]) for row in found if row["tasks"] == tasks}) == 1, found
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def run(way: str, tasks: int) -> dict[str, Any]:
    """One way, measured once Ray's workers are warm."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    act = by_files if way == "files of parts" else partial(by_ray_data, on_disk="disk" in way)
    act(4)
    with Watch() as watch:
        rows, total = act(tasks)
    return {
        "tasks": tasks,
        "way": way,
        "MiB": round(tasks * tasks * PART_ROWS * ROW_BYTES / MIB, 1),
        "rows": rows,
        "sum": total,
        "wall_s": round(watch.seconds, 1),
        "cpu_s": round(watch.cpu_seconds(), 1),
        "driver_mib": watch.largest["driver"] // MIB,
        "worker_mib": watch.largest["workers"] // MIB,
        "references": watch.references,
    }


def make_rows(source: int, destinations: int) -> tuple[np.ndarray, np.ndarray]:
    """Destinations [n] and bytes [n, 2048] of one task's rows, in an order of its own."""
    rng = np.random.default_rng(source)
    to = rng.permutation(np.repeat(np.arange(destinations, dtype=np.int32), PART_ROWS))
    return to, rng.integers(0, 256, (len(to), ROW_BYTES), np.uint8)


# --- files of parts ------------------------------------------------------------------------------------------------


def by_files(tasks: int) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        shared = (Store(folder), tasks)
        run_tasks(split, range(tasks), shared, title="split")
        found = run_tasks(join, range(tasks), shared, title="join")
    return sum(rows for rows, _ in found), sum(total for _, total in found)


def split(source: int, shared: tuple[Store, int]) -> None:
    store, tasks = shared
    to, data = make_rows(source, tasks)
    order = np.argsort(to, kind="stable")
    ends = np.searchsorted(to[order], np.arange(tasks), side="right")
    write_parts(store, f"rows-{source:06d}", (part.tobytes() for part in np.split(data[order], ends[:-1])), count=tasks)


def join(destination: int, shared: tuple[Store, int]) -> tuple[int, int]:
    store, tasks = shared
    data = b"".join(read_part(store, f"rows-{source:06d}", destination) for source in range(tasks))
    return len(data) // ROW_BYTES, int(np.frombuffer(data, np.uint8).sum(dtype=np.int64))


# --- Ray Data ------------------------------------------------------------------------------------------------------


def by_ray_data(tasks: int, *, on_disk: bool) -> tuple[int, int]:
    context = ray.data.DataContext.get_current()
    context.use_disk_based_hash_shuffle = on_disk
    context.enable_progress_bars = False
    sources = ray.data.range(tasks, override_num_blocks=tasks).map_batches(
        partial(rows_of, tasks=tasks), batch_format="pyarrow", batch_size=None
    )
    sums = sources.repartition(tasks, keys=["to"]).map_batches(sum_of, batch_format="pyarrow", batch_size=None)
    found = sums.take_all()
    return sum(row["rows"] for row in found), sum(row["sum"] for row in found)


def rows_of(batch: pa.Table, tasks: int) -> pa.Table:
    to, data = zip(*(make_rows(source, tasks) for source in batch["id"].to_pylist()), strict=True)
    values = pa.array(np.concatenate(data).reshape(-1))
    return pa.table({"to": np.concatenate(to), "data": pa.FixedSizeListArray.from_arrays(values, ROW_BYTES)})


def sum_of(batch: pa.Table) -> pa.Table:
    total = sum(int(np.asarray(chunk.flatten()).sum(dtype=np.int64)) for chunk in batch["data"].chunks)
    return pa.table({"rows": [len(batch)], "sum": [total]})


if __name__ == "__main__":
    main()
