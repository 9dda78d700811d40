"""Time and memory of joint selection, against a bare baseline and against the paper's own listing.

    python -m benchmarks.selection                            CPU, one thread: about 5 minutes, 9 GB for the listing
    python -m benchmarks.selection --no-literal               about 1 minute, under 1 GB
    python -m benchmarks.selection --device cuda --json out.json

In one run, alternating, best of --repeats, for b = B/5, 16 chunks, D = 512:

    matmul     the tiles' products alone                         (what the arithmetic costs)
    +softplus  the same, and one softplus of each tile           (the least that the sigmoid loss can cost)
    ours       `jointly_sample_batch`: scores, noise, sort, draws
    literal    the listing with B × B matrices and masked sums   (tests/oracles, B up to 20,480)

Before anything is timed, ours must draw the listing's rows in the listing's order. Memory is by how much the peak of
a fresh process grows beyond what it holds with the embeddings loaded.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize, softplus

from curate.jest import Embeddings, jointly_sample_batch
from curate.logits import TILE_LOGITS
from tests.oracles.jest_literal import Model, gumbel_rows, sigmoid_literal

D, CHUNKS, SHARE, SEED = 512, 16, 5, 7
LITERAL_ROWS = 20_480  # above, the listing's matrices outgrow a laptop
CPU_SIZES, CUDA_SIZES = (5_120, 10_240, 20_480), (20_480, 81_920, 163_840)
MIB = 1 << 20


def embeddings(B: int, device: str, dtype: torch.dtype) -> tuple[Embeddings, Embeddings]:
    """Clustered pairs under a noisy learner and a better reference, with the scales and biases of real models."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(256, D, generator=generator)
    pairs = centres[torch.randint(256, (B,), generator=generator)].add_(torch.randn(B, D, generator=generator))

    def embedded(noise: float, scale: float, bias: float) -> Embeddings:
        towers = (torch.randn(B, D, generator=generator).mul_(noise).add_(pairs) for _ in range(2))
        zimg, ztxt = (normalize(z, dim=1).to(device, dtype) for z in towers)
        return Embeddings(zimg, ztxt, scale, bias)

    return embedded(1.5, 40.0, -12.0), embedded(0.7, 117.0, -12.9)


def ours(learner: Embeddings, reference: Embeddings) -> torch.Tensor:
    b = len(learner) // SHARE
    generator = torch.Generator().manual_seed(SEED)
    return jointly_sample_batch(learner, reference, sub_batch_size=b, n_chunks=CHUNKS, generator=generator).positions


def bare(learner: Embeddings, reference: Embeddings, *, with_softplus: bool) -> None:
    """Multiply the tiles that `ours` multiplies: (chunks - 1) times two models times two directions."""
    B, c, device = len(learner), len(learner) // SHARE // CHUNKS, learner.zimg.device
    buffer = torch.empty(max(TILE_LOGITS[device.type], c), device=device)
    block_rows = len(buffer) // c
    half = learner.zimg.element_size() == 2
    for chunk in range(CHUNKS - 1):
        for model in (learner, reference):
            for rows, columns in ((model.zimg, model.ztxt), (model.ztxt, model.zimg)):
                new = columns[chunk * c : (chunk + 1) * c].T
                for start in range(0, B, block_rows):
                    block = rows[start : start + block_rows]
                    tile = buffer[: len(block) * c].view(len(block), c)
                    if half:
                        torch.mm(block, new, out_dtype=torch.float32, out=tile)
                    else:
                        torch.mm(block, new, out=tile)
                    if with_softplus:
                        softplus(tile)


