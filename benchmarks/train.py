"""Time and peak memory of one training step, in micro-batches and in one pass; prints a table.

    python -m benchmarks.train                                        a tiny model on the CPU
    python -m benchmarks.train --device cuda --model ViT-B-32 --micro-batch 1024

Each step runs in a process of its own. Seconds are those of the clock on a GPU, of one processor's work on a CPU.
Memory is what it grows by over a step of two pairs: of the process on a CPU, of what torch allocated on a GPU. A step
that would hold more than `--limit-gb`, as `curate.jobs.memory` tells, is left out.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from curate.jobs.memory import trainer_memory
from curate.jobs.optimize import Trainee, make_optimizer, take_step
from curate.jobs.ranks import Ranks
from curate.models.create import create_model
from curate.models.encoder import normalize_pixels, split_transform
from curate.recipe import EncoderSection, TrainSection

SIZES = (2048, 8192, 32_768)
TINY = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="of open_clip; a tiny one if not given")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="b")
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--loss", choices=["sigmoid", "softmax"], default="sigmoid")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--limit-gb", type=float, default=8.0)
    asked = parser.parse_args()
    fork = multiprocessing.get_context("fork")  # before anything was computed: a fresh Python would import for seconds
    print("| b | pairs of a pass | first step, s | last step, s | pairs/s | peak, GB | stated, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for b in asked.sizes:
        for micro_batch in dict.fromkeys([min(b, asked.micro_batch), b]):
            with fork.Pool(1) as pool:
                found = pool.apply(measure, (vars(asked), b, micro_batch))
            print(f"| {b:,} | {micro_batch:,} | {found} |", flush=True)


def measure(asked: dict[str, Any], b: int, micro_batch: int) -> str:
    """Cells of one line."""
    torch.set_num_threads(1)
    device = torch.device(asked["device"])
    settings = TrainSection(
        micro_batch=micro_batch, grad_checkpointing=asked["grad_checkpointing"], compile=asked["compile"]
    )
    stated = trainer_memory(
        (made := _made(asked["model"]))[0],
        rows=b,
        batch=b,
        embed_dim=made[1]["embed_dim"],
        settings=settings,
        device_type=asked["device"],
    )
    # Weights, gradients and moments are there before memory is looked at.
    stated_gb = (stated.activations + stated.loss + (stated.batches if device.type == "cpu" else 0)) / 1e9
    if stated_gb > asked["limit_gb"]:
        return f"– | – | – | – | {stated_gb:.2f}"
    model = made[0].to(device)
    shift = split_transform(model)[1]
    if asked["loss"] == "softmax" and getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)
    if settings.compile:
        model.compile(dynamic=False)
    trainee = Trainee(
        model=model,
        parallel=model,
        optimizer=make_optimizer(model, settings),
        loss=asked["loss"],
        ranks=Ranks(rank=0, world_size=1, device=device),
        normalize=lambda pixels: normalize_pixels(pixels, shift),
        micro_batch=micro_batch,
        grad_clip=1.0,
        compiled=settings.compile,
    )
    side = stated_side(model)
    take_step(trainee, *drawn(2, side, model.context_length, device), rate=0.0)
    before = peak_bytes(device)
    batch = drawn(b, side, model.context_length, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(2 if device.type == "cuda" else 1):  # a GPU's first one allocates, and maybe compiles
        begun = clock()
        take_step(trainee, *batch, rate=0.0)  # ends with the norm of the gradient on the CPU: nothing is under way
        seconds.append(clock() - begun)
    peak_gb = (peak_bytes(device) - before) / 1e9
    return f"{seconds[0]:.2f} | {seconds[-1]:.2f} | {b / seconds[-1]:,.0f} | {peak_gb:.2f} | {stated_gb:.2f}"


def _made(name: str | None) -> tuple[Any, dict[str, Any]]:
    """A model with random weights, and its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.json").write_text(json.dumps(TINY))
        section = EncoderSection(model=name or "tiny.json")
        return create_model(section, role="learner", base=Path(folder), seed=0)[:2]


def stated_side(model: Any) -> int:
    """Pixels of a side."""
    size = model.visual.image_size
    return int(size if isinstance(size, int) else size[0])


def drawn(b: int, side: int, context_length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [b, side, side, 3] and token ids [b, context_length], in pinned memory where there is a GPU."""
    pixels = torch.randint(0, 256, (b, side, side, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
    return pixels, torch.randint(1, 1000, (b, context_length), pin_memory=device.type == "cuda")


def peak_bytes(device: torch.device) -> int:
    """The most that was held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not of getrusage, which begins with what the parent of the process held.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
