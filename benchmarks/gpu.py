"""What a card makes of the product: one command, tables while it runs, and one JSON file.

    python -m benchmarks.gpu --json out.json                 every part, at most 9 minutes, on an H100 with 16 cores
    python -m benchmarks.gpu --only selection,dedup          some of them
    python -m benchmarks.gpu --device cpu --small            every part in little on a CPU: does it run?

    kernels     tile shapes of the fused logits, and what the same takes when logits are written out
    selection   `jointly_sample_batch`: time, peak memory, share of the card's matmul rate
    dedup       cells, borders and pairs of planted rows, and all pairs of 1 M at once
    run         embedding from shards to files: how busy its loaders keep the encoder
    embed       `Encoder.encode`: pairs a second, and the share of the matmul rate by published GFLOPs
    train       `take_step` at b = 32,768 in micro-batches
    resume      the loss after a checkpoint was loaded, beside the loss without
    ranks       one super-batch on all cards of this machine, against one card

Each part runs in a process of its own, with what is left of --minutes: a part that fails or hangs says so and stops
none of the others. Weights are random, and rows are drawn on the device; nothing is downloaded.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

Row = dict[str, Any]

GFLOPS = {
    "ViT-B-32": (8.82, 5.96),
    "ViT-B-16": (35.13, 5.96),
    "ViT-L-14": (162.0, 13.3),
    "ViT-B-16-SigLIP": (35.42, 11.02),
}
"""Of the image and the text of one pair, 2 per multiply-add: open_clip's docs/model_profile.csv."""
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
D, CHUNKS = 512, 16
THRESHOLD = 0.95
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where and how large."""

    device: torch.device
    small: bool
    deadline: float
    """By `time.monotonic`: parts leave out what would hardly fit."""

    @property
    def cuda(self) -> bool:
        """Whether it is a card."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Best wall-clock time of several calls, after one that is not timed."""
        best = float("inf")
        for number in range(1 if self.small else repeats + 1):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            if number or self.small:
                best = min(best, time.perf_counter() - started)
        return best

    def peak_mib(self, run: Callable[[], object]) -> float:
        """By how much a call's peak of device memory exceeds what was held before; 0 on a CPU."""
        if not self.cuda:
            run()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / MIB


