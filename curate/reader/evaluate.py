"""How good a learner is: retrieval within a held-out set, and zero-shot classification where the set has labels.

Retrieval is judged as if a tie were lost. Images equal in bytes are one image, captions equal after `clean_caption`
are one caption. An image is a hit at K if fewer than K captions that do not belong to it score at least as high as the
best of its own; the same from text to image. A collapsed model, which embeds everything alike, so scores 0. So do long
captions that the tokenizer cuts to the same beginning: to the model they are equal.

Letters: Q queries, C candidates, P pairs of them that belong together, D dimensions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from curate.errors import UserError
from curate.logits import TIE
from curate.models.crop import Preprocess, decode_for, pixels_of
from curate.pool.images import Dropped, DropReason, clean_caption, decode_pixels
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, Shard, caption_bytes, image_bytes, read_batches
from curate.recipe import PoolSection

MAX_ROWS = 100_000
"""Of a held-out set, which is held in memory as encoded bytes: about 5 GB at 50 kB a picture."""
READ_ROWS = 1024
BLOCK_ROWS = 512
"""Queries that are scored at once: 200 MB of scores against `MAX_ROWS` candidates."""
NEVER = torch.iinfo(torch.int64).max
"""The rivals of a query that is no hit at any K."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out set in memory."""

    images: tuple[bytes, ...]
    """Distinct, still encoded; every one of them decodes."""
    captions: tuple[str, ...]
    """Distinct, clean."""
    pairs: tuple[tuple[int, int], ...]
    """(image, caption) of each usable row, in the order read."""
    labels: tuple[str | None, ...] | None
    """Class of each usable row, None where the row has none; None without a label column."""
    dropped: dict[str, int]
    """Rows that cannot be used, by reason: the rows of the set are `len(pairs)` and these."""


def load_held_out(
    path: str | list[str],
    *,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
    threads: int = 1,
) -> HeldOut:
    """Read a held-out set, and try every row of it once.

    Args:
        path: folder, glob, file or URL of Parquet files, or a list.
        image: image column; found by convention if not given.
        caption: caption column; likewise.
        label: column of class names. A row whose label is null, blank or not UTF-8 counts for retrieval alone.
        threads: that decode.

    Raises:
        UserError: as `take_inventory`; too many rows, no usable row, no label column, or fewer than two classes.
        InputChangedError: a file changed while it was read.
    """
    try:
        pool = take_inventory(PoolSection(path=path, image=image, caption=caption))
    except UserError as error:  # whose way out names fields of the pool's section
        lines = (re.sub(r"\bpool\.(path|image|caption)\b", r"evaluate.\1", line) for line in error.lines)
        raise UserError(*lines) from None
    if pool.rows > MAX_ROWS:
        raise UserError(
            f"evaluate.path = {path!r}: expected at most {MAX_ROWS:,} rows, which are held in memory, found "
            f"{pool.rows:,}; name fewer files of the set"
        )
    images: dict[bytes, int] = {}  # each with its position
    captions: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    labels: list[str | None] = []
    dropped = Counter[str]()
    names = list(dict.fromkeys([pool.columns.image, pool.columns.caption, *([label] if label else [])]))
    with ThreadPoolExecutor(threads) as executor:
        for shard in pool.shards:
            for batch in read_batches(shard, names, batch_rows=READ_ROWS):
                data = image_bytes(batch.column(pool.columns.image)).to_pylist()
                raw = caption_bytes(batch.column(pool.columns.caption)).to_pylist()
                classes = _class_names(batch, label, shard, pool) if label else [None] * len(data)
                for encoded, name, (text, reason) in zip(data, classes, executor.map(_tried, data, raw), strict=True):
                    if reason is not None:
                        dropped[reason] += 1
                        continue
                    pairs.append((images.setdefault(encoded, len(images)), captions.setdefault(text, len(captions))))
                    labels.append(name)
    if not pairs:
        why = ", ".join(f"{rows} {reason}" for reason, rows in sorted(dropped.items())) or "the files are empty"
        raise UserError(f"evaluate.path = {path!r}: expected a usable pair, found none ({why}); name another set")
    if label and (classes_found := len({name for name in labels if name is not None})) < 2:
        raise UserError(
            f"evaluate.label = {label!r}: expected two classes or more among the usable rows, found {classes_found}; "
            "name another column, or leave evaluate.label out"
        )
    return HeldOut(
        images=tuple(images),
        captions=tuple(captions),
        pairs=tuple(pairs),
        labels=tuple(labels) if label else None,
        dropped=dict(sorted(dropped.items())),
    )


