"""From the records of runs to ratios with intervals, a table, JSON and figures."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.acceleration.config import UNIFORM, PlanSection

Record = dict[str, Any]

SMOOTHED = 3
"""Points of a curve that are averaged before it is compared: the one in question and those before it."""
# Two-sided 95 % quantiles of Student's t by degrees of freedom (any table of them).
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def smoothed(values: Sequence[float]) -> list[float]:
    """Running means over the last `SMOOTHED` values.

    >>> smoothed([0.0, 3.0, 6.0, 9.0])
    [0.0, 1.5, 3.0, 6.0]
    """
    return [float(np.mean(values[max(0, i + 1 - SMOOTHED) : i + 1])) for i in range(len(values))]


def reached(curve: Sequence[Record], quality: float, cost: Callable[[Record], float]) -> float | None:
    """What it had cost when the smoothed curve first reached a quality, between two points by a straight line."""
    before_quality, before_cost = 0.0, 0.0
    for point, value in zip(curve, smoothed([p["r1"] for p in curve]), strict=True):
        if value >= quality:
            share = (quality - before_quality) / max(1e-12, value - before_quality)
            return before_cost + min(1.0, max(0.0, share)) * (cost(point) - before_cost)
        before_quality, before_cost = value, cost(point)
    return None


def interval(ratios: Sequence[float | None]) -> tuple[float, float | None, float | None] | None:
    """Geometric mean over seeds, lower and upper end of its 95 % interval; None if a seed never got there.

    One seed has no interval.

    >>> interval([2.0, 2.0, 2.0])
    (2.0, 2.0, 2.0)
    """
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    if not logs or len(logs) < len(ratios):
        return None
    mean = float(np.mean(logs))
    if len(logs) == 1:
        return round(math.exp(mean), 4), None, None
    wide = T95[len(logs) - 1] * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return round(math.exp(mean), 4), round(math.exp(mean - wide), 4), round(math.exp(mean + wide), 4)


def summarise(plan: PlanSection, runs: Sequence[Record]) -> list[Record]:
    """One line per arm of a plan, against the uniform runs of the same seeds."""
    uniform = {run["seed"]: run for run in runs if run["arm"] == UNIFORM}
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        same = sorted((run for run in runs if run["arm"] == arm), key=lambda run: int(run["seed"]))
        final = [run["curve"][-1]["r1"] if plan.cosine else _quality_at(run, plan.steps) for run in same]
        fewer = {title: [_fewer(run, uniform[run["seed"]], cost) for run in same] for title, cost in COSTS.items()}
        lines.append(
            {
                "arm": arm,
                "final_r1": [round(value, 4) for value in final],
                "final_r1_mean": round(float(np.mean(final)), 4),
                "final_r1_sd": round(float(np.std(final, ddof=1)), 4) if len(final) > 1 else None,
                **{title: interval(ratios) for title, ratios in fewer.items()},
                "fewer_examples_by_budget": {
                    str(budget): interval(
                        [_fewer(run, uniform[run["seed"]], COSTS["fewer_examples"], budget) for run in same]
                    )
                    for budget in _budgets(plan)
                },
                **{f"{title}_by_seed": [r and round(r, 3) for r in ratios] for title, ratios in fewer.items()},
                "unique_share": _mean(
                    same, lambda run: _at(run, plan.steps)["unique"] / _at(run, plan.steps)["examples"]
                ),
                "wanted_share": _mean(same, lambda run: run["kinds"].get("wanted", 0.0)),
                "examples": _mean(same, lambda run: _at(run, plan.steps)["examples"]),
                "candidates": _mean(same, lambda run: run["candidates"]),
                "learner_scored": _mean(same, lambda run: run["learner_scored"]),
                "flops": _mean(same, lambda run: _at(run, plan.steps)["flops"]),
                "reference_flops": _mean(same, lambda run: run["reference_flops"]),
                "loop_s": _mean(same, lambda run: _at(run, plan.steps)["wall_s"]),
                "others_r1": _mean(same, lambda run: run["others"]["r1"]) if "others" in same[0] else None,
            }
        )
    return lines


COSTS: dict[str, Callable[[Record], float]] = {
    "fewer_examples": lambda point: point["examples"],
    "fewer_flops": lambda point: point["flops"],
    "fewer_seconds": lambda point: point["wall_s"],
}


def write_report(runs: Sequence[tuple[PlanSection, Record]], folder: Path, *, source: Path) -> None:
    """Write `results.json`, `table.md` and one figure per plan; print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, results = [], []
    for plan in {id(plan): plan for plan, _ in runs}.values():
        mine = [run for owner, run in runs if owner is plan]
        lines = summarise(plan, mine)
        tables.append(_table(plan, mine, lines))
        curves = [
            {key: run[key] for key in ("arm", "seed", "kinds", "device")}
            | {
                "curve": [
                    [p["step"], p["examples"], p["flops"], round(p["wall_s"], 2), round(p["r1"], 4)]
                    for p in run["curve"]
                ]
            }
            for run in mine
        ]
        results.append({"plan": plan.model_dump(), "arms": lines, "runs": curves})
        draw(plan, mine, folder / f"{plan.set}-{plan.pool_seed}-{plan.steps}.png")
    columns = ["step", "examples", "flops", "wall_s", "r1"]
    (folder / "results.json").write_text(json.dumps({"study": source.name, "curve": columns, "plans": results}) + "\n")
    (folder / "table.md").write_text("\n\n".join(["# Tables of the study on pictures", *tables]) + "\n")
    print("\n\n".join(tables))