def literal(learner: Embeddings, reference: Embeddings) -> np.ndarray[Any, np.dtype[np.int64]]:
    b = len(learner) // SHARE
    models: list[tuple[int, Model]] = [
        (sign, (model.zimg.numpy(), model.ztxt.numpy(), model.logit_scale, model.logit_bias))
        for sign, model in ((1, learner), (-1, reference))
    ]
    return sigmoid_literal(models, [b // CHUNKS] * CHUNKS, 1.0, gumbel_rows(SEED, CHUNKS, len(learner)))[0]


def seconds(run: Callable[[], object], device: str) -> float:
    """Processor time of one call on a CPU, whose cores others share; wall-clock time on CUDA, synchronised."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def check_rows_equal(B: int) -> None:
    learner, reference = embeddings(B, "cpu", torch.float32)
    found, expected = ours(learner, reference).tolist(), literal(learner, reference).tolist()
    if found != expected:
        at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        raise SystemExit(f"B = {B}: expected the listing's rows, found another from pick {at}; not timing a wrong draw")
    print(f"B = {B:,}: the same {len(found):,} rows in the same order as the listing, float32")


def time_one_size(B: int, device: str, dtype: torch.dtype, *, repeats: int, with_literal: bool) -> dict[str, Any]:
    learner, reference = embeddings(B, device, dtype)
    runs: dict[str, Callable[[], object]] = {
        "matmul": lambda: bare(learner, reference, with_softplus=False),
        "matmul_softplus": lambda: bare(learner, reference, with_softplus=True),
        "ours": lambda: ours(learner, reference),
    }
    best: dict[str, float] = {}
    if device == "cuda":
        for run in runs.values():
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best.get(name, float("inf")), seconds(run, device))
    if with_literal and B <= LITERAL_ROWS:
        best["literal"] = seconds(lambda: literal(learner, reference), device)  # one run: long beside its noise
    return {"rows": B, "dtype": str(dtype).removeprefix("torch.")} | {f"{k}_s": v for k, v in best.items()}


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of_this_process(B: int) -> int:
    """Growth of the resident peak through one selection; for a fresh process, as the peak never falls by itself."""
    ours(*embeddings(800, "cpu", torch.float32))  # libraries load their code and threads on first use
    learner, reference = embeddings(B, "cpu", torch.float32)
    ctypes.CDLL(None).malloc_trim(0)  # free memory kept for reuse would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of making the data, is forgotten
    before = status_bytes("VmRSS")
    ours(learner, reference)
    return status_bytes("VmHWM") - before


def measure_peak(B: int, device: str, dtype: torch.dtype) -> dict[str, float | int]:
    """Peak bytes above the embeddings, beside what O(B·D + B·c) and the listing's B × B would be."""
    if device == "cuda":
        learner, reference = embeddings(B, device, dtype)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours(learner, reference)
        peak, total = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_allocated()
    else:
        command = [sys.executable, "-m", "benchmarks.selection", "--peak-of", str(B)]
        reply = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = total = int(reply.stdout)
        total += 4 * B * D * 4
    c = B // SHARE // CHUNKS
    return {
        "peak_bytes": peak,
        "peak_with_embeddings_bytes": total,
        "b_times_d_plus_c_bytes": 4 * B * (D + c),
        "b_times_b_bytes": 4 * B * B,
    }


def ratio(run: dict[str, Any], above: str, below: str) -> str:
    return f"{run[above] / run[below]:.3f}" if above in run else "-"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "B": lambda run: f"{run['rows']:,}",
    "dtype": lambda run: str(run["dtype"]),
    "matmul s": lambda run: f"{run['matmul_s']:.4f}",
    "+softplus s": lambda run: f"{run['matmul_softplus_s']:.4f}",
    "ours s": lambda run: f"{run['ours_s']:.4f}",
    "literal s": lambda run: f"{run['literal_s']:.2f}" if "literal_s" in run else "-",
    "ours/matmul": lambda run: ratio(run, "ours_s", "matmul_s"),
    "ours/+softplus": lambda run: ratio(run, "ours_s", "matmul_softplus_s"),
    "literal/ours": lambda run: ratio(run, "literal_s", "ours_s"),
    "peak MiB": lambda run: f"{run['peak_bytes'] / MIB:.1f}",
    "B(D+c) MiB": lambda run: f"{run['b_times_d_plus_c_bytes'] / MIB:.1f}",
    "B×B MiB": lambda run: f"{run['b_times_b_bytes'] / MIB:.1f}",
}


def machine(device: str) -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else names[0],
        "cores_visible": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"B, multiples of {SHARE * CHUNKS}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-literal", action="store_true", help="neither time nor memory for the B × B listing")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        print(peak_of_this_process(arguments.peak_of))
        return
    device: str = arguments.device
    sizes: list[int] = sorted(arguments.sizes or (CPU_SIZES if device == "cpu" else CUDA_SIZES))
    if any(B < 1 or B % (SHARE * CHUNKS) for B in sizes):
        parser.error(f"--sizes must be multiples of {SHARE * CHUNKS}, so that all chunks are alike: found {sizes}")

    report: dict[str, Any] = machine(device) | {"D": D, "chunks": CHUNKS, "b": f"B/{SHARE}", "runs": []}
    print(", ".join(f"{key} {value}" for key, value in report.items() if key != "runs"))
    check_rows_equal(min(sizes[0], CPU_SIZES[0]))  # on the CPU: across devices one rounding moves all later picks
    print("\n" + "".join(f"{title:>15}" for title in COLUMNS))
    for B in sizes:
        for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
            with_literal = device == "cpu" and not arguments.no_literal
            run: dict[str, Any] = time_one_size(
                B, device, dtype, repeats=arguments.repeats, with_literal=with_literal
            ) | measure_peak(B, device, dtype)
            report["runs"].append(run)
            print("".join(f"{cell(run):>15}" for cell in COLUMNS.values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
