"""Draw an image-text pool whose truth is known: coloured shapes, and sentences that say what is to be seen.

    python -m curate.jobs.drawn_pool OUT --rows 20000 --shards 10 --swapped-share 0.5      # 4 s on one core

Files, keys and columns are those of img2dataset (one Parquet file per shard), plus the truth that a real pool never
tells: `swapped`, `broken`, `duplicate_of`. Whether a curator is any good can then be counted.

Row r is a function of (seed, r) alone: a duplicate is drawn twice rather than remembered, and memory does not grow
with the pool. The same arguments give the same bytes (with the same versions of Pillow and pyarrow).
"""

import argparse
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import cos, pi, sin
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from curate.pipelines import progress
from curate.pool.images import DropReason

T = TypeVar("T")
Point = tuple[float, float]
Thing = tuple[str, str, str]  # size, colour, shape
Circle = tuple[float, float, float]  # x, y, radius as shares of the side

ARM = 0.36  # half the width of a cross's arm
SHAPES: dict[str, list[Point]] = {  # corners in the unit circle; none: the circle itself
    "circle": [], "ring": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.65, 0), (0, 1), (-0.65, 0)],
    "hexagon": [(cos(i * pi / 3), sin(i * pi / 3)) for i in range(6)],
    "star": [(r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i, r in enumerate((1, 0.42) * 5)],
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip
COLOURS = {
    "red": (220, 20, 30), "orange": (255, 130, 0), "yellow": (250, 215, 0), "green": (20, 140, 50),
    "blue": (25, 70, 220), "purple": (125, 30, 150), "pink": (255, 90, 170), "brown": (120, 70, 25),
    "black": (15, 15, 15), "turquoise": (0, 190, 190),
}  # fmt: skip
BACKGROUNDS = {
    "white": (255, 255, 255), "grey": (190, 190, 190), "cream": (255, 246, 214),
    "light blue": (196, 222, 250), "light green": (204, 240, 196), "lavender": (226, 212, 248),
}  # fmt: skip
SIZES = {"small": (0.08, 0.1), "large": (0.13, 0.15)}  # radius as a share of the picture's side, from and to

# Where one, two or three things lie and what can then be said: centres, and how far each may stray along x and y.
# Lengths are shares of the side; things never touch and never leave the picture.
PLACES = {
    "in the top left corner": (0.17, 0.17), "at the top": (0.5, 0.17), "in the top right corner": (0.83, 0.17),
    "on the left": (0.17, 0.5), "in the middle": (0.5, 0.5), "on the right": (0.83, 0.5),
    "in the bottom left corner": (0.17, 0.83), "at the bottom": (0.5, 0.83),
    "in the bottom right corner": (0.83, 0.83),
}  # fmt: skip
Layout = tuple[list[Point], Point, list[str]]
LAYOUTS: dict[int, list[Layout]] = {
    1: [([centre], (0.015, 0.015), [f"{{0}} {place}", f"there is {{0}} {place}", f"a picture of {{0}} {place}"])
        for place, centre in PLACES.items()],
    2: [([(0.27, 0.5), (0.73, 0.5)], (0.08, 0.22),
         ["{0} to the left of {1}", "{1} to the right of {0}", "{0} on the left and {1} on the right"]),
        ([(0.5, 0.27), (0.5, 0.73)], (0.22, 0.08),
         ["{0} above {1}", "{1} below {0}", "{0} at the top and {1} at the bottom"])],
    3: [([(0.17, 0.5), (0.5, 0.5), (0.83, 0.5)], (0.012, 0.2),
         ["from left to right, {0}, {1} and {2}", "{1} between {0} on the left and {2} on the right"]),
        ([(0.5, 0.17), (0.5, 0.5), (0.5, 0.83)], (0.2, 0.012),
         ["from top to bottom, {0}, {1} and {2}", "{1} with {0} above it and {2} below it"]),
        ([(0.25, 0.28), (0.75, 0.28), (0.5, 0.74)], (0.06, 0.05),
         ["{0} to the left of {1}, and {2} below both", "{2} below {0} on the left and {1} on the right"]),
        ([(0.25, 0.74), (0.75, 0.74), (0.5, 0.28)], (0.06, 0.05),
         ["{0} to the left of {1}, and {2} above both", "{2} above {0} on the left and {1} on the right"])],
}  # fmt: skip
GROUND = ["{said} on a {ground} background", "{said} against {ground}", "on {ground}, {said}"]
THINGS = (1, 2, 2, 2, 2, 3, 3, 3, 3, 3)  # how many; one thing has 8,640 meanings, two 305,000, three 97 million
CROWDED_THINGS = (1, 2, 2)

SUPERSAMPLE = 2  # drawn twice as large, then averaged: soft edges
JPEG = {"quality": 90, "subsampling": 0}  # full colour resolution, or small things lose their colour
NOT_FOUND = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
DAMAGES: dict[DropReason, Callable[[bytes, str], tuple[bytes, str]]] = {
    "image_truncated": lambda jpg, caption: (jpg[: len(jpg) * 7 // 8], caption),
    "image_undecodable": lambda jpg, caption: (NOT_FOUND, caption),
    "image_empty": lambda jpg, caption: (b"", caption),
    "caption_empty": lambda jpg, caption: (jpg, " "),
}

ROW_GROUP_ROWS = 256
SHARD_ROWS_MAX = 10_000  # img2dataset's keys have four digits for the row
SCHEMA = pa.schema({
    "key": pa.string(),  # prefix, five digits for the shard, four for the row in it
    "jpg": pa.binary(),
    "caption": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "swapped": pa.bool_(),  # the caption is another picture's and not true of this one
    "broken": pa.string(),  # the drop reason that this row must end in, or null
    "duplicate_of": pa.string(),  # key of the earlier row with the same bytes and caption, or null
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PoolTruth:
    """How many rows of each kind a pool holds: rows = clean + swapped + duplicates + the sum of broken."""

    rows: int
    clean: int
    swapped: int
    duplicates: int
    broken: dict[DropReason, int]


def draw_pool(
    folder: Path,
    *,
    rows: int,
    shards: int,
    seed: int,
    swapped_share: float = 0.0,
    broken_share: float = 0.0,
    duplicate_share: float = 0.0,
    image_size: int = 64,
    words: int | None = None,
    key_prefix: str = "",
) -> PoolTruth:
    """Write a pool: `rows` pairs in `shards` Parquet files, `00000.parquet` and so on. Twice is the same as once.

    Swapped, broken and duplicate rows are strewn over the whole pool; none is two of these at once. Each kind has
    its share of all rows, rounded. A duplicate repeats a clean row that comes earlier, maybe in another shard.

    Args:
        folder: made if need be.
        rows: pairs in the whole pool; shards differ by one row at most.
        shards: files, each of at most 10,000 rows.
        seed: not negative; pools of different seeds have no picture in common.
        swapped_share: rows with another picture's caption, which is not true of theirs.
        broken_share: rows that must be dropped, in turn for each reason of `DAMAGES`.
        duplicate_share: rows with the bytes and the caption of another.
        image_size: width and height in pixels.
        words: as `draw_pair` has it.
        key_prefix: goes before each key, to keep the keys of several pools apart.

    Raises:
        ValueError: more than 10,000 rows for a shard, no rows or shards, or shares that leave no clean row.
        FileExistsError: the folder holds other Parquet files, which a reader would take for part of the pool.
    """
    if not 1 <= shards <= rows <= shards * SHARD_ROWS_MAX:
        raise ValueError(f"rows={rows}, shards={shards}: a shard holds 1 to {SHARD_ROWS_MAX:,} rows")
    paths = [folder / f"{shard:05d}.parquet" for shard in range(shards)]
    if strangers := sorted(set(folder.glob("*.parquet")) - set(paths)):
        raise FileExistsError(f"{strangers[0]} is no part of this pool: give an empty folder, or remove it")
    kinds, source = _plan(rows, seed, swapped=swapped_share, broken=broken_share, duplicate=duplicate_share)
    starts = [rows * shard // shards for shard in range(shards + 1)]

    def key(row: int) -> str:
        shard = bisect_right(starts, row) - 1
        return f"{key_prefix}{shard:05d}{row - starts[shard]:04d}"

    def record(row: int) -> dict[str, object]:
        kind, original = kinds[row], int(source[row])
        jpg, caption = draw_pair(seed, original, swapped=kind == "swapped", image_size=image_size, words=words)
        if damage := kind if kind in DAMAGES else None:
            jpg, caption = DAMAGES[damage](jpg, caption)
        return {
            "key": key(row),
            "jpg": jpg,
            "caption": caption,
            "width": image_size,
            "height": image_size,
            "swapped": kind == "swapped",
            "broken": damage,
            "duplicate_of": key(original) if kind == "duplicate" else None,
        }

    folder.mkdir(parents=True, exist_ok=True)
    with progress.bar(f"draw {folder.name}", rows, unit="picture") as bar:
        for path, start, stop in zip(paths, starts, starts[1:], strict=False):
            with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
                for first in range(start, stop, ROW_GROUP_ROWS):
                    group = [record(row) for row in range(first, min(first + ROW_GROUP_ROWS, stop))]
                    writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                    bar.update(len(group))
    count = Counter(kinds)
    broken = {damage: count[damage] for damage in DAMAGES}
    clean, swapped, duplicates = (count[kind] for kind in ("clean", "swapped", "duplicate"))
    return PoolTruth(rows=rows, clean=clean, swapped=swapped, duplicates=duplicates, broken=broken)


def draw_pair(
    seed: int,
    row: int,
    *,
    swapped: bool = False,
    near_miss: bool = False,
    words: int | None = None,
    image_size: int = 64,
) -> tuple[bytes, str]:
    """Draw picture number `row` of pool `seed`, and say what is on it.

    Args:
        seed: of the pool.
        row: not negative; may lie beyond any pool's rows.
        swapped: the caption is another picture's and not true of this one.
        near_miss: one thing in the caption has another colour than in the picture.
        words: crowds the concepts: only so many colours and shapes, on white, and never more than two things.
        image_size: width and height in pixels.

    Returns:
        JPEG bytes and caption.
    """
    uniforms = _uniforms(np.random.default_rng((seed, 1, row)))
    things, circles, ground, caption = _scene(uniforms, words)
    said = things
    while swapped and set(said) <= set(things):
        said, _, _, caption = _scene(uniforms, words)
    if near_miss:
        size, colour, shape = _pick(uniforms, things)
        other = _pick(uniforms, [word for word in COLOURS if (size, word, shape) not in things])
        caption = caption.replace(f"{size} {colour} {shape}", f"{size} {other} {shape}")
    out = BytesIO()
    _draw(things, circles, ground, image_size).save(out, "JPEG", **JPEG)
    return out.getvalue(), caption


def _plan(rows: int, seed: int, **shares: float) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the kind of each row, and the row whose picture it shows: its own, or for a duplicate an earlier one."""
    counts = {kind: round(rows * share) for kind, share in shares.items()}
    if min(counts.values()) < 0 or sum(counts.values()) >= rows:
        raise ValueError(f"shares {shares}: each at least 0, and one row must stay clean")
    rng = np.random.default_rng((seed, 0))
    kinds = np.full(rows, "clean", "<U17")
    strewn = 1 + rng.permutation(rows - 1)  # row 0 is clean, so that every duplicate has a row to repeat
    for kind, count in counts.items():
        chosen, strewn = np.split(strewn, [count])
        kinds[chosen] = np.resize(list(DAMAGES), count) if kind == "broken" else kind
    source = np.arange(rows)
    clean, duplicates = np.flatnonzero(kinds == "clean"), np.flatnonzero(kinds == "duplicate")
    source[duplicates] = clean[rng.integers(np.searchsorted(clean, duplicates))]
    return kinds.tolist(), source


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(32).tolist()


def _pick(uniforms: Iterator[float], options: Sequence[T]) -> T:
    return options[int(next(uniforms) * len(options))]


def _scene(uniforms: Iterator[float], words: int | None = None) -> tuple[list[Thing], list[Circle], str, str]:
    """Return what is to be drawn, and where; the background's name; the caption."""
    count = _pick(uniforms, THINGS if words is None else CROWDED_THINGS)
    things: list[Thing] = []
    known = (list(SIZES), list(COLOURS)[:words], list(SHAPES)[:words])
    while len(things) < count:
        size, colour, shape = (_pick(uniforms, options) for options in known)
        if (size, colour, shape) not in things:
            things.append((size, colour, shape))
    centres, stray, sentences = _pick(uniforms, LAYOUTS[count])
    circles: list[Circle] = []
    for (size, _, _), (x, y) in zip(things, centres, strict=True):
        low, high = SIZES[size]
        dx, dy = (amount * (2 * next(uniforms) - 1) for amount in stray)
        circles.append((x + dx, y + dy, low + (high - low) * next(uniforms)))
    ground = _pick(uniforms, list(BACKGROUNDS)[: words and 1])
    said = _pick(uniforms, sentences).format(*(f"a {' '.join(thing)}" for thing in things))
    return things, circles, ground, _pick(uniforms, GROUND).format(said=said, ground=ground)


def _draw(things: list[Thing], circles: list[Circle], ground: str, image_size: int) -> Image.Image:
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUNDS[ground])
    pen = ImageDraw.Draw(image)
    for (_, colour, shape), circle in zip(things, circles, strict=True):
        x, y, radius = (share * side for share in circle)
        if corners := SHAPES[shape]:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in corners], fill=COLOURS[colour])
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
        if shape == "ring":
            hole = 0.55 * radius
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=BACKGROUNDS[ground])
    return image.reduce(SUPERSAMPLE)


def main() -> None:
    """Draw a pool from the command line."""
    parser = argparse.ArgumentParser(prog="python -m curate.jobs.drawn_pool", description="Draw an image-text pool.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for the shards")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--key-prefix", default="")
    for kind in ("swapped", "broken", "duplicate"):
        parser.add_argument(f"--{kind}-share", type=float, default=0.0, help="share of all rows")
    print(draw_pool(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
