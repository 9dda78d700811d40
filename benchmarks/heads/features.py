"""Features of real pictures and captions, by a small model that is trained on them here: what a frozen backbone gives.

The pairs are `emoji-en` (four drawing styles of each concept), `openstax-dev` and `openstax-physics-ml` (pictures of
textbooks, some in three languages). The backbone sees all of them, as a pretrained one has seen most of the web; the
learners and references of the study see what their world gives them.
"""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from tqdm import trange

from curate.errors import UserError
from curate.jobs.contrastive import contrastive_loss
from curate.jobs.ranks import Ranks

SETS = ("emoji-en", "openstax-dev", "openstax-physics-ml")
SIZE, VIEWS = 32, 4
"""Pixels of a side; random crops of each picture, each a row of its own with its caption."""
STEPS, BATCH, RATE = 1200, 256, 2e-3
CONFIG = {
    "embed_dim": 64,
    "init_logit_scale": 2.302585,
    "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def features(data: Path, cache: Path) -> dict[str, npt.NDArray[Any]]:
    """The features of all pairs, made once.

    Args:
        data: folder of the three sets.
        cache: folder for what was made.

    Returns:
        ``image`` and ``text``, float32 [N · VIEWS, 64], each column of mean 0 and variance 1; ``label``, int64: pairs
        of one label belong to each other; ``row``, int64: the picture. The first N are a crop of each picture.

    Raises:
        UserError: a set is not there.
    """
    if missing := [name for name in SETS if not (data / name).is_dir()]:
        raise UserError(
            f"{data}: expected the sets {', '.join(SETS)}, found no {', '.join(missing)}; give their folder"
        )
    path = cache / f"features-{hashlib.sha256(repr([CONFIG, VIEWS, STEPS, BATCH, RATE]).encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp.npz")
        np.savez(scratch, allow_pickle=False, **_make(data))
        os.replace(scratch, path)
    return dict(np.load(path))


def _make(data: Path) -> dict[str, npt.NDArray[Any]]:
    rows = [row | {"set": name} for name in SETS for row in pq.read_table(data / name).to_pylist()]
    pixels = torch.from_numpy(np.stack([_pixels(row["jpg"]) for row in rows]))
    labels = _labels(rows)
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    texts = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])(  # type: ignore[index]
        [row["caption"] for row in rows]
    )
    _train(model, pixels, texts)
    found: list[list[Tensor]] = [[], []]
    generator = torch.Generator().manual_seed(1)
    model.eval()
    with torch.inference_mode():
        text = torch.cat([_text_features(model, part) for part in torch.split(texts, 512)])
        for _ in range(VIEWS):
            crops = _crops(pixels, generator)
            found[0].append(torch.cat([_image_features(model, part) for part in torch.split(crops, 512)]))
            found[1].append(text)
    image, text = (torch.cat(parts) for parts in found)
    every = torch.arange(len(rows)).repeat(VIEWS)
    return {
        "image": _standardised(image),
        "text": _standardised(text),
        "label": torch.from_numpy(labels)[every].numpy(),
        "row": every.numpy(),
    }


def _pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """A picture, its shorter side cropped a little larger than the model wants it, for crops."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    side = SIZE + 4
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def _labels(rows: list[dict[str, str]]) -> npt.NDArray[np.int64]:
    """Pairs of one concept and pairs of one caption share a number."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(item: tuple[str, str]) -> tuple[str, str]:
        while (above := parent.setdefault(item, item)) != item:
            item = above
        return item

    for row in rows:
        names = [("caption", row["caption"])]
        if row.get("concept"):
            names.append((row["set"], row["concept"]))
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    _, labels = np.unique([str(root(("caption", row["caption"]))) for row in rows], return_inverse=True)
    return labels.astype(np.int64)


def _train(model: open_clip.CLIP, pixels: Tensor, texts: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    alone = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    bar = trange(STEPS, desc="features", disable=None)
    for step in bar:
        rows = torch.randperm(len(pixels), generator=generator)[:BATCH]
        zimg, ztxt, scale = model(_normalised(_crops(pixels[rows], generator)), texts[rows])
        loss = contrastive_loss(zimg, ztxt, scale, None, loss="softmax", ranks=alone)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def _crops(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by some pixels, uint8 [n, SIZE, SIZE, 3]."""
    dy, dx = torch.randint(pixels.shape[1] - SIZE + 1, (2, len(pixels)), generator=generator)
    rows = torch.arange(SIZE)
    return pixels[
        torch.arange(len(pixels))[:, None, None], (dy[:, None] + rows)[:, :, None], (dx[:, None] + rows)[:, None]
    ]


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels.permute(0, 3, 1, 2).float() - 127.5) / 64


def _image_features(model: open_clip.CLIP, pixels: Tensor) -> Tensor:
    """What the image tower knows before its projection."""
    projection, model.visual.proj = model.visual.proj, None
    try:
        found: Tensor = model.encode_image(_normalised(pixels))
        return found
    finally:
        model.visual.proj = projection


def _text_features(model: open_clip.CLIP, texts: Tensor) -> Tensor:
    projection, model.text_projection = model.text_projection, None
    try:
        found: Tensor = model.encode_text(texts)
        return found
    finally:
        model.text_projection = projection


def _standardised(x: Tensor) -> npt.NDArray[np.float32]:
    x = (x - x.mean(0)) / x.std(0)
    return x.float().numpy()
