"""The demo's own lines; the demo itself is run by hand, and by whoever reads the README."""

import json
from pathlib import Path

from curate.jobs.demo import BAR_WIDTH, curves
from curate.jobs.train_log import TrainingLog


def test_curves_stand_side_by_side(tmp_path: Path) -> None:
    for name, values in {"chosen": {0: 0.1, 2: 0.4}, "uniform": {0: 0.1, 2: 0.2, 3: 0.2}}.items():
        with TrainingLog(tmp_path / name / "trainer", step=0) as log:
            log.write(1, loss=2.0)  # a step at which nothing was measured
            for step, value in values.items():
                log.write(step, image_to_text_r1=value + 0.01, text_to_image_r1=value - 0.01)
    assert curves({name: tmp_path / name for name in ("chosen", "uniform")}) == [
        f"   step 0   chosen 0.100 {'█' * (BAR_WIDTH // 4)}",
        f"           uniform 0.100 {'█' * (BAR_WIDTH // 4)}",
        f"   step 2   chosen 0.400 {'█' * BAR_WIDTH}",
        f"           uniform 0.200 {'█' * (BAR_WIDTH // 2)}",
        f"   step 3  uniform 0.200 {'█' * (BAR_WIDTH // 2)}",
    ]
    assert json.loads((tmp_path / "chosen/trainer/log.jsonl").read_text().splitlines()[0]) == {"step": 1, "loss": 2.0}
