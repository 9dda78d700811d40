"""Near-duplicates among 100,000 × 512 with planted copies: time, memory, recall and precision, side by side.

    python -m benchmarks.dedup.speed                 one thread, about 15 minutes
    python -m benchmarks.dedup.speed --json out.json

Every method runs in a process of its own, which first times the bare triangular product (tiles of 2,048 × 2,048,
nothing done with them) and gives its own CPU time as a ratio to that:

    exact       the tiled product, cosines compared, pairs verified: the truth that the others are measured against
    ours        cells, borders, search, and the rows that leave, by the functions that `curate dedup` runs
    semdedup    SemDeDup's published algorithm, which as published ends after its first cluster: k-means that is not
                centred, each cluster's whole matrix, a row leaves if one nearer to the centroid is similar
    flat        FAISS IndexFlatIP, range search, CPU kernels named so that its old OpenBLAS uses them
    flat, as shipped                         the same without: what an installed wheel does

Recall and precision are of pairs. Memory is by how much the peak grows beyond what the process holds before.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from benchmarks.dedup.planted import COPIES, D, planted
from curate.dedup.grouping import NODE, decide
from curate.dedup.neighbours import Threshold, cell_count, near_pairs, sample_share, train_cells
from curate.pipelines.neighbours import Compared, Rows, search_cells
from curate.pool.columns import Columns
from curate.pool.shards import Shard

ROWS, THRESHOLD, TILE = 100_000, 0.95, 2048
CELLS = 316
Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
Ids = npt.NDArray[np.int64]


def bare(x: torch.Tensor) -> None:
    for top in range(0, len(x), TILE):
        for left in range(top, len(x), TILE):
            x[top : top + TILE] @ x[left : left + TILE].T


def exact(x: torch.Tensor) -> tuple[Pairs, Ids | None]:

    every = torch.ones(len(x), dtype=torch.bool)
    found = list(near_pairs(x, None, Threshold(image=THRESHOLD), inner=len(x), fresh=every, images_alone=~every))
    return (np.concatenate([i for i, _, _ in found]), np.concatenate([j for _, j, _ in found])), None


def ours(x: torch.Tensor) -> tuple[Pairs, Ids | None]:
    """What the pipeline's tasks do, one after the other."""
    n = len(x)
    shard = Shard(
        index=0, name="x", path="x", size=0, version="", rows=n, columns=Columns(image="", caption="", uid=None)
    )
    nodes = np.zeros(n, NODE)
    nodes["id"] = np.arange(n)
    nodes["score"] = np.random.default_rng(0).permutation(n) / n
    z = x.numpy().astype(np.float16)
    distinct = np.column_stack([nodes["id"], nodes["id"]]).astype(np.uint64)
    rows = Rows(nodes=nodes, content=distinct, picture=distinct, zimg=z, ztxt=z[:, :0])
    count = cell_count(n)
    sample = np.random.default_rng(0).permutation(n)[: round(n * sample_share(n, count))]
    cells = train_cells(x.numpy()[sample], count)
    places = cells.assign(z, THRESHOLD, torch.device("cpu"))
    compared = Compared(shards=(shard,), generations=(0,), newest=0, stand=False)
    pairs, nodes = search_cells(rows, places, range(len(cells.centroids)), Threshold(image=THRESHOLD), compared)
    decisions = decide(pairs, np.zeros(n, int), "components")
    print(f"rows that border on more cells than are searched: {places.beyond.sum()}", file=sys.stderr)
    return (nodes["id"][pairs["better"]], nodes["id"][pairs["worse"]]), nodes["id"][decisions.dropped]


def semdedup(x: torch.Tensor) -> tuple[Pairs, Ids | None]:

    kmeans = faiss.Kmeans(D, CELLS, niter=8, spherical=True, seed=1234, max_points_per_centroid=100)
    kmeans.train(x.numpy())
    near, home = kmeans.index.search(x.numpy(), 1)
    pairs: list[list[Ids]] = [[], []]
    dropped = []
    for cell in range(CELLS):
        rows = np.flatnonzero(home[:, 0] == cell)
        rows = rows[np.argsort(-near[rows, 0], kind="stable")]
        similar = (x[rows] @ x[rows].T).triu(1)
        i, j = (similar >= THRESHOLD).nonzero(as_tuple=True)
        pairs[0].append(rows[i.numpy()])
        pairs[1].append(rows[j.numpy()])
        dropped.append(rows[(similar.max(dim=0).values >= THRESHOLD).numpy()] if len(rows) else rows)
    return (np.concatenate(pairs[0]), np.concatenate(pairs[1])), np.concatenate(dropped)


