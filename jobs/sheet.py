"""Pairs of a pool as pictures, in one HTML file that needs nothing beside it."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from curate.pool.shards import Shard, caption_bytes, image_bytes, read_rows

Place = tuple[int, int]
"""Shard, by its number among those that were given, and row."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
main {{ display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start; }}
section {{ border: 1px solid #8888; padding: .3em .6em; }}
h2 {{ font-size: 14px; margin: .3em 0; }}
div {{ display: flex; flex-wrap: wrap; gap: 10px; }}
figure {{ width: 150px; margin: 0; overflow-wrap: anywhere; }}
figcaption span {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }}
figure img {{ width: 140px; height: 140px; object-fit: contain; background: #eee; border: 3px solid #c66; }}
figure.stays img {{ border-color: #393; }}
figcaption {{ font-size: 12px; }}
</style>
<h1>{title}</h1>
<p>{facts}</p>
<main>
{sections}
</main>
</html>
"""


def write_page(path: Path, *, title: str, facts: str, sections: Iterable[str]) -> None:
    """Write a page; title and facts are text, sections HTML."""
    page = PAGE.format(title=html.escape(title), facts=html.escape(facts), sections="\n".join(sections))
    path.write_text(page, encoding="utf-8")


def section(title: str, figures: Iterable[str]) -> str:
    """Figures under a title."""
    return f"<section><h2>{html.escape(title)}</h2><div>{''.join(figures)}</div></section>"


def figure(image: bytes, caption: str, *, why: str, where: str, kind: str = "") -> str:
    """One pair: what is said of it, its caption, where it lies; `kind` decides its border."""
    said, at = html.escape(caption), html.escape(where)
    return (
        f'<figure class="{kind}"><img alt="{said}" src="data:image;base64,{base64.b64encode(image).decode()}">'
        f'<figcaption><b>{html.escape(why)}</b><span title="{said}">{said}</span>{at}</figcaption></figure>'
    )


def read_pairs(shards: Sequence[Shard], places: Sequence[Place]) -> dict[Place, tuple[bytes, str]]:
    """Image bytes and captions of some rows."""
    found = {}
    for shard in sorted({shard for shard, _ in places}):
        rows = sorted({row for there, row in places if there == shard})
        columns = shards[shard].columns
        table = read_rows(shards[shard], rows, [columns.image, columns.caption])
        images = image_bytes(table[columns.image].combine_chunks()).to_pylist()
        captions = caption_bytes(table[columns.caption].combine_chunks()).to_pylist()
        for row, image, caption in zip(rows, images, captions, strict=True):
            found[shard, row] = (image, (caption or b"").decode(errors="replace"))
    return found
