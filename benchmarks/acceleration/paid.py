"""What selection saves once the reference is paid for, from the curves of a study.

    python -m benchmarks.acceleration.paid docs/acceleration/results.json

A reference embeds the pool once, and was trained before. A learner that alone uses it pays for both, one of ten
learners for a tenth of the training.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.acceleration.config import UNIFORM, load_study
from benchmarks.acceleration.flops import forward_flops
from benchmarks.acceleration.report import interval, ratio_text, reached, smoothed

HERE = Path(__file__).parent
EXTRAS = {
    "reference cached": (0.0, 0.0),
    "its pass over the pool paid": (1.0, 0.0),
    "a tenth of its training as well": (1.0, 0.1),
    "all of its training": (1.0, 1.0),
}
"""Shares of the pool's embedding and of the reference's training that an arm pays for."""


def saved(plan: dict[str, Any], arm: str, *, extra: float) -> tuple[float, float | None, float | None] | None:
    """Operations of uniform training ÷ those of an arm up to the quality that uniform training ended with.

    Args:
        plan: of a study's results.
        arm: its name.
        extra: operations that the arm pays for beside its own.

    Returns:
        As `interval`; None if a seed never got there.
    """
    curves = {
        (run["arm"], run["seed"]): [{"flops": values[2], "r1": values[4]} for values in run["curve"]]
        for run in plan["runs"]
    }
    ratios = []
    for seed in sorted(seed for name, seed in curves if name == arm):
        uniform = curves[UNIFORM, seed]
        quality = smoothed([point["r1"] for point in uniform])[-1]
        own, its = (reached(curve, quality, lambda point: point["flops"]) for curve in (curves[arm, seed], uniform))
        ratios.append(None if own is None or its is None else its / (own + extra))
    return interval(ratios)


def table(results: dict[str, Any]) -> str:
    """Arms of all plans that reached what uniform training ended with."""
    study = load_study(HERE / results["study"])
    forward = forward_flops(json.loads((HERE / study.model).read_text()))
    training = 3 * forward * study.arms[UNIFORM].selection.sub_batch_size * study.reference.steps
    lines = [f"| set | arm | {' | '.join(EXTRAS)} |", "|---|---|" + "---|" * len(EXTRAS)]
    for plan in results["plans"]:
        for line in plan["arms"]:
            if not line["reference_flops"] or line["fewer_flops"] is None:
                continue
            found = [
                saved(plan, line["arm"], extra=pool * line["reference_flops"] + share * training)
                for pool, share in EXTRAS.values()
            ]
            cells = [ratio_text(ratio) for ratio in found]
            lines.append(f"| `{plan['plan']['set']}` | {line['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceleration.paid", description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a study")
    print(table(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