def flat(x: torch.Tensor) -> tuple[Pairs, Ids | None]:

    index = faiss.IndexFlatIP(D)
    index.add(x.numpy())
    limits, _, other = index.range_search(x.numpy(), THRESHOLD)
    row = np.repeat(np.arange(len(x)), np.diff(limits).astype(np.intp))
    once = row < other
    return (row[once], other[once]), None


METHODS: dict[str, Callable[[torch.Tensor], tuple[Pairs, Ids | None]]] = {
    "exact": exact,
    "ours": ours,
    "semdedup": semdedup,
    "flat": flat,
    "flat, as shipped": flat,
}


def measure(method: str, rows: int, out: Path) -> None:
    """Run one method in this process; leaves its figures as JSON, its pairs and dropped rows as .npz beside."""
    torch.set_num_threads(1)
    x = torch.from_numpy(np.concatenate([planted(block, rows // 10_000, 10_000) for block in range(rows // 10_000)]))
    started = time.process_time()
    bare(x)
    bare_s = time.process_time() - started
    faiss.omp_set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the rows
    held = memory_kib("VmRSS")
    started, clock = time.process_time(), time.monotonic()
    pairs, dropped = METHODS[method](x)
    figures = {"bare_s": bare_s, "cpu_s": time.process_time() - started, "wall_s": time.monotonic() - clock}
    figures["peak_mib"] = (memory_kib("VmHWM") - held) / 1024
    keys = np.minimum(*pairs) * rows + np.maximum(*pairs)
    np.savez(out.with_suffix(".npz"), keys=np.unique(keys), dropped=np.empty(0) if dropped is None else dropped)
    out.write_text(json.dumps(figures))


def memory_kib(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def summarize(found: dict[str, dict[str, Any]], folder: Path, rows: int) -> list[dict[str, Any]]:
    truth = np.load(folder / "exact.npz")["keys"]
    lines = []
    for method, figures in found.items():
        stored = np.load(folder / f"{method}.npz")
        both = len(np.intersect1d(stored["keys"], truth))
        lines.append(
            {
                "method": method,
                "ratio": figures["cpu_s"] / figures["bare_s"],
                "recall": both / len(truth),
                "precision": both / max(1, len(stored["keys"])),
                "dropped": len(stored["dropped"]) or None,
                **figures,
            }
        )
    lines[0]["dropped"] = components_dropped(truth, rows)
    return lines


def components_dropped(keys: Ids, rows: int) -> int:

    graph = coo_array((np.ones(len(keys), np.int8), np.divmod(keys, rows)), shape=(rows, rows))
    return rows - int(connected_components(graph, directed=False)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS, help="a multiple of 10,000")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", type=Path, default=Path("dedup-speed"), help="for what the methods found")
    parser.add_argument("--method", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    if arguments.method:
        measure(arguments.method, arguments.rows, arguments.folder / f"{arguments.method}.json")
        return
    core = {"AVX512": "SkylakeX", "AVX2": "Haswell"}.get(torch.backends.cpu.get_cpu_capability(), "")
    found = {}
    for method in METHODS:
        env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"} | {"OMP_NUM_THREADS": "1"}
        if core and method != "flat, as shipped":
            env["OPENBLAS_CORETYPE"] = core
        command = [sys.executable, "-m", "benchmarks.dedup.speed", "--rows", str(arguments.rows)]
        subprocess.run([*command, "--folder", str(arguments.folder), "--method", method], env=env, check=True)
        found[method] = json.loads((arguments.folder / f"{method}.json").read_text())
        print(f"{method}: {found[method]['cpu_s'] / found[method]['bare_s']:.3f} of the bare product", file=sys.stderr)
    lines = summarize(found, arguments.folder, arguments.rows)
    print(
        f"{arguments.rows:,} × {D}, {COPIES:.0%} copies, threshold {THRESHOLD}, {platform.processor()} {core}, 1 thread"
    )
    print(f"{'method':18}{'÷ bare':>8}{'CPU s':>8}{'bare s':>8}{'MiB':>8}{'recall':>10}{'precision':>10}{'dropped':>9}")
    for line in lines:
        print(
            f"{line['method']:18}{line['ratio']:8.3f}{line['cpu_s']:8.1f}{line['bare_s']:8.1f}{line['peak_mib']:8.0f}"
            f"{line['recall']:10.5f}{line['precision']:10.5f}{line['dropped'] or '':>9}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
