"""Search over many embeddings: time and memory, beside a bare loop that reads the same column and multiplies.

    python -m benchmarks.search                       2 million rows of D = 512, 4 GB in a temporary folder
    python -m benchmarks.search --rows 200000 --json out.json

Each side runs in a process of its own, in turn, after the files were read once: from the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from curate.embed.files import embedding_name, embedding_schema, vectors
from curate.models.spec import EncoderSpec
from curate.parquet import write_table
from curate.pool.columns import Columns
from curate.pool.shards import Pool, Shard
from curate.rounds.search import Searched
from curate.storage import Store

D, K, SHARD_ROWS = 512, 10, 10_000
SPEC = EncoderSpec(
    source="none",
    model="none",
    weights_sha256="0" * 64,
    embed_dim=D,
    logit_scale=10.0,
    logit_bias=0.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("search", "bare"), help="of what this process is to measure")
    parser.add_argument("--root", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.root, arguments.rows, arguments.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.rows)
        found = {"rows": arguments.rows, "D": D}
        run(Path(folder), arguments.rows, "bare")  # fills the page cache
        for side in ("bare", "search", "bare", "search"):
            found[side] = run(Path(folder), arguments.rows, side)
        found["ratio"] = round(found["search"]["seconds"] / found["bare"]["seconds"], 2)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def run(root: Path, rows: int, side: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.search", "--root", str(root), "--rows", str(rows), "--side", side]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found: dict[str, float] = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return found | {"peak_mib": round(usage.ru_maxrss / 1024)}


def pool_of(rows: int) -> Pool:
    """Shards without files: search reads embeddings alone."""
    columns = Columns(image="jpg", caption="caption", uid="key")
    shards = [
        Shard(index=i, name=f"{i:05d}", path=f"/none/{i:05d}", size=1, version="1", rows=SHARD_ROWS, columns=columns)
        for i in range(rows // SHARD_ROWS)
    ]
    return Pool(shards=tuple(shards), columns=columns, schema=pa.schema([]), ignored=(), skipped=())


def make(root: Path, rows: int) -> None:
    """Embedding files of random unit vectors."""
    store, rng = Store(str(root)), np.random.default_rng(0)
    for shard in pool_of(rows).shards:
        z = rng.standard_normal((2, SHARD_ROWS, D), np.float32)
        z /= np.linalg.norm(z, axis=2, keepdims=True)
        zimg, ztxt = (pa.FixedSizeListArray.from_arrays(pa.array(one.astype(np.float16).ravel()), D) for one in z)
        hashes = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), SHARD_ROWS, [None, pa.py_buffer(rng.bytes(16 * SHARD_ROWS))]
        )
        sizes = pa.array(np.full(SHARD_ROWS, 224, np.int32))
        columns = [
            pa.array([f"{shard.index:05d}{i:05d}" for i in range(SHARD_ROWS)]),
            pa.array(["ok"] * SHARD_ROWS),
            pa.nulls(SHARD_ROWS, pa.string()),
            *(hashes, hashes, sizes, sizes, zimg, ztxt),
        ]
        table = pa.Table.from_arrays(columns, schema=embedding_schema(D))
        write_table(store, embedding_name(SPEC.sha, shard), table, row_group_size=1024)


def measure(root: Path, rows: int, side: str) -> dict[str, float]:
    store, pool = Store(str(root)), pool_of(rows)
    query = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0)
    begun = time.perf_counter()
    if side == "search":
        near = Searched(store=store, round=0, pool=pool, reference=SPEC).nearest(query, tower="zimg", k=K)
        best = near[0].cosine
    else:
        cosines = []
        for shard in pool.shards:
            column = pq.read_table(root / embedding_name(SPEC.sha, shard), columns=["zimg"])["zimg"]
            cosines.append(vectors(column, D).astype(np.float32) @ query.numpy())
        best = float(np.sort(np.concatenate(cosines))[-K:][-1])
    return {"seconds": round(time.perf_counter() - begun, 2), "best": round(best, 4)}


if __name__ == "__main__":
    main()
