"""Plots that stand in a page: SVG that takes the page's ink, readable in the light and in the dark."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"
"""Stands for the page's ink in what matplotlib draws."""
BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#c2690c", "#2f8f4e", "#808792"
"""Of curves: at least three times as light, or as dark, as paper by day and by night."""
COLOURS = (BLUE, GREY, ORANGE, GREEN)
BINS = 40

Floats = npt.NDArray[np.floating[Any]]


def histograms(groups: Mapping[str, Floats], *, label: str, logarithmic: bool = False) -> Markup | None:
    """Shares of some groups' values, one over the other; None if there are no values.

    Args:
        groups: by name the values [n].
        label: of the values.
        logarithmic: whether bins are equally wide in their logarithms; values must then be positive.
    """
    everything = np.concatenate([*groups.values()])
    if not len(everything):
        return None
    figure, (axes,) = _figure(1, width=4.4)
    low, high = np.quantile(everything, [0.002, 0.998])  # a few far ones would press all others into a bin
    high = high if high > low else low + 1
    bins = np.geomspace(low, high, BINS) if logarithmic else np.linspace(low, high, BINS)
    for (name, values), colour in zip(groups.items(), COLOURS, strict=False):
        weights = np.full(len(values), 1 / max(1, len(values)))
        axes.hist(
            np.clip(values, low, high),
            bins.tolist(),
            weights=weights,
            histtype="step",
            lw=1.8,
            color=colour,
            label=name,
        )
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("share")
    axes.legend(frameon=False)
    medians = ", ".join(f"{name} {np.median(values):.3g}" for name, values in groups.items() if len(values))
    return _svg(figure, f"Histogram of {label}; medians: {medians}")


def curves(
    lines: Mapping[str, Sequence[tuple[float, float | None]]], *, title: str, across: str = "round"
) -> Markup | None:
    """Some lines through points; None if there is no point.

    Args:
        lines: by name their points, of which unknown ones are left out.
        title: above them.
        across: what is counted from left to right.
    """
    known = {
        name: [(x, y) for x, y in points if y is not None]
        for name, points in lines.items()
        if any(y is not None for _, y in points)
    }
    if not known:
        return None
    figure, (axes,) = _figure(1, width=4.4, height=2.3)
    for (name, points), colour in zip(known.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), marker="o", ms=3.5, lw=1.8, color=colour, label=name)
    axes.set_xlabel(across)
    if len(known) == 1 and (only := next(iter(known))):
        title = f"{title}, {only}"
    axes.set_title(title, loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if len(known) > 1:
        axes.legend(frameon=False)
    ends = ", ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in known.items())
    return _svg(figure, f"{title} by {across}: {ends}")


def matrices(pairs: Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]) -> Markup:
    """Matrices [n, n], of each name one above another: before and after."""
    figure, axes = _figure(2 * len(pairs), width=2.5 * len(pairs), height=5.2, rows=2)
    for column, (name, both) in enumerate(pairs.items()):
        # One scale for both, that of what is beside the diagonal: the pairs themselves would leave it in one shade.
        beside = [one[~np.eye(len(one), dtype=bool)] for one in both]
        low, high = np.quantile(np.concatenate(beside), [0.01, 0.99])
        for row, (when, matrix) in enumerate(zip(("at random", "chosen"), both, strict=True)):
            at = axes[row * len(pairs) + column]
            at.imshow(matrix, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            at.set_xticks([])
            at.set_yticks([])
            at.set_title(f"{name}, {when}\nsum / rows {matrix.sum() / len(matrix):.3f}", fontsize=9)
    sums = "; ".join(
        f"{name}: {both[0].sum() / len(both[0]):.3f} at random, {both[1].sum() / len(both[1]):.3f} chosen"
        for name, both in pairs.items()
    )
    return _svg(figure, f"Matrices of pair losses, pictures by captions. Sums per row: {sums}")


def _figure(count: int, *, width: float, height: float = 2.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curate", "font.size": 9, "font.family": "sans-serif"})
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = list(figure.subplots(rows, count // rows, squeeze=False).ravel())
    for one in axes:
        one.set_facecolor("none")
        one.tick_params(colors=INK)
        for part in (one.xaxis.label, one.yaxis.label, one.title):
            part.set_color(INK)
        for side, spine in one.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Figure, said: str) -> Markup:
    """A figure as it stands in a page; `said` for who does not see it."""
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            for text in legend.get_texts():
                text.set_color(INK)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Ids are those of a page now, on which there are other plots.
    own = f"p{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\b(id="|href="#|url\(#)', lambda found: found[0] + own, svg)
    head = Markup('<svg role="img" aria-label="{}" ').format(said)
    return head + Markup(svg.removeprefix("<svg "))
