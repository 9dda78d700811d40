"""The pools that learners are trained on: pool, reference's pairs and held-out pairs, disjoint, with their truth.

Each set is three or four folders of Parquet shards that `curate` itself can read, so whatever is seen here can be
repeated with its commands:

    pool/        key, jpg, caption, kind     `wanted` rows, and others by what is wrong with them
    reference/   clean pairs of the wanted domain; no picture of the pool is among them
    held-out/    clean pairs of the wanted domain, to judge the learner by
    others/      pairs of the other domains of the pool, to see what selection costs there; not in every set
"""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from benchmarks.acceleration.domains import DRAWN_OTHERS, boilerplate, near_duplicate
from curate.embed.files import content_hash, halves
from curate.errors import UserError
from curate.jobs.drawn_pool import draw_pair
from curate.models.encoder import Encoder
from curate.pool.images import Dropped, clean_caption, decode_image
from curate.pool.inventory import take_inventory
from curate.pool.shards import caption_bytes, image_bytes, read_batches
from curate.recipe import PoolSection
from curate.recipe_types import Section

WANTED = "wanted"
SHARD_ROWS = 10_000
SCHEMA = pa.schema({"key": pa.string(), "jpg": pa.binary(), "caption": pa.string(), "kind": pa.string()})
Row = tuple[bytes, str, str]
"""Image bytes, caption, kind."""

WEB_SHARES = {
    WANTED: 0.10,
    "other_domain": 0.25,
    "boilerplate": 0.15,
    "near_miss": 0.15,
    "swapped": 0.25,
    "near_duplicate": 0.10,
}
"""Of the rows of a web-like pool. Pictures of the wanted domain lie in five of the six kinds."""
SPAMMED = 40
"""How often a near-duplicated picture of a web-like pool is there."""


class SetSection(Section):
    """One pool, by the arguments that it is drawn with."""

    source: Literal["drawn", "web", "emoji", "openstax"] = Field(description="where its pairs come from")
    rows: int = Field(0, ge=0, description="of the pool, where it is drawn")
    swapped_share: float = Field(0.0, ge=0, lt=1, description="rows of the pool with the caption of another picture")
    words: int | None = Field(None, ge=3, description="crowds drawn concepts: so many colours and shapes")
    image_size: int = Field(32, ge=8, description="width and height of drawn pictures, pixels")
    reference_rows: int = Field(12_000, ge=1, description="clean pairs that the reference is trained on, if drawn")
    held_out_rows: int = Field(1_000, ge=1, description="clean pairs that the learner is judged by")


def make_set(section: SetSection, folder: Path, *, seed: int, data: Path | None) -> None:
    """Write a set, unless it is there. Doing it twice changes nothing; a killed one is begun anew.

    Args:
        section: its arguments.
        folder: of the set.
        seed: of its pictures, and of what is wrong with which row.
        data: folder of the real pairs, where there is one.

    Raises:
        UserError: the set is made of real pairs and they are not there.
    """
    if folder.exists():
        return
    scratch = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    parts = _SOURCES[section.source](section, seed, data)
    for name, rows in parts.items():
        _write(scratch / name, rows)
    scratch.rename(folder)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs in memory as a model takes them."""

    pixels: npt.NDArray[np.uint8]
    """[N, H, W, 3]"""
    texts: npt.NDArray[np.int32]
    """[N, L]"""
    content: npt.NDArray[np.uint64]
    """[N, 2], as embedding files have it."""
    kind: npt.NDArray[np.str_]
    """[N]"""

    def __len__(self) -> int:
        return len(self.content)

    @cached_property
    def same_captions(self) -> Tensor:
        """int64 [P, 2]: each row with every row that bears its caption, which to the model is the same text."""
        _, caption = np.unique(self.texts, axis=0, return_inverse=True)
        by_caption: dict[int, list[int]] = {}
        for row, number in enumerate(caption.tolist()):
            by_caption.setdefault(number, []).append(row)
        return torch.tensor([(row, other) for rows in by_caption.values() for row in rows for other in rows])


def load_pairs(folder: Path, encoder: Encoder) -> Pairs:
    """Decode the shards of a folder once, and keep what came out beside them for the next process."""
    view = f"{encoder.view} {getattr(encoder.tokenize, 'context_length', None)}"
    cache = folder.with_name(f"{folder.name}-{hashlib.sha256(view.encode()).hexdigest()[:8]}")
    names = list(Pairs.__dataclass_fields__)
    if not cache.exists():
        scratch = cache.with_name(f"{cache.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name, array in zip(names, _decode(folder, encoder), strict=True):
            np.save(scratch / f"{name}.npy", array)
        scratch.rename(cache)
    return Pairs(**{name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in names})


def _decode(folder: Path, encoder: Encoder) -> tuple[npt.NDArray[np.generic], ...]:
    pool = take_inventory(PoolSection(path=str(folder), uid="key"))
    pixels, captions, contents, kinds = [], [], [], []
    with tqdm(
        total=pool.rows, desc=f"decode {folder.parent.name}/{folder.name}", unit=" pictures", disable=None
    ) as bar:
        for shard in pool.shards:
            for batch in read_batches(shard, ["jpg", "caption", "kind"], batch_rows=1024):
                images, texts = image_bytes(batch.column("jpg")), caption_bytes(batch.column("caption"))
                for image, text, kind in zip(
                    images.to_pylist(), texts.to_pylist(), batch.column("kind").to_pylist(), strict=True
                ):
                    try:
                        caption = clean_caption(text)
                        pixels.append(encoder.crop(decode_image(image)))
                        captions.append(caption)
                    except Dropped:
                        continue
                    contents.append(content_hash(image, text))
                    kinds.append(kind)
                bar.update(batch.num_rows)
    return np.stack(pixels), encoder.tokenize(captions).numpy().astype(np.int32), halves(contents), np.array(kinds)


def _drawn(section: SetSection, seed: int, data: Path | None) -> dict[str, Iterable[Row]]:
    """Coloured shapes; `words` crowds them, `swapped_share` of the pool's captions are untrue."""
    draw = partial(draw_pair, image_size=section.image_size, words=section.words)
    swapped = np.random.default_rng((seed, 10)).permutation(section.rows) < section.swapped_share * section.rows
    return {
        "pool": (
            (*draw(3 * seed, row, swapped=bool(bad)), "swapped" if bad else WANTED) for row, bad in enumerate(swapped)
        ),
        "reference": ((*draw(3 * seed + 1, row), WANTED) for row in range(section.reference_rows)),
        "held-out": ((*draw(3 * seed + 2, row), WANTED) for row in range(section.held_out_rows)),
    }


