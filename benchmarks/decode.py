"""From a JPEG's bytes to the pixels that a model sees: time on one thread, and how far the ways are apart.

    python -m benchmarks.decode                                    drawn pictures: about 2 minutes
    python -m benchmarks.decode FOLDER                             your own: image files, or Parquet shards with `jpg`
    python -m benchmarks.decode FOLDER --resize-mode squash        as SigLIP's transform has it
    python -m benchmarks.decode FOLDER --pretrained laion2b_s34b_b79k

Pictures are reduced to the shorter side that a table names, and encoded at quality 90, colours halved. In one process,
alternating, median CPU time per picture of --repeats:

    open_clip   its transform: Pillow's decode and resize, crop, ToTensor, Normalize
    exact       the crop of `embed.exact_pixels = true`: the same without the last two, which a whole batch is given
    fast        the crop of `embed.exact_pixels = false`
    decode      the fast way's decode alone, which is the least that any can take

The levels are those by which pixels differ from open_clip's, and 1 - cos is between the embeddings of both: by random
weights, unless --pretrained names others.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import pyarrow.parquet as pq
import torch
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from curate.jobs.drawn_pool import draw_pair
from curate.models.crop import Crop, decode_for
from curate.models.encoder import normalize_pixels, split_transform
from curate.pool.images import Dropped, decode_image, decode_pixels

SIZES = (256, 512, 1024)
MOST = 64
"""Pictures of one size."""


def sources(path: Path | None) -> Iterator[Image.Image]:
    """Pictures as they are found."""
    if path is None:
        for row in range(MOST):
            yield decode_image(draw_pair(0, row, image_size=max(SIZES))[0])
        return
    for file in sorted(path.rglob("*")):
        if file.suffix == ".parquet":
            found = pq.read_table(file, columns=["jpg"])["jpg"].to_pylist()
        else:
            found = [file.read_bytes()] if file.is_file() else []
        for data in found:
            try:
                yield decode_image(data)
            except Dropped:
                continue


def reduced(pictures: list[Image.Image], size: int) -> list[bytes]:
    """JPEGs with that shorter side, of the pictures that are no smaller."""
    made = []
    for picture in [picture for picture in pictures if min(picture.size) >= size][:MOST]:
        scale = size / min(picture.size)
        out = BytesIO()
        sides = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(sides, Image.Resampling.LANCZOS).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return made


def times(ways: dict[str, Callable[[bytes], Any]], files: list[bytes], repeats: int) -> dict[str, float]:
    """µs of CPU time per picture."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            for data in files:
                way(data)
            taken[name].append((time.process_time() - began) / len(files) * 1e6)
    return {name: statistics.median(found) for name, found in taken.items()}


def apart(model: Any, exact: list[Tensor], fast: list[Tensor]) -> str:
    """1 - cos between the embeddings of the same pictures, mean and most."""
    with torch.inference_mode():
        ours, theirs = (normalize(model.encode_image(torch.stack(images)).double(), dim=1) for images in (fast, exact))
    # |a - b|² = 2 (1 - cos) of unit rows, which loses no digits where a and b are all but equal
    found = (ours - theirs).square().sum(1) / 2
    return f"{found.mean():.1e}, {found.max():.1e}"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--resize-mode", choices=("shortest", "squash"), default="shortest")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pretrained")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = open_clip.create_model(options.model, options.pretrained).eval()
    model.visual.preprocess_cfg["resize_mode"] = options.resize_mode
    cfg = PreprocessCfg(**model.visual.preprocess_cfg)
    transform = image_transform_v2(cfg, is_train=False)
    (exact, shift), (fast, _) = split_transform(model), split_transform(model, exact=False)
    assert fast.fast, cfg

    def way(crop: Crop) -> Callable[[bytes], Any]:
        return lambda data: crop(decode_for(data, [crop]))

    ways: dict[str, Callable[[bytes], Any]] = {
        "open_clip": lambda data: transform(Image.open(BytesIO(data))),
        "exact": way(exact),
        "fast": way(fast),
        "decode": decode_pixels,
    }
    print(
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, one thread; Pillow {PIL.__version__}, "
        f"torchvision {torchvision.__version__}, open_clip {open_clip.__version__}; to {cfg.size} px, "
        f"{options.resize_mode}, {cfg.interpolation}; {options.model}, {options.pretrained or 'random weights'}\n"
    )
    print("| shorter side, px | pictures, kB | " + " | ".join(f"{name}, µs" for name in ways), end="")
    print(" | exact, × | fast, × | decode / fast | levels, most and mean | 1 - cos, mean and most |")
    print("|" + "---|" * (len(ways) + 7))
    pictures = list(sources(options.path))
    for size in SIZES:
        files = reduced(pictures, size)
        if not files:
            print(f"| {size} | none so large |")
            continue
        crops = {crop.exact: [way(crop)(data) for data in files] for crop in (exact, fast)}
        theirs = [transform(Image.open(BytesIO(data))) for data in files]
        images = {kind: normalize_pixels(torch.from_numpy(np.stack(found)), shift) for kind, found in crops.items()}
        assert all(map(torch.equal, theirs, images[True])), "exact is not open_clip's"
        levels = np.abs(np.stack(crops[True]).astype(int) - np.stack(crops[False]))
        us = times(ways, files, options.repeats)
        kb = statistics.mean(map(len, files)) / 1e3
        print(
            f"| {size} | {len(files)}, {kb:.0f} | "
            + " | ".join(f"{took:,.0f}" for took in us.values())
            + f" | {us['open_clip'] / us['exact']:.2f} | {us['open_clip'] / us['fast']:.2f}"
            + f" | {us['decode'] / us['fast']:.2f} | {levels.max()}, {levels.mean():.4f}"
            + f" | {apart(model, theirs, list(images[False]))} |"
        )


if __name__ == "__main__":
    main()