def matmul_tflops(where: Where, dtype: torch.dtype = torch.bfloat16) -> float:
    """The card's own rate of an 8192³ product of random numbers, TFLOP/s."""
    n, times = (256, 1) if where.small else (8192, 20)
    a, b = (torch.randn(n, n, device=where.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return 2 * n**3 * times / where.seconds(run) / 1e12


# --- the card ------------------------------------------------------------------------------------------------------


def card(where: Where) -> Iterator[Row]:
    yield {
        "card": torch.cuda.get_device_name() if where.cuda else platform.processor() or "cpu",
        "cards": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    n = MIB if where.small else 2**31
    source = torch.ones(n, dtype=torch.uint8, device=where.device)
    target = torch.empty_like(source)
    yield {
        "bf16 8192^3 TFLOP/s": matmul_tflops(where),
        "fp16": matmul_tflops(where, torch.float16),
        "fp32": matmul_tflops(where, torch.float32),
        "copy GB/s, read + written": 2 * n / where.seconds(lambda: target.copy_(source)) / 1e9,
    }


# --- selection -----------------------------------------------------------------------------------------------------


def pairs(where: Where, B: int) -> tuple[Any, Any]:
    """Clustered pairs under a noisy learner and a better reference, as stored: float16."""
    from curate.jest import Embeddings

    generator = torch.Generator(where.device).manual_seed(7)

    def noise() -> Tensor:
        return torch.randn(B, D, generator=generator, device=where.device)

    centres = torch.randn(256, D, generator=generator, device=where.device)
    drawn = centres[torch.randint(256, (B,), generator=generator, device=where.device)].add_(noise())
    models = []
    for spread, scale, bias in ((1.5, 40.0, -12.0), (0.7, 117.0, -12.9)):
        zimg, ztxt = (normalize(noise().mul_(spread).add_(drawn), dim=1).half() for _ in range(2))
        models.append(Embeddings(zimg, ztxt, scale, bias))
    return models[0], models[1]


def kernels(where: Where) -> Iterator[Row]:
    from curate import logits

    B, c = (300, 40) if where.small else (163_840, 2_048)
    z, columns = (normalize(torch.randn(n, D, device=where.device), dim=1).half() for n in (B, c))
    running = torch.zeros(B, device=where.device)
    flop = 2 * B * c * D
    rate = matmul_tflops(where, torch.float16)

    def timed(name: str, run: Callable[[], object]) -> Row:
        try:
            seconds = where.seconds(run)
        except Exception as error:  # a shape that does not fit the card, say: the others may
            return {"logits": name, "failed": str(error).strip().splitlines()[0][:100]}
        tflops = flop / seconds / 1e12
        return {"logits": name, "ms": seconds * 1e3, "TFLOP/s": tflops, "share of fp16 matmul": tflops / rate}

    def sigmoid() -> None:
        logits.add_softplus_(running, z, columns, scale=40.0, bias=-12.0)

    def softmax() -> None:
        logits.add_logsumexp_(running, z, columns, scale=40.0)

    with mock.patch.object(logits, "HAS_TRITON", False):
        yield timed("written out, sigmoid", sigmoid)
    if not where.cuda:
        return
    from curate import kernels as fused

    usual = dict(fused.LOGIT_TILE)
    for rows, width, depth, warps, stages in (
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (64, 256, 64, 4, 4),
        (64, 128, 64, 4, 4),
    ):
        shape = {"ROWS": rows, "COLUMNS": width, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
        name = f"fused {rows} × {width} × {depth}, {warps} warps, {stages} stages" + (
            " (ours)" if shape == usual else ""
        )
        with mock.patch.dict(fused.LOGIT_TILE, shape):
            for loss, run in (("sigmoid", sigmoid), ("softmax", softmax)):
                yield timed(f"{name}, {loss}", run)


def selection(where: Where) -> Iterator[Row]:
    from curate.jest import jointly_sample_batch

    rate = matmul_tflops(where, torch.float16)
    for B, b in ((1_600, 320),) if where.small else ((20_480, 4_096), (163_840, 32_768), (1_000_000, 32_768)):
        learner, reference = pairs(where, B)
        for loss in ("sigmoid", "softmax"):

            def draw(loss: Any = loss, learner: Any = learner, reference: Any = reference, b: int = b) -> Tensor:
                generator = torch.Generator().manual_seed(7)
                return jointly_sample_batch(
                    learner, reference, sub_batch_size=b, n_chunks=CHUNKS, loss=loss, generator=generator
                ).positions

            again = torch.equal(draw(), draw())
            seconds = where.seconds(draw)
            flop = 8 * B * (b - b // CHUNKS) * D
            yield {
                "B": B,
                "b": b,
                "loss": loss,
                "s": seconds,
                "peak MiB beside embeddings": where.peak_mib(draw),
                "embeddings MiB": 4 * B * D * 2 / MIB,
                "TFLOP/s": flop / seconds / 1e12,
                "share of fp16 matmul": flop / seconds / 1e12 / rate,
                "twice the same": again,
            }
        del learner, reference
        generator = torch.Generator().manual_seed(0)
        yield {"noise of one draw on the CPU, ms": 1e3 * where.seconds(lambda n=B, g=generator: _noise(n, g))}  # type: ignore[misc]


def _noise(n: int, generator: torch.Generator) -> Tensor:
    from curate import jest

    return jest._gumbel(n, generator)


# --- near-duplicates -----------------------------------------------------------------------------------------------


def planted(where: Where, rows: int) -> tuple[Tensor, Tensor]:
    """Rows [n, D] in clusters, a tenth of them copies of cosine .96 to .999; and [n] of which rows, or -1."""
    generator = torch.Generator(where.device).manual_seed(0)

    def noise(n: int) -> Tensor:
        return torch.randn(n, D, generator=generator, device=where.device)

    mean, centres = noise(1), noise(200)
    z = torch.empty(rows, D, dtype=torch.float16, device=where.device)
    source = torch.full((rows,), -1, device=where.device)
    step = 100_000
    for start in range(0, rows, step):
        n = min(step, rows - start)
        x = normalize(noise(n) + mean + centres[torch.randint(200, (n,), generator=generator, device=where.device)])
        if start + n > 1000:
            copies = n // 10
            # Of originals before this block, or in its first half.
            first = start or n // 2
            of = torch.randint(first, (copies,), generator=generator, device=where.device)
            if start:  # a copy of a copy is no original
                of = of.where(source[of] < 0, of - of % step)
                known = z[of].float()
            else:
                known = x[of]
            known, other = normalize(known), noise(copies)
            other = normalize(other - (other * known).sum(1, keepdim=True) * known)
            cosine = 0.96 + 0.039 * torch.rand(copies, 1, generator=generator, device=where.device)
            x[n - copies :] = cosine * known + (1 - cosine**2).sqrt() * other
            source[start + n - copies : start + n] = of
        z[start : start + n] = x
    return z, source


def dedup(where: Where) -> Iterator[Row]:
    from curate.dedup.neighbours import (
        Threshold,
        cell_count,
        near_pairs,
        normalized,
        sample_share,
        train_cells,
        unit_rows,
    )

    for n in (12_000,) if where.small else (1_000_000, 10_000_000):
        z, source = planted(where, n)
        clock = time.perf_counter()
        steps: dict[str, float] = {}

        def step(name: str, steps: dict[str, float] = steps) -> None:
            nonlocal clock
            where.wait()
            steps[f"{name} s"] = time.perf_counter() - clock
            clock = time.perf_counter()

        count = cell_count(n)
        sample = torch.randperm(n, device=where.device)[: round(n * sample_share(n, count))]
        rows = unit_rows(z[sample].cpu().numpy())
        clock = time.perf_counter()
        cells = train_cells(rows, count, where.device)
        step("k-means, faiss")
        places = cells.assign(z, THRESHOLD, where.device)
        step("placing")
        # Home rows of each cell and then those on its border, as the pipeline's tasks are sent them.
        home, border = (torch.from_numpy(of).to(where.device) for of in (places.home, places.border))
        cell = torch.cat([home, border.flatten()])
        row = torch.arange(n, device=where.device)
        of = torch.cat([row, row.repeat_interleave(border.shape[1])])
        K = len(cells.centroids)
        order = torch.sort(torch.where(cell < 0, K, cell), stable=True).indices
        sizes = torch.bincount(torch.where(cell < 0, K, cell), minlength=K + 1).tolist()
        members = torch.split(of[order], sizes)[:K]
        homes = torch.bincount(home, minlength=K).tolist()
        step("rows to cells")
        everyone = torch.ones(max(map(len, members)), dtype=torch.bool, device=where.device)
        found = [torch.empty(0, dtype=torch.int64)]
        threshold = Threshold(image=THRESHOLD)
        for at, inner in zip(members, homes, strict=True):
            fresh = everyone[: len(at)]
            rows_of = at.cpu()
            for i, j, _ in near_pairs(
                normalized(z[at]), None, threshold, inner=inner, fresh=fresh, images_alone=~fresh
            ):
                a, b = rows_of[torch.from_numpy(i)], rows_of[torch.from_numpy(j)]
                found.append(torch.minimum(a, b) * n + torch.maximum(a, b))
        keys = torch.unique(torch.cat(found))
        step("search")
        copies = (source >= 0).nonzero().squeeze(1)
        one, other = normalized(z[copies]), normalized(z[source[copies]])
        near = (one * other).sum(1) >= THRESHOLD
        lost = copies[near]
        planted_keys = torch.minimum(lost, source[lost]) * n + torch.maximum(lost, source[lost])
        there = torch.isin(planted_keys.cpu(), keys).double().mean()
        yield {
            "rows": n,
            "cells": K,
            "largest": max(map(len, members)),
            **steps,
            "all s": sum(steps.values()),
            "pairs": len(keys),
            "planted": len(lost),
            "found of planted": float(there),
            "beyond": int(places.beyond.sum()),
        }
        if n <= 1_000_000:
            yield all_pairs(where, z, keys)
        del z, of, order, members


def all_pairs(where: Where, z: Tensor, keys: Tensor) -> Row:
    """Every pair of rows compared; how many of the pairs so found are among those that were found cell by cell."""
    from curate.dedup.neighbours import Threshold, near_pairs, normalized

    n, unit = len(z), normalized(z)
    every = torch.ones(n, dtype=torch.bool, device=where.device)
    where.wait()
    started = time.perf_counter()
    by = near_pairs(unit, None, Threshold(image=THRESHOLD), inner=n, fresh=every, images_alone=~every)
    truth = torch.cat([torch.from_numpy(i * n + j) for i, j, _ in by])
    seconds = time.perf_counter() - started
    return {
        "all pairs of": n,
        "s": seconds,
        "TFLOP/s": n * n * D / seconds / 1e12,
        "pairs": len(truth),
        "cells found of them": float(torch.isin(truth, keys).double().mean()),
        "cells found others": int((~torch.isin(keys, truth)).sum()),
    }


# --- embed ---------------------------------------------------------------------------------------------------------


def model_of(where: Where, name: str) -> Any:
    """An open_clip model with random weights, and its context length and vocabulary."""
    import open_clip

    if where.small:
        config = Path(tempfile.mkdtemp()) / "tiny.json"
        config.write_text(json.dumps(TINY))
        open_clip.add_model_config(config)
        name = "tiny"
    torch.manual_seed(0)
    return open_clip.create_model(name, pretrained=None, pretrained_image=False, device=where.device)


def encoder_of(where: Where, model: Any, tokenizer: Any = None, **how: Any) -> Any:
    from curate.models.encoder import Encoder
    from curate.models.spec import EncoderSpec

    with torch.no_grad():
        width = model.encode_text(torch.zeros(1, model.context_length, dtype=torch.int64, device=where.device)).shape[1]
    spec = EncoderSpec(
        model="random",
        source="random",
        weights_sha256="",
        embed_dim=width,
        logit_scale=1.0,
        logit_bias=0.0,
        precision="bf16" if where.cuda else "fp32",
    )
    return Encoder(spec, model, tokenizer, where.device, **how)


def batch_of(where: Where, model: Any, n: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Random pixels and captions of so many tokens (all if None), in pinned memory."""
    from curate.models.encoder import image_size_of

    text = getattr(model, "text", model)
    length, words = model.context_length, getattr(text, "vocab_size", 512)
    height, width = image_size_of(model)
    drawn = torch.randint(0, 256, (min(n, 1024), height, width, 3), dtype=torch.uint8)
    pixels = drawn.repeat(-(-n // 1024), 1, 1, 1)[:n]  # to draw 32,768 would take longer than to train on them
    texts = torch.zeros(n, length, dtype=torch.int64)
    used = length if tokens is None else min(tokens, length)
    texts[:, :used] = torch.randint(1, words - 1, (n, used))
    texts[:, used - 1] = words - 1  # the end of the text has the largest number
    return (pixels.pin_memory(), texts.pin_memory()) if where.cuda else (pixels, texts)


def embed(where: Where) -> Iterator[Row]:
    rate = matmul_tflops(where)
    for compiled in (False, True) if not where.small else (False,):
        for name, gflop in GFLOPS.items():
            if compiled and where.left_s < 75:
                yield {"model": name, "compiled": True, "left out": f"{where.left_s:.0f} s left"}
                continue
            n = 8 if where.small else 512
            model = model_of(where, name)
            own = copy.deepcopy(model)  # which the encoder casts
            encoder = encoder_of(where, own, **({"compile_for": n} if compiled else {}))
            started = time.perf_counter()
            encoder.encode(*batch_of(where, model, n))
            where.wait()
            first_s = time.perf_counter() - started
            for tokens in (None, 24):
                batches = [batch_of(where, model, n, tokens) for _ in range(2)]
                times = 1 if where.small else max(4, round(300 / sum(gflop)) * 4)

                def run(encoder: Any = encoder, batches: Any = batches, times: int = times) -> None:
                    for number in range(times):
                        encoder.encode(*batches[number % 2])

                seconds = where.seconds(run, repeats=2) / times
                share = {"share of bf16 matmul": n / seconds * sum(gflop) / 1e3 / rate} if tokens is None else {}
                yield {
                    "model": name,
                    "compiled": compiled,
                    "batch": n,
                    "tokens": model.context_length if tokens is None else tokens,
                    "first batch s": first_s,
                    "pairs/s": n / seconds,
                    **(share or {"share of bf16 matmul": None}),
                    "cosine to fp32": _fidelity(where, model, encoder, batches[0]),
                }
            del model, own, encoder, batches
            if where.cuda:
                torch.cuda.empty_cache()


@torch.inference_mode()
def _fidelity(where: Where, model: Any, encoder: Any, batch: tuple[Tensor, Tensor]) -> float:
    """Least cosine of a few embeddings with those of plain open_clip in float32."""
    pixels, texts = (part[:16].to(where.device) for part in batch)
    own = torch.cat([z.to(where.device)[:16] for z in encoder.encode(*batch)])
    plain = torch.cat([model.encode_image(encoder.normalize(pixels)), model.encode_text(texts)])
    return float((own * normalize(plain, dim=1)).sum(1).min())


def run(where: Where) -> Iterator[Row]:
    """One model's real run, from shards on disk to embedding files, beside what its encoder alone does."""
    import open_clip
    import pyarrow.parquet as pq

    from curate.embed.run import Embedder
    from curate.jobs.drawn_pool import draw_pool
    from curate.pool.inventory import take_inventory
    from curate.recipe import EmbedSection, PoolSection
    from curate.storage import Store

    rows, copies, batch = (32, 3, 8) if where.small else (2_048, 24, 512)
    loaders = 0 if where.small else max(1, (os.cpu_count() or 1) - 2)
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool"
        draw_pool(pool, rows=rows, shards=1, seed=0, image_size=32 if where.small else 256)
        (first,) = pool.glob("*.parquet")
        for number in range(copies):  # to draw them all would take minutes
            shutil.copyfile(first, pool / f"copy-{number:02d}.parquet")
        shards = take_inventory(PoolSection(path=str(pool), uid="key")).shards
        for name in ("ViT-B-32", "ViT-B-16"):
            model = model_of(where, name)
            encoder = encoder_of(
                where, model, tokenizer=open_clip.get_tokenizer("ViT-B-32", context_length=model.context_length)
            )
            pixels, texts = batch_of(where, model, batch)
            texts.copy_(encoder.tokenize(pq.read_table(first)["caption"].to_pylist()[:batch]))
            times = 1 if where.small else 20

            def alone(
                encoder: Any = encoder, pixels: Tensor = pixels, texts: Tensor = texts, times: int = times
            ) -> None:
                for _ in range(times):
                    encoder.encode(pixels, texts)

            alone_s = where.seconds(alone)
            embedder = Embedder({"m": encoder}, EmbedSection(batch_size=batch), loaders=loaders)
            store = Store(f"{folder}/root")

            def one(number: int, embedder: Any = embedder, store: Any = store, name: str = name) -> None:
                embedder.embed(shards[number], {"m": f"{name}/{number}"}, store)

            one(0)  # the loaders start
            started = time.perf_counter()
            with ThreadPoolExecutor(copies) as threads:
                list(threads.map(one, range(1, len(shards))))
            seconds = time.perf_counter() - started
            embedder.close()
            ours, bare = rows * (len(shards) - 1) / seconds, batch * times / alone_s
            yield {
                "model": name,
                "loaders": loaders,
                "of kind": type(embedder._loader).__name__,
                "/dev/shm MiB": shutil.disk_usage("/dev/shm").free // MIB,
                "pairs": rows * (len(shards) - 1),
                "s": seconds,
                "pairs/s": ours,
                "encoder alone, pairs/s": bare,
                "share of it": ours / bare,
            }


# --- train ---------------------------------------------------------------------------------------------------------


def trainee_of(where: Where, name: str, micro_batch: int, *, compiled: bool = False) -> Any:
    from curate.jobs.optimize import Trainee, make_optimizer
    from curate.jobs.ranks import Ranks
    from curate.models.encoder import normalize_pixels, split_transform
    from curate.recipe import TrainSection

    model = model_of(where, name)
    forward = torch.compile(model) if compiled else model
    ranks = Ranks(rank=0, world_size=1, device=where.device)
    return Trainee(
        model=model,
        parallel=forward,
        optimizer=make_optimizer(model, TrainSection(steps=10)),
        loss="softmax",
        ranks=ranks,
        normalize=partial(normalize_pixels, shift=split_transform(model)[1]),
        micro_batch=micro_batch,
        grad_clip=1.0,
    )


def train(where: Where) -> Iterator[Row]:
    from curate.jobs.optimize import take_step

    rate = matmul_tflops(where)
    b = 64 if where.small else 32_768
    for name in ("ViT-B-32", "ViT-B-16"):
        trainee = trainee_of(where, name, 16 if where.small else 1024)
        pixels, texts = batch_of(where, trainee.model, b)
        losses: list[float] = []

        def step(trainee: Any = trainee, pixels: Tensor = pixels, texts: Tensor = texts, losses: Any = losses) -> None:
            losses.append(take_step(trainee, pixels, texts, rate=1e-4)[0])

        peak = where.peak_mib(step)  # what is set up once is set up here
        started = time.perf_counter()
        step()
        where.wait()
        seconds = time.perf_counter() - started
        # Embedded without a gradient, then with one, which costs two more.
        flop = b * sum(GFLOPS[name]) * 4 * 1e9
        yield {
            "model": name,
            "b": b,
            "micro-batch": trainee.micro_batch,
            "s a step": seconds,
            "pairs/s": b / seconds,
            "share of bf16 matmul": flop / seconds / 1e12 / rate,
            "peak MiB": peak,
            "losses": " ".join(f"{loss:.4f}" for loss in losses),
        }
        if where.left_s < 120:
            return


def resume(where: Where) -> Iterator[Row]:
    from curate.jobs.checkpoint import Progress, checkpoints, load_checkpoint, restore, save_checkpoint
    from curate.jobs.optimize import take_step
    from curate.models.spec import EncoderSpec
    from curate.storage import Store

    name, b, micro_batch = "ViT-B-32", 16 if where.small else 1024, 4 if where.small else 256
    spec = EncoderSpec(model="random", source="random", weights_sha256="", embed_dim=0, logit_scale=1.0, logit_bias=0.0)
    first = trainee_of(where, name, micro_batch)
    batches = [batch_of(where, first.model, b) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        before = [take_step(first, *batch, rate=1e-4)[0] for batch in batches[:2]]
        progress = Progress(data="rounds", start=spec, step=2, next_batch=2, learner=0, learner_step=0, batch_losses={})
        save_checkpoint(store, progress, first.model, first.optimizer)
        uninterrupted = [take_step(first, *batch, rate=1e-4)[0] for batch in batches[2:]]
        second = trainee_of(where, name, micro_batch)
        restore(load_checkpoint(store, checkpoints(store)[-1])[1], second.model, second.optimizer)
        resumed = [take_step(second, *batch, rate=1e-4)[0] for batch in batches[2:]]
    yield {
        "before": " ".join(f"{loss:.6f}" for loss in before),
        "uninterrupted": " ".join(f"{loss:.6f}" for loss in uninterrupted),
        "resumed": " ".join(f"{loss:.6f}" for loss in resumed),
        "largest difference": max(abs(a - b) for a, b in zip(uninterrupted, resumed, strict=True)),
    }


# --- several cards -------------------------------------------------------------------------------------------------


def ranks(where: Where) -> Iterator[Row]:
    count = 2 if where.small else torch.cuda.device_count()
    if count < 2:
        yield {"cards": count, "left out": "needs two"}
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_share, (count, folder, where.device.type, where.small), nprocs=count)  # type: ignore[no-untyped-call]
        yield json.loads((Path(folder) / "found.json").read_text())


def _share(rank: int, count: int, folder: str, device_type: str, small: bool) -> None:
    from curate.jest import Embeddings, jointly_sample_batch

    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = Where(device=device, small=small, deadline=time.monotonic() + 600)
    method = f"file://{folder}/store"
    distributed.init_process_group("nccl" if where.cuda else "gloo", init_method=method, rank=rank, world_size=count)
    B, b = (1_600, 320) if small else (163_840, 32_768)
    models = pairs(where, B)  # of one seed: every rank has all of them, and shows its part
    own = [
        Embeddings(m.zimg.tensor_split(count)[rank], m.ztxt.tensor_split(count)[rank], m.logit_scale, m.logit_bias)
        for m in models
    ]
    everyone = distributed.group.WORLD

    def draw(models: Any, group: Any) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return jointly_sample_batch(
            *models, sub_batch_size=b, n_chunks=CHUNKS, generator=generator, group=group
        ).positions

    alone_s = where.seconds(lambda: draw(models, None))
    shared_s = where.seconds(lambda: draw(own, everyone))
    same = torch.equal(draw(models, None), draw(own, everyone))
    if rank == 0:
        found = {"cards": count, "B": B, "b": b, "one card s": alone_s, "all cards s": shared_s, "same rows": same}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


# --- the command ---------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Where], Iterator[Row]]] = {
    "card": card,
    "kernels": kernels,
    "selection": selection,
    "dedup": dedup,
    "train": train,
    "resume": resume,
    "ranks": ranks,
    "run": run,
    "embed": embed,
}
"""In the order in which they run: what takes what is left of the time comes last."""


def cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_section(name: str, where: Where, out: Path) -> None:
    """Run one part in this process: a table on stdout, and the same in a file, row by row."""
    rows: list[Row] = []
    titles: list[str] = []
    try:
        for row in SECTIONS[name](where):
            rows.append(row)
            out.write_text(json.dumps({"rows": rows}))
            cells = [cell(value) for value in row.values()]
            widths = [max(len(title), len(text), 6) for title, text in zip(row, cells, strict=True)]
            if list(row) != titles:
                titles = list(row)
                print("  ".join(title.rjust(width) for title, width in zip(titles, widths, strict=True)))
            print("  ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)), flush=True)
    except BaseException as error:
        traceback.print_exc()
        out.write_text(json.dumps({"rows": rows, "failed": f"{type(error).__name__}: {error}"}))
        raise SystemExit(1) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="parts, with commas between them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--json", type=Path, help="write the figures here too, after each part")
    parser.add_argument("--section-out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - set(SECTIONS)):
        parser.error(f"--only: expected {', '.join(SECTIONS)}, found {', '.join(unknown)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a CUDA device, found none; --device cpu --small tries the code")
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.section_out:
        device = torch.device(arguments.device)
        run_section(names[0], Where(device=device, small=arguments.small, deadline=deadline), arguments.section_out)
        return
    report: dict[str, Any] = {}
    for name in names:
        left = deadline - time.monotonic()
        print(f"\n=== {name} ({left:.0f} s left)", flush=True)
        started = time.monotonic()
        report[name] = _in_a_process(name, arguments, left)
        report[name]["wall_s"] = round(time.monotonic() - started, 1)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, found in report.items() if "failed" in found]
    print(
        f"\n{len(names) - len(failed)} of {len(names)} parts ran" + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    raise SystemExit(1 if failed else 0)


def _in_a_process(name: str, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--device", arguments.device]
        command += ["--section-out", str(out), "--minutes", str(max(left, 1) / 60)]
        command += ["--small"] if arguments.small else []
        failed = None
        try:
            status = subprocess.run(command, timeout=max(left, 1), check=False).returncode
            if status:
                failed = f"exit status {status}"
        except subprocess.TimeoutExpired:
            failed = f"no end within {left:.0f} s"
            print(failed, flush=True)
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": []}
        return found | ({"failed": found.get("failed", failed)} if failed else {})


if __name__ == "__main__":
    main()