def evaluate(
    model: Any,
    tokenize: Callable[[list[str]], Tensor],
    preprocess: Preprocess,
    held_out: HeldOut,
    *,
    device: torch.device,
    batch_size: int,
    templates: Sequence[str],
    threads: int = 1,
    normalize_images: Callable[[Tensor], Tensor] = lambda images: images,
) -> dict[str, float]:
    """Embed the held-out set with the model as it is and judge it; the model is left as it was found.

    A row whose embedding is not finite is a miss as a query, and as a candidate it is never found nor in the way.

    For zero-shot classification a class is the mean of its texts' unit embeddings, one text per template, brought to
    unit length again (CLIP, arXiv 2103.00020, 3.1.4). Classes are the distinct labels, in alphabetical order. The
    rule for ties is that of retrieval; an image that rows label differently is right with any of its labels.

    Args:
        model: open_clip's, on its device, in any mode.
        tokenize: open_clip's tokenizer.
        preprocess: open_clip's transform for inference, or its crop.
        held_out: from `load_held_out`.
        device: the model's.
        batch_size: images, or texts, per forward pass.
        templates: texts in which `{}` stands for the class; used where the set has labels.
        threads: that decode.
        normalize_images: what is left to do, on the device, to a batch of what `preprocess` makes.

    Returns:
        Shares in [0, 1]: `image_to_text_r1`, `image_to_text_r5`, `text_to_image_r1`, `text_to_image_r5`; with labels
        `zero_shot_top1`, and `zero_shot_top5` if there are more than 5 classes.
    """
    # Without a gradient, but not in inference mode: weights that FSDP gathers first then could not be trained later.
    with _in_eval(model), torch.no_grad(), ThreadPoolExecutor(threads) as executor:

        def pixels(images: list[bytes]) -> Tensor:
            return torch.stack(
                list(executor.map(lambda data: pixels_of(decode_for(data, [preprocess]), preprocess), images))
            )

        def encode_image(images: Tensor, *, normalize: bool) -> Tensor:
            zimg: Tensor = model.encode_image(normalize_images(images), normalize=normalize)
            return zimg

        zimg = _embed(encode_image, pixels, held_out.images, batch_size, device)  # [images, D]
        ztxt = _embed(model.encode_text, tokenize, held_out.captions, batch_size, device)  # [captions, D]
        pairs = torch.tensor(held_out.pairs, device=device)  # [rows, 2]
        to_text, to_image = count_rivals(zimg, ztxt, pairs), count_rivals(ztxt, zimg, pairs.flip(1))
        figures = {
            "image_to_text_r1": recall(to_text, 1),
            "image_to_text_r5": recall(to_text, 5),
            "text_to_image_r1": recall(to_image, 1),
            "text_to_image_r5": recall(to_image, 5),
        }
        if held_out.labels is not None:
            classes = sorted({label for label in held_out.labels if label is not None})
            texts = [template.replace("{}", label) for label in classes for template in templates]
            by_text = _embed(model.encode_text, tokenize, texts, batch_size, device)
            weights = normalize(by_text.view(len(classes), len(templates), -1).mean(1), dim=-1)  # [classes, D]
            rows = zip(held_out.pairs, held_out.labels, strict=True)
            number_of = {label: number for number, label in enumerate(classes)}
            own = [(image, number_of[label]) for (image, _), label in rows if label is not None]
            rivals = count_rivals(zimg, weights, torch.tensor(own, device=device))
            to_class = rivals[sorted({image for image, _ in own})]
            figures["zero_shot_top1"] = recall(to_class, 1)
            if len(classes) > 5:
                figures["zero_shot_top5"] = recall(to_class, 5)
    return figures