def draw(plan: PlanSection, runs: Sequence[Record], path: Path) -> None:
    """Draw recall at 1 against examples, operations and seconds: the mean of all seeds, and their range."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    colours = [colormaps["tab20"](i) for i in range(20)]
    figure = Figure(figsize=(15, 6.5), layout="constrained")  # without pyplot, which looks for a screen
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (key, label) in zip(
        axes,
        (
            ("examples", "examples trained"),
            ("flops", "operations, reference cached"),
            ("wall_s", "seconds, one thread"),
        ),
        strict=True,
    ):
        for colour, arm in zip(colours, arms, strict=False):
            same = [run for run in runs if run["arm"] == arm]
            values = np.array([smoothed([p["r1"] for p in run["curve"]]) for run in same])
            x = np.mean([[p[key] for p in run["curve"]] for run in same], axis=0)
            axis.plot(x, values.mean(0), label=arm, color=colour, linewidth=2 if arm == UNIFORM else 1.2)
            axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.08, linewidth=0)
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("retrieval, recall at 1, mean of both ways")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"{plan.set}: {len(plan.seeds)} seeds, their mean and their range")
    figure.savefig(path, dpi=110)


def _table(plan: PlanSection, runs: Sequence[Record], lines: Sequence[Record]) -> str:
    reference = runs[0]["reference_quality"]["r1"]
    longest = plan.steps_of(UNIFORM)
    rows = [
        f"**{plan.set}** (pool {plan.pool_seed}): {plan.steps:,} steps, to reach uniform's quality after {longest:,}; "
        f"seeds {', '.join(map(str, plan.seeds))}; the reference's R@1 is {reference:.3f}",
        "",
        "| arm | R@1 | examples to uniform's end | operations to it | wanted | unique | R@1 elsewhere, at end | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted(lines, key=lambda line: -float(line["final_r1_mean"])):
        sd = "" if line["final_r1_sd"] is None else f" ± {line['final_r1_sd']:.3f}"
        others = "" if line["others_r1"] is None else f"{line['others_r1']:.3f}"
        rows.append(
            f"| {line['arm']} | {line['final_r1_mean']:.3f}{sd} | {_ratio(line, 'fewer_examples')} | "
            f"{_ratio(line, 'fewer_flops')} | {line['wanted_share']:.2f} | {line['unique_share']:.2f} | {others} | "
            f"{line['loop_s']:.0f} |"
        )
    if plan.uniform_steps is not None:
        budgets = _budgets(plan)
        rows += [
            "",
            "Examples to reach what uniform reached after so many steps:",
            "",
            f"| arm | {' | '.join(f'{budget:,}' for budget in budgets)} | by seed, at the last |",
            "|---|" + "---|" * (len(budgets) + 1),
        ]
        for line in lines:
            if line["arm"] != UNIFORM and any(ratio is not None for ratio in line["fewer_examples_by_seed"]):
                found = [line["fewer_examples_by_budget"][str(budget)] for budget in budgets]
                by_seed = ", ".join(
                    "never" if ratio is None else f"{ratio:.1f}" for ratio in line["fewer_examples_by_seed"]
                )
                ratios = " | ".join("not all" if ratio is None else f"÷ {ratio[0]:.1f}" for ratio in found)
                rows.append(f"| {line['arm']} | {ratios} | {by_seed} |")
    return "\n".join(rows)


def _ratio(line: Record, name: str) -> str:
    if line[name] is None:
        by_seed = line[f"{name}_by_seed"]
        return f"reached by {sum(ratio is not None for ratio in by_seed)} of {len(by_seed)}"
    return ratio_text(line[name])


def ratio_text(found: tuple[float, float | None, float | None] | None) -> str:
    """What `interval` found, for a table."""
    if found is None:
        return "–"
    middle, low, high = found
    return f"÷ {middle:.2f}" + ("" if high is None else f" ({low:.2f} to {high:.2f})")


def _budgets(plan: PlanSection) -> list[int]:
    """Steps of the uniform arm after a quarter, a half, three quarters and all of its time."""
    return [plan.steps_of(UNIFORM) * part // 4 for part in (1, 2, 3, 4)]


def _fewer(run: Record, uniform: Record, cost: Callable[[Record], float], budget: int | None = None) -> float | None:
    """How many times less the run had cost when it reached what the uniform run reached after `budget` steps.

    None where it never did, or where nothing was measured so early.
    """
    if budget is not None and budget < uniform["curve"][0]["step"]:
        return None
    quality = _quality_at(uniform, budget or uniform["curve"][-1]["step"])
    mine = reached(run["curve"], quality, cost)
    theirs = reached(uniform["curve"], quality, cost)
    return theirs / mine if mine and theirs else None  # a quality of 0 is reached for nothing: no ratio either


def _at(run: Record, steps: int) -> Record:
    """The last point of a curve within so many steps."""
    point: Record = [p for p in run["curve"] if p["step"] <= steps][-1]
    return point


def _quality_at(run: Record, steps: int) -> float:
    """Smoothed recall at 1 after so many steps."""
    return smoothed([p["r1"] for p in run["curve"] if p["step"] <= steps])[-1]


def _mean(runs: Sequence[Record], value: Callable[[Record], float]) -> float:
    return float(np.mean([value(run) for run in runs]))