def _web(section: SetSection, seed: int, data: Path | None) -> dict[str, Iterable[Row]]:
    """A tenth of coloured shapes, the rest what a crawl brings; real pairs are among the other domains if given."""
    rng = np.random.default_rng((seed, 11))
    kinds = np.repeat(list(WEB_SHARES), _counts(section.rows))
    rng.shuffle(kinds)
    real = [*_emoji_rows(data), *_openstax_rows(data)] if data else []
    # Whatever is about one thing is on one side.
    held = set(rng.permutation(sorted({row.group for row in real}))[: section.held_out_rows // 4].tolist())
    order = rng.permutation(len(real)).tolist()
    kept_back = [row for row in order if real[row].group in held][: section.held_out_rows // 2]
    real_rows = iter([row for row in order if real[row].group not in held])
    draw = partial(draw_pair, image_size=section.image_size)

    def other() -> tuple[bytes, str]:
        """Real pairs as long as there are any, every second time; drawn ones otherwise."""
        if rng.random() < 0.5 and (row := next(real_rows, None)) is not None:
            return real[row].jpg, real[row].caption
        return DRAWN_OTHERS[int(rng.integers(len(DRAWN_OTHERS)))](rng, section.image_size)

    def pool() -> Iterator[Row]:
        spam: tuple[bytes, str] = other()
        for row, kind in enumerate(kinds.tolist()):
            if kind == "other_domain":
                yield (*other(), kind)
            elif kind == "boilerplate":
                yield draw(3 * seed, row)[0], boilerplate(rng), kind
            elif kind == "near_duplicate":
                if rng.random() < 1 / SPAMMED:
                    spam = other()
                yield near_duplicate(rng, spam[0]), spam[1], kind
            else:
                yield (*draw(3 * seed, row, swapped=kind == "swapped", near_miss=kind == "near_miss"), kind)

    def others() -> Iterator[Row]:
        for row in kept_back:
            yield real[row].jpg, real[row].caption, "other_domain"
        others_rng = np.random.default_rng((seed, 12))
        for i in range(section.held_out_rows - len(kept_back)):
            yield (*DRAWN_OTHERS[i % len(DRAWN_OTHERS)](others_rng, section.image_size), "other_domain")

    drawn = _drawn(section, seed, data)
    return {"pool": pool(), "reference": drawn["reference"], "held-out": drawn["held-out"], "others": others()}


@dataclass(frozen=True, kw_only=True)
class _Real:
    jpg: bytes
    caption: str
    group: str
    """Rows of one group are about the same thing."""
    style: str = ""


def _emoji_rows(data: Path | None) -> list[_Real]:
    return [
        _Real(jpg=row["jpg"], caption=row["caption"], group=row["concept"], style=row["vendor"])
        for row in _rows_of(data, "emoji-en", ["jpg", "caption", "concept", "vendor"])
    ]


def _openstax_rows(data: Path | None) -> list[_Real]:
    return [
        _Real(jpg=row["jpg"], caption=row["caption"], group=row["orig_sha256"])
        for name in ("openstax-dev", "openstax-physics-ml")
        for row in _rows_of(data, name, ["jpg", "caption", "orig_sha256", "lang"])
        if row["lang"] == "en"
    ]


def _emoji(section: SetSection, seed: int, data: Path | None) -> dict[str, Iterable[Row]]:
    """Three drawing styles, of which a third of the rows is the reference's; the fourth style is held out."""
    rows = _emoji_rows(data)
    styles = sorted({row.style for row in rows})
    held_out = styles[seed % len(styles)]
    return _split(
        [row for row in rows if row.style != held_out],
        [row for row in rows if row.style == held_out],
        section,
        seed,
        by_group=False,
    )


def _openstax(section: SetSection, seed: int, data: Path | None) -> dict[str, Iterable[Row]]:
    """Pictures of textbooks; whatever is about one picture is on one side."""
    rows = _openstax_rows(data)
    groups = sorted({row.group for row in rows})
    rng = np.random.default_rng((seed, 13))
    held = set(rng.permutation(groups)[: section.held_out_rows].tolist())
    return _split(
        [row for row in rows if row.group not in held],
        [row for row in rows if row.group in held],
        section,
        seed,
        by_group=True,
    )


def _split(
    train: list[_Real], held_out: list[_Real], section: SetSection, seed: int, *, by_group: bool
) -> dict[str, Iterable[Row]]:
    """Give the reference a third of the rows to train on, and swap captions among the rest."""
    rng = np.random.default_rng((seed, 14))
    if by_group:
        groups = sorted({row.group for row in train})
        own = set(rng.permutation(groups)[: len(groups) // 3].tolist())
        mine = np.array([row.group in own for row in train])
    else:
        mine = rng.permutation(len(train)) < len(train) // 3
    pool = [row for row, is_reference in zip(train, mine, strict=True) if not is_reference]
    bad = np.flatnonzero(rng.random(len(pool)) < section.swapped_share)
    captions = [row.caption for row in pool]
    for to, source in zip(bad.tolist(), np.roll(bad, 1).tolist(), strict=True):
        captions[to] = pool[source].caption
    untrue = [caption != row.caption for row, caption in zip(pool, captions, strict=True)]
    return {
        "pool": [
            (row.jpg, caption, "swapped" if bad else WANTED)
            for row, caption, bad in zip(pool, captions, untrue, strict=True)
        ],
        "reference": [
            (row.jpg, row.caption, WANTED) for row, is_reference in zip(train, mine, strict=True) if is_reference
        ],
        "held-out": [(row.jpg, row.caption, WANTED) for row in held_out],
    }


_SOURCES: dict[str, Callable[[SetSection, int, Path | None], dict[str, Iterable[Row]]]] = {
    "drawn": _drawn,
    "web": _web,
    "emoji": _emoji,
    "openstax": _openstax,
}


def _counts(rows: int) -> list[int]:
    """Rows of each kind of a web-like pool, which are `rows` together."""
    ends = np.round(np.cumsum(list(WEB_SHARES.values())) * rows).astype(int)
    return [int(count) for count in np.diff(ends, prepend=0)]


def _rows_of(data: Path | None, name: str, columns: list[str]) -> list[dict[str, Any]]:
    paths = sorted((data / name).glob("*.parquet")) if data else []
    if not paths:
        raise UserError(f"expected Parquet files in {data}/{name}, found none: give their folder with --data")
    return [row for path in paths for row in pq.read_table(path, columns=columns).to_pylist()]


def _write(folder: Path, rows: Iterable[Row]) -> None:
    folder.mkdir(parents=True)
    table: list[dict[str, str | bytes]] = []
    number = 0

    def flush() -> None:
        nonlocal number
        pq.write_table(
            pa.Table.from_pylist(table, SCHEMA),
            folder / f"{number:05d}.parquet",
            compression="zstd",
            row_group_size=1024,
        )
        table.clear()
        number += 1

    for row, (jpg, caption, kind) in enumerate(
        tqdm(rows, desc=f"draw {folder.parent.name}/{folder.name}", unit=" pictures", disable=None)
    ):
        table.append({"key": f"{row:07d}", "jpg": jpg, "caption": caption, "kind": kind})
        if len(table) == SHARD_ROWS:
            flush()
    if table or not number:
        flush()