def count_rivals(queries: Tensor, candidates: Tensor, positives: Tensor, *, block_rows: int = BLOCK_ROWS) -> Tensor:
    """Count, for each query, the candidates of others that score at least as high as the best of its own.

    Below, the first query has its own candidate 0 at score 1 and the others at 0.6 and 0, so no rival. The second
    has its own candidate 1 at 0.8 and candidate 2 at 1: one rival, a hit at 2 and not at 1.

    >>> queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> candidates = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> count_rivals(queries, candidates, torch.tensor([[0, 0], [1, 1]]))
    tensor([0, 1])

    Args:
        queries: unit rows [Q, D].
        candidates: unit rows [C, D].
        positives: int64 [P, 2], the (query, candidate) that belong together; a pair may be repeated.
        block_rows: queries scored at once; memory is O(block_rows · C).

    Returns:
        int64 [Q]; `NEVER` for a query that no candidate of its own has a finite score with.
    """
    rivals = []
    for start in range(0, len(queries), block_rows):
        scores = queries[start : start + block_rows] @ candidates.T  # [block, C]
        scores.nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        here = (start <= positives[:, 0]) & (positives[:, 0] < start + len(scores))
        rows, own = (positives[here] - positives.new_tensor([start, 0])).unbind(1)
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce(0, rows, scores[rows, own], "amax")
        scores[rows, own] = -torch.inf
        found = (scores >= best[:, None] - TIE).sum(1)
        rivals.append(found.masked_fill(best == -torch.inf, NEVER))
    return torch.cat(rivals)


def recall(rivals: Tensor, k: int) -> float:
    """Share of the queries that have fewer than `k` rivals.

    >>> recall(torch.tensor([0, 1, 4, NEVER]), 1), recall(torch.tensor([0, 1, 4, NEVER]), 5)
    (0.25, 0.75)
    """
    return (rivals < k).double().mean().item()


@contextmanager
def _in_eval(model: Any) -> Iterator[None]:
    # Module by module: a trainer may hold a part of its model, such as frozen batch norms, in eval().
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _embed(
    encode: Callable[..., Tensor],
    prepare: Callable[[list[Any]], Tensor],
    items: Sequence[Any],
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Unit rows, float32 [len(items), D]."""
    rows = []
    for start in range(0, len(items), batch_size):
        batch = prepare(list(items[start : start + batch_size])).to(device)
        # A cache would hold all weights in bf16; each is used once.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            encoded = encode(batch, normalize=False)
        # In float32: in bfloat16 a row that was divided by its norm is up to 0.3 % off unit length.
        rows.append(normalize(encoded.float(), dim=-1))
    return torch.cat(rows)


def _tried(data: bytes | None, raw: bytes | None) -> tuple[str, DropReason | None]:
    """The caption, or why the row cannot be used."""
    try:
        # The caption first, as everywhere: a row that lacks both is counted under the same reason.
        caption = clean_caption(raw)
        decode_pixels(data)
    except Dropped as dropped:
        return "", dropped.reason
    return caption, None


def _class_names(batch: pa.RecordBatch, label: str, shard: Shard, pool: Pool) -> list[str | None]:
    """The class of each row, or None where it has no usable one."""
    if label not in batch.schema.names:
        known = ", ".join(map(repr, pool.schema.names[:20]))
        raise UserError(
            f"{shard.path}: expected the label column {label!r}, found none (the set has {known}); "
            "mend the file, or name another column with evaluate.label"
        )
    column = batch.column(label)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(accepts(kind) for accepts in texts):
        raise UserError(
            f"{shard.path}: label column {label!r}: expected the names of classes as string, found {column.type}; "
            "write the names in place of numbers, or name another column with evaluate.label"
        )
    names: list[str | None] = []
    for raw in caption_bytes(column).to_pylist():
        try:
            names.append(clean_caption(raw))
        except Dropped:
            names.append(None)
    return names
