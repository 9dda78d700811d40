"""Pictures of other domains than coloured shapes, and captions that say nothing: what a web-like pool is full of."""

from collections.abc import Callable
from io import BytesIO
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from curate.jobs.drawn_pool import BACKGROUNDS, COLOURS, JPEG, SUPERSAMPLE

BOILERPLATE = (
    "image {n}.jpg", "click to enlarge", "photo {n}", "free shipping on all orders", "picture {n} of 60",
    "stock photo, royalty free", "thumbnail", "IMG_{n}", "share this on social media", "advertisement",
    "download the full size image", "untitled {n}", "image not available", "product view {n}", "logo",
)  # fmt: skip
HEIGHTS = ("very short", "short", "medium", "tall", "very tall")
HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


def draw_chart(rng: np.random.Generator, image_size: int) -> tuple[bytes, str]:
    """A bar chart, and what its bars are like."""
    names = [str(name) for name in rng.choice(list(COLOURS), size=int(rng.integers(2, 5)), replace=False)]
    heights = rng.integers(len(HEIGHTS), size=len(names))
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUNDS["white"])
    pen = ImageDraw.Draw(image)
    width = side / len(names)
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        top = side * (1 - 0.18 * (height + 1))
        pen.rectangle((i * width + 0.1 * width, top, (i + 0.9) * width, side), fill=COLOURS[name])
    pen.line((0, side - 1, side, side - 1), fill=COLOURS["black"], width=2)
    bars = ", ".join(f"{HEIGHTS[height]} {name}" for name, height in zip(names, heights, strict=True))
    return _encoded(image.reduce(SUPERSAMPLE)), f"a bar chart whose bars are {bars}"


def draw_clock(rng: np.random.Generator, image_size: int) -> tuple[bytes, str]:
    """A clock face, and what time it shows."""
    hour, minute = int(rng.integers(12)), 5 * int(rng.integers(12))
    face, ground = str(rng.choice(list(COLOURS))), str(rng.choice(list(BACKGROUNDS)))
    side = image_size * SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUNDS[ground])
    pen = ImageDraw.Draw(image)
    pen.ellipse((0.06 * side, 0.06 * side, 0.94 * side, 0.94 * side), fill="white", outline=COLOURS[face], width=4)
    for turn, length, width in ((hour / 12 + minute / 720, 0.22, 5), (minute / 60, 0.38, 3)):
        tip = (side * (0.5 + length * sin(2 * pi * turn)), side * (0.5 - length * cos(2 * pi * turn)))
        pen.line((side / 2, side / 2, *tip), fill=COLOURS["black"], width=width)
    return _encoded(
        image.reduce(SUPERSAMPLE)
    ), f"a clock with a {face} rim on {ground} that shows {minute} minutes past {HOURS[hour]}"


def boilerplate(rng: np.random.Generator) -> str:
    """A caption that has nothing to do with its picture."""
    return str(rng.choice(BOILERPLATE)).replace("{n}", str(rng.integers(60)))


def near_duplicate(rng: np.random.Generator, jpg: bytes) -> bytes:
    """The same picture once more: moved by a pixel, a little lighter or darker, compressed again."""
    image = Image.open(BytesIO(jpg)).convert("RGB")
    image = Image.fromarray(np.roll(np.asarray(image), rng.integers(-1, 2, size=2), axis=(0, 1)))
    shade = rng.uniform(0.95, 1.05)
    return _encoded(image.point([min(255, round(x * shade)) for x in range(256)] * 3))


DRAWN_OTHERS: tuple[Callable[[np.random.Generator, int], tuple[bytes, str]], ...] = (draw_chart, draw_clock)


def _encoded(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "JPEG", **JPEG)
    return out.getvalue()
