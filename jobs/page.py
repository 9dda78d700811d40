"""Pages: pairs of a pool and plots, in one HTML file with nothing beside it, by the templates in jobs/templates."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from curate.jobs.surroundings import printable
from curate.pool.shards import Shard, caption_bytes, image_bytes, read_rows

Place = tuple[int, int]
"""Shard, by its number among those that were given, and row."""
Pair = tuple[bytes | None, str]
"""Image bytes and caption."""

SHOWN_PIXELS = 192
"""Of the longer side: a figure is 150 pixels wide, of which many screens have one and a half for each."""
SHOWN_AS_IS = 8_192
"""Bytes up to which a picture that browsers know is shown as it is."""
TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One pair: its picture, its caption, what is said of it, where it lies."""

    caption: str
    where: str
    title: str = ""
    """What matters most."""
    uid: str = ""
    image: str | None = None
    """A data URL; None where there is nothing to see."""
    facts: dict[str, float | int | str] = field(default_factory=dict)
    """By name; numbers can be sorted by."""
    near: str = ""
    """What it is near to: a uid, or a place."""
    anchor: str = ""
    """Its id within the page, and"""
    near_anchor: str = ""
    """that of what it is near to; see `linked`."""
    kind: str = ""
    """`stays` or `leaves`, where that is the question."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Figures under a heading."""

    title: str
    figures: Sequence[Figure]
    text: str = ""

    @property
    def sort_keys(self) -> list[str]:
        """Names of the numbers that all its figures have."""
        names = list(self.figures[0].facts) if self.figures else []
        return [n for n in names if all(isinstance(one.facts.get(n), float | int) for one in self.figures)]


def linked(galleries: Sequence[Gallery], seen: set[str]) -> list[Gallery]:
    """The same, each pair with an id where it is first shown, and with a link to the pair that it is near to.

    Args:
        galleries: of one page; a link leads to galleries given now or before.
        seen: ids of galleries before; those of these are added.
    """
    found = []
    for gallery in galleries:
        figures = []
        for figure in gallery.figures:
            anchor = _anchor(figure.uid)
            figures.append(replace(figure, anchor="" if anchor in seen else anchor))
            seen.add(anchor)
        found.append(replace(gallery, figures=figures))
    return [
        replace(
            gallery,
            figures=[
                replace(one, near_anchor=near if (near := _anchor(one.near)) in seen else "") for one in gallery.figures
            ],
        )
        for gallery in found
    ]


def _anchor(uid: str) -> str:
    return f"uid-{quote(uid, safe='')}" if uid else ""


def write_page(path: Path, template: str, **context: Any) -> None:
    """Write a page; whatever the context holds is text, and obeyed nowhere, unless it is `Markup`."""
    loader = PackageLoader("curate.jobs")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fact"] = _fact
    path.write_text(environment.get_template(template).render(**context), encoding="utf-8")


def picture(data: bytes | None) -> str | None:
    """A picture as a data URL, made small where it is not; None if Pillow makes nothing of it."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            kind = TYPES.get(image.format or "")
            if kind is not None and len(data or b"") <= SHOWN_AS_IS:
                image.load()
            else:
                image.draft("RGB", (2 * SHOWN_PIXELS, 2 * SHOWN_PIXELS))
                image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
                out = io.BytesIO()
                image.convert("RGB").save(out, "JPEG", quality=80)
                kind, data = "image/jpeg", out.getvalue()
    except Exception:  # a broken picture makes Pillow raise whatever it likes, and a page is to show the others
        return None
    return f"data:{kind};base64,{base64.b64encode(data or b'').decode()}"


def read_pairs(shards: Sequence[Shard], places: Iterable[Place]) -> dict[Place, Pair]:
    """Image bytes and captions of some rows.

    Raises:
        InputChangedError, ShardDamagedError, UserError, StoreError: as `curate.pool.shards.read_rows`.
    """
    found = {}
    wanted = set(places)
    for shard in sorted({shard for shard, _ in wanted}):
        rows = sorted({row for there, row in wanted if there == shard})
        columns = shards[shard].columns
        table = read_rows(shards[shard], rows, [columns.image, columns.caption])
        images = image_bytes(table[columns.image].combine_chunks()).to_pylist()
        captions = caption_bytes(table[columns.caption].combine_chunks()).to_pylist()
        for row, image, caption in zip(rows, images, captions, strict=True):
            found[shard, row] = (image, (caption or b"").decode(errors="replace"))
    return found


def _fact(value: float | int | str) -> str:
    """A number as people read it."""
    match value:
        case float():
            return f"{value:.3f}"
        case int():
            return f"{value:,}"
        case _:
            return printable(value)
