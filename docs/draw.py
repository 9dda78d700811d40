"""The pictures of concepts.md: `python docs/draw.py`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

OUT = Path(__file__).parent / "img"
BLUE, ORANGE, GREY, GREEN = "#3b82f6", "#e08a1e", "#c9ced6", "#3a9d5d"
INK = "#1b1f24"


def main() -> None:
    """Draw them into docs/img."""
    OUT.mkdir(exist_ok=True)
    for name, draw, size in (
        ("super-batch", super_batch, (8, 3.1)),
        ("window", window, (8, 2.7)),
        ("loop", loop, (8, 2.9)),
    ):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.set_axis_off()
        draw(axes)
        figure.savefig(OUT / f"{name}.png", dpi=130)


def super_batch(axes: Axes) -> None:
    """B candidates, three draws, b of them side by side."""
    rng = np.random.default_rng(3)
    order = rng.permutation(40)
    colours = [GREY] * 40
    for chunk, colour in enumerate((BLUE, ORANGE, GREEN)):
        for i in order[4 * chunk : 4 * chunk + 4]:
            colours[i] = colour
    for i, colour in enumerate(colours):
        axes.add_patch(Rectangle((i % 10, 3 - i // 10), 0.85, 0.85, color=colour))
    axes.text(0, 4.15, "super-batch: B candidates", color=INK)
    for n, (colour, text) in enumerate(
        ((BLUE, "chunk 0: by themselves"), (ORANGE, "chunk 1: given chunk 0"), (GREEN, "chunk 2: given both"))
    ):
        for k in range(4):
            axes.add_patch(Rectangle((15 + 4 * n + k, 1.5), 0.85, 0.85, color=colour))
        axes.text(15 + 4 * n, 0.95 - 0.55 * n, text, color=colour, fontsize=9)
    axes.text(15, 2.65, "sub-batch: b rows, chosen as a whole", color=INK)
    axes.add_patch(FancyArrowPatch((10.4, 2), (14.6, 2), arrowstyle="-|>", mutation_scale=16, color=INK))
    axes.text(10.6, 2.3, "n_chunks draws", color=INK, fontsize=9)
    axes.set(xlim=(-0.3, 28), ylim=(-0.6, 4.7))


def window(axes: Axes) -> None:
    """Shards in an epoch's order; windows are runs of them; a round takes super-batches of one."""
    for epoch, seed in enumerate((1, 2)):
        order = np.random.default_rng(seed).permutation(12)
        y = 2.2 - 2 * epoch
        axes.text(-2.3, y + 0.35, f"epoch {epoch}", color=INK)
        for place, shard in enumerate(order):
            colour = (BLUE, ORANGE, GREEN)[place // 4] if epoch == 0 or place < 4 else GREY
            axes.add_patch(Rectangle((place + 0.35 * (place // 4), y), 0.9, 0.9, color=colour))
            axes.text(
                place + 0.35 * (place // 4) + 0.45,
                y + 0.3,
                f"{shard:02d}",
                color="white" if colour != GREY else INK,
                ha="center",
                fontsize=9,
            )
        for n in range(3 if epoch == 0 else 1):
            axes.text(4.35 * n, y - 0.5, f"window of round {n + 3 * epoch}", color=INK, fontsize=9)
    axes.text(13.2, 1.5, "a round reads\nthe shards of\nits window,\nno others", color=INK, fontsize=9, va="center")
    axes.set(xlim=(-2.5, 16.5), ylim=(-0.7, 3.5))


def loop(axes: Axes) -> None:
    """Rounds and trainer beside each other: which learner scores what."""
    axes.text(-1.9, 2.3, "curation", color=INK)
    axes.text(-1.9, 0.3, "trainer", color=INK)
    for n in range(4):
        axes.add_patch(Rectangle((3 * n, 2), 2.2, 0.9, color=BLUE))
        axes.text(3 * n + 1.1, 2.32, f"round {n}", color="white", ha="center")
        axes.add_patch(Rectangle((3 * n + 2.4, 0), 2.4, 0.9, color=ORANGE))
        axes.text(3 * n + 3.6, 0.32, f"trains on {n}", color="white", ha="center")
        axes.add_patch(
            FancyArrowPatch((3 * n + 2.1, 2), (3 * n + 2.7, 0.95), arrowstyle="-|>", mutation_scale=12, color=INK)
        )
        if n:
            text, at = f"learner {n}", (3 * n + 1.8, 0.95)
            axes.add_patch(FancyArrowPatch(at, (3 * n + 3.1, 1.95), arrowstyle="-|>", mutation_scale=12, color=GREEN))
            axes.text(at[0] + 0.8, 1.4, text, color=GREEN, fontsize=9)
    axes.text(
        3.05,
        -0.75,
        "round 1 was begun before learner 1 was there: its staleness is the batches of round 0",
        color=INK,
        fontsize=9,
    )
    axes.set(xlim=(-2.1, 15), ylim=(-1, 3.2))


if __name__ == "__main__":
    main()
