"""From the records of runs to paired differences with intervals, tables and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.acceleration.report import T95
from benchmarks.heads.learner import Arm
from benchmarks.heads.study import ARMS, DIRT

Record = dict[str, Any]
JOINT, INDEPENDENT = "joint learnability", "independent learnability"


def difference(records: Sequence[Record], one: str, other: str, **where: Any) -> tuple[float, float, int] | None:
    """R@1 of one arm minus another's, paired by seed.

    Args:
        records: of runs.
        one: name of an arm.
        other: likewise.
        where: what both runs have in common: world, dirt.

    Returns:
        Mean, half the width of its 95 % interval by Student's t (NaN with one seed), and the seeds; None without any.
    """
    found: list[dict[int, float]] = [
        {
            record["seed"]: record["r1"]
            for record in records
            if record["name"] == name and all(record[key] == value for key, value in where.items())
        }
        for name in (one, other)
    ]
    seeds = sorted(found[0].keys() & found[1].keys())
    if not seeds:
        return None
    deltas = np.array([found[0][seed] - found[1][seed] for seed in seeds])
    half = T95[len(deltas) - 1] * deltas.std(ddof=1) / len(deltas) ** 0.5 if len(deltas) > 1 else float("nan")
    return float(deltas.mean()), float(half), len(deltas)


def write_report(records: Sequence[Record], arms: dict[Any, Arm], folder: Path) -> None:
    """Write `heads.md`, `heads.json` and `heads.png`; print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds = list(dict.fromkeys(record["world"] for record in records))
    parts = [_primary(records, worlds), *(_arms(records, world) for world in worlds), _regimes(records, worlds)]
    if sweeps := _sweeps(records):
        parts.append(sweeps)
    parts.append(_settings(arms))
    text = "\n\n".join(parts) + "\n"
    print(text)
    (folder / "heads.md").write_text(text, encoding="utf-8")
    (folder / "heads.json").write_text(json.dumps([_short(record) for record in records], indent=0), encoding="utf-8")
    _figure(records, worlds).savefig(folder / "heads.png", dpi=120)


def _primary(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """Joint minus independent learnability at 30 %, and its control."""
    lines = ["| world | joint minus independent | the reference is the start | seeds |", "|---|---|---|---|"]
    for world in worlds:
        found = difference(records, JOINT, INDEPENDENT, world=world, dirt=DIRT)
        control = difference(
            records,
            "joint, the reference is the start",
            "independent, the reference is the start",
            world=world,
            dirt=DIRT,
        )
        lines.append(f"| `{world}` | {_of(found)} | {_of(control)} | {found[2] if found else 0} |")
    return "## Primary outcome\n\n" + "\n".join(lines)


def _arms(records: Sequence[Record], world: str) -> str:
    """All arms at 30 %."""
    mine = [record for record in records if record["world"] == world and record["dirt"] == DIRT]
    lines = [
        "| arm | R@1 | joint minus it | operations, × uniform | untrue | mates | different rows |",
        "|---|---|---|---|---|---|---|",
    ]
    uniform = next((record["operations"] for record in mine if record["name"] == "uniform"), 1)
    for name in _names(mine):
        same = [record for record in mine if record["name"] == name]
        r1, wrong, mates, unique, operations = (
            float(np.mean([record[key] for record in same])) for key in ("r1", "wrong", "mates", "unique", "operations")
        )
        delta = _of(difference(mine, JOINT, name)) if name != JOINT else "–"
        lines.append(
            f"| {name} | {r1:.3f} | {delta} | {operations / uniform:.1f} | {wrong:.1%} | {mates:.2f} | {unique:,.0f} |"
        )
    start, strong = (float(np.mean([record[key] for record in mine])) for key in ("start_r1", "reference_r1"))
    return f"## `{world}`, 30 % untrue\n\nThe start is at {start:.3f}, the reference at {strong:.3f}.\n\n" + "\n".join(
        lines
    )


def _regimes(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """Joint against the others, by dirt and reference."""
    lines = [
        "| world | untrue | reference | minus independent | minus easy-reference | minus uniform "
        "| minus uniform, same operations |",
        "|---|---|---|---|---|---|---|",
    ]
    for world in worlds:
        for dirt in sorted({record["dirt"] for record in records if record["world"] == world}):
            for suffix, kind in (("", "strong"), (", weak reference", "weak")):
                others = [
                    difference(records, JOINT + suffix, other, world=world, dirt=dirt)
                    for other in (
                        INDEPENDENT + suffix,
                        "joint easy-reference" + suffix,
                        "uniform",
                        "uniform, same operations",
                    )
                ]
                if others[0]:
                    lines.append(f"| `{world}` | {dirt:.0%} | {kind} | " + " | ".join(map(_of, others)) + " |")
    return "## By dirt and reference\n\n" + "\n".join(lines)


def _sweeps(records: Sequence[Record]) -> str:
    """Joint minus independent where one thing is changed."""
    changes = dict.fromkeys(
        record["name"].removeprefix(JOINT + ", ") for record in records if record["name"].startswith(JOINT + ", ")
    )
    changes.pop("weak reference", None)
    if not changes:
        return ""
    lines = ["| changed | joint R@1 | minus independent | minus uniform |", "|---|---|---|---|"]
    for change in changes:
        mine = [record for record in records if record["name"].endswith(f", {change}")]
        r1 = float(np.mean([record["r1"] for record in mine if record["name"].startswith(JOINT)]))
        minus = [_of(difference(mine, f"{JOINT}, {change}", f"{name}, {change}")) for name in (INDEPENDENT, "uniform")]
        lines.append(f"| {change} | {r1:.3f} | {' | '.join(minus)} |")
    return "## One thing changed, `concepts` at 30 %\n\n" + "\n".join(lines)


def _settings(arms: dict[Any, Arm]) -> str:
    lines = ["| world | arm | settings that were best on the pilot seed |", "|---|---|---|"]
    for (world, name), arm in arms.items():
        changed = [key for key in ("batch", "kept") if getattr(arm, key) != getattr(Arm(), key)]
        said = ", ".join(f"{key} {getattr(arm, key)}" for key in ("gain", "rate", *changed))
        lines.append(f"| `{world}` | {name} | {said} |")
    return "## Settings\n\n" + "\n".join(lines)


def _figure(records: Sequence[Record], worlds: Sequence[str]) -> Figure:
    """Where joint selection is ahead: one panel per world, differences by arm with their intervals."""
    figure = Figure(figsize=(4.2 * len(worlds), 4.8), layout="constrained")
    for axes, world in zip(figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0], worlds, strict=True):
        mine = [record for record in records if record["world"] == world and record["dirt"] == DIRT]
        names = [name for name in _names(mine) if name != JOINT and not name.startswith("random start")]
        found = [(name, difference(mine, JOINT, name)) for name in names]
        for at, (_, delta) in enumerate(found):
            if delta:
                axes.errorbar(
                    delta[0], at, xerr=delta[1], fmt="o", color="C0" if delta[0] > delta[1] else "C7", capsize=3
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(world)
        axes.set_xlabel("R@1: joint learnability minus the arm")
    figure.get_axes()[0].invert_yaxis()
    return figure


def _names(records: Sequence[Record]) -> list[str]:
    """Arms in the order of the study, best known ones first; sweeps and the weak reference have tables of their own."""
    there = {record["name"] for record in records}
    return [name for name in ARMS if name in there]


def _of(found: tuple[float, float, int] | None) -> str:
    return f"{found[0]:+.3f} ± {found[1]:.3f}" if found else "–"


def _short(record: Record) -> Record:
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in record.items() if key != "arm"
    }
