"""From the records of runs to paired differences with intervals, tables and a figure."""

import json
import math
from collections import Counter
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
RANDOM = "random start, "
FIXED = (JOINT, INDEPENDENT, "joint easy-reference", "independent easy-reference", "uniform")
"""What `auto` might have been."""
# Points over uniform training, read off figures of arXiv 2406.17711.
PUBLISHED_BY_BATCH = {32_768: 6.9, 16_384: 9.65, 8_192: 10.4, 4_096: 10.7}
"""Figure 7: by b, the super-batch being 163,840."""
PUBLISHED_BY_LEAD = {-8.6: 2.7, -1.6: 1.95, -3.5: 0.9, 0.9: 0.27}
"""Figure 5: by the reference's own quality, minus that of uniform training."""


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
    """Write `heads.md`, `heads.json` and two figures; print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    worlds = list(dict.fromkeys(record["world"] for record in records))
    parts = [_primary(records, worlds)]
    names = {record["name"] for record in records}
    if "auto" in names:
        parts += [_secondary(records, worlds), _whole(records, worlds), _beginning(records, worlds)]
        parts += [_auto(records, worlds)]
    parts += [*(_arms(records, world) for world in worlds), _regimes(records, worlds)]
    if sweeps := _sweeps(records):
        parts.append(sweeps)
    parts.append(_settings(arms))
    text = "\n\n".join(parts) + "\n"
    print(text)
    (folder / "heads.md").write_text(f"# Tables of the study on frozen features\n\n{text}", encoding="utf-8")
    (folder / "heads.json").write_text(json.dumps([_short(record) for record in records], indent=0), encoding="utf-8")
    _figure(records, worlds).savefig(folder / "heads.png", dpi=120)
    if sweeps:
        draw_regimes(records, worlds).savefig(folder / "heads-regimes.png", dpi=120)


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


def _secondary(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """Joint learnability against uniform at equal operations, the reference paid for by some learners."""
    others = {
        "any number of learners": "uniform, same operations",
        "ten": "uniform, operations of joint and a tenth of the reference",
        "one": "uniform, operations of joint and the reference",
    }
    lines = ["| world | " + " | ".join(others) + " |", "|---" * (1 + len(others)) + "|"]
    for world in worlds:
        found = [_of(difference(records, JOINT, other, world=world, dirt=DIRT)) for other in others.values()]
        lines.append(f"| `{world}` | {' | '.join(found)} |")
    return (
        "## Secondary outcome\n\nJoint minus uniform at equal operations, 30 % untrue; the reference is shared by\n\n"
        + "\n".join(lines)
    )


def _whole(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """Batches as they were chosen against the same rows dealt anew."""
    lines = ["| world | whole minus shuffled | whole minus scored at each step |", "|---|---|---|"]
    for world in worlds:
        whole = "joint, rounds of 10"
        found = [
            _of(difference(records, whole, other, world=world, dirt=DIRT)) for other in (f"{whole}, shuffled", JOINT)
        ]
        lines.append(f"| `{world}` | {' | '.join(found)} |")
    return "## Rounds of ten batches, kept whole\n\n" + "\n".join(lines)


def _beginning(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """From random weights: when to go from easy-reference to learnability."""
    names = [name for name in _names(records) if name.startswith(RANDOM)]
    lines = ["| from random weights | " + " | ".join(f"`{world}`" for world in worlds) + " |"]
    lines.append("|---" * (1 + len(worlds)) + "|")
    for name in names:
        cells = []
        for world in worlds:
            r1 = _mean(records, "r1", name=name, world=world, dirt=DIRT)
            less = difference(records, name, f"{RANDOM}joint easy-reference", world=world, dirt=DIRT)
            cells.append(f"{r1:.3f}" + (f" ({_of(less)})" if not name.endswith(" joint easy-reference") else ""))
        lines.append(f"| {name.removeprefix(RANDOM)} | {' | '.join(cells)} |")
    return "## The beginning\n\nR@1 after 2,000 steps; in brackets, minus easy-reference alone.\n\n" + "\n".join(lines)


def _auto(records: Sequence[Record], worlds: Sequence[str]) -> str:
    """`auto` against the fixed criterion that came out best, wherever both were run."""
    lines = [
        "| world | begins | untrue | reference | `auto` | best fixed one | minus it | minus uniform | it chose by |",
        "|---" * 9 + "|",
    ]
    for world in worlds:
        for dirt in sorted({record["dirt"] for record in records if record["world"] == world}):
            for prefix, suffix in (("", ""), ("", ", weak reference"), (RANDOM, "")):
                lines += _auto_line(records, world, dirt, prefix, suffix)
    return "## `auto`\n\n" + "\n".join(lines)


def _auto_line(records: Sequence[Record], world: str, dirt: float, prefix: str, suffix: str) -> list[str]:
    where = {"world": world, "dirt": dirt}
    auto = f"{prefix}auto{suffix}"
    mine = [record for record in records if record["name"] == auto and all(record[k] == v for k, v in where.items())]
    if not mine:
        return []
    fixed = {
        name: _mean(records, "r1", name=f"{prefix}{name}{'' if name == 'uniform' else suffix}", **where)
        for name in FIXED
    }
    fixed = {name: r1 for name, r1 in fixed.items() if not math.isnan(r1)}
    best = max(fixed, key=lambda name: fixed[name])
    chose: Counter[str] = Counter(decided for record in mine for decided in record["decided"])
    share = ", ".join(f"{name} {count / chose.total():.0%}" for name, count in chose.most_common())
    less = [
        _of(difference(records, auto, f"{prefix}{name}{'' if name == 'uniform' else suffix}", **where))
        for name in (best, "uniform")
    ]
    begins = "at random" if prefix else "trained"
    kind = "weak" if suffix else "strong"
    r1 = _mean(records, "r1", name=auto, **where)
    return [f"| `{world}` | {begins} | {dirt:.0%} | {kind} | {r1:.3f} | {best} | {' | '.join(less)} | {share} |"]


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


def draw_regimes(records: Sequence[Record], worlds: Sequence[str]) -> Figure:
    """What joint learnability gains over uniform, by batch, by lead of the reference and by stage of the learner."""
    figure = Figure(figsize=(16, 8.4), layout="constrained")
    panels = figure.subplots(2, 3)
    by_batch, by_lead, by_stage = panels[0]
    batches = [b for b in (32, 128, 512, 1024) if any(r["name"] == f"{JOINT}, b {b}" for r in records)]
    for at, (name, label) in enumerate((("uniform", "minus uniform"), (INDEPENDENT, "minus independent"))):
        found = [difference(records, f"{JOINT}, b {b}", f"{name}, b {b}", world="concepts") for b in batches]
        _whiskers(by_batch, [b * 1.05**at for b in batches], found, label, f"C{at}")
    by_batch.set(xscale="log", xlabel="b, of super-batches of 10,240", title="measured: by batch (`concepts`)")
    for at, world in enumerate(worlds):
        leads, gains = [], []
        for dirt in sorted({record["dirt"] for record in records if record["world"] == world}):
            for suffix in ("", ", weak reference"):
                gain = difference(records, JOINT + suffix, "uniform", world=world, dirt=dirt)
                if gain:
                    where = {"name": JOINT + suffix, "world": world, "dirt": dirt}
                    lead = _mean(records, "reference_r1", **where) - _mean(records, "start_r1", **where)
                    leads.append(100 * lead)
                    gains.append(gain)
        _whiskers(by_lead, leads, gains, world, f"C{at}")
        stages = [("random", RANDOM), ("trained", "")]
        found = [
            difference(records, f"{prefix}{JOINT}", f"{prefix}uniform", world=world, dirt=DIRT) for _, prefix in stages
        ]
        _whiskers(by_stage, [at * 0.1, 1 + at * 0.1], found, world, f"C{at}")
    by_lead.set(
        xlabel="reference's R@1 minus the learner's at its start, points", title="measured: by lead, minus uniform"
    )
    by_stage.set_xticks([0.1, 1.1], ["2,000 steps from random weights", "1,000 steps of a trained one"])
    by_stage.set(title="measured: by stage, minus uniform, 30 % untrue")
    published_batch, published_lead, none = panels[1]
    published_batch.plot(
        list(PUBLISHED_BY_BATCH), list(PUBLISHED_BY_BATCH.values()), "s--", color="C7", label="minus uniform"
    )
    published_batch.set(xscale="log", xlabel="b, of super-batches of 163,840", title="published: by batch (figure 7)")
    published_lead.plot(
        list(PUBLISHED_BY_LEAD), list(PUBLISHED_BY_LEAD.values()), "s", color="C7", label="four references"
    )
    published_lead.set(
        xlabel="reference minus uniform training, points", title="published: by the reference's own quality (figure 5)"
    )
    none.axis("off")
    none.text(0.5, 0.5, "by stage: nothing published", ha="center", color="C7")
    for axes in (*panels[0], published_batch, published_lead):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("gain, points")
        axes.legend()
    return figure


def _whiskers(
    axes: Any, x: Sequence[float], found: Sequence[tuple[float, float, int] | None], label: str, c: str
) -> None:
    points = [(at, 100 * delta[0], 100 * delta[1]) for at, delta in zip(x, found, strict=True) if delta]
    if points:
        at, mean, half = zip(*sorted(points), strict=True)
        axes.errorbar(at, mean, yerr=half, fmt="o", color=c, capsize=3, label=label)


def _mean(records: Sequence[Record], key: str, **where: Any) -> float:
    """Of all runs that have something in common; NaN without any."""
    found = [record[key] for record in records if all(record[name] == value for name, value in where.items())]
    return float(np.mean(found)) if found else math.nan


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
