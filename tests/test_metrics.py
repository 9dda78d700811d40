"""Metrics by Ray's own API: what Prometheus would scrape of a machine on which work is done."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import time, urllib.request
import ray
from curate.pipelines import progress

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="critical",
         _system_config={"metrics_report_interval_ms": 200})
port = ray.nodes()[0]["MetricsExportPort"]
with progress.bar("embed with référence", 100) as bar:  # as a model may be called
    for _ in range(4):
        bar.update(20)
        bar.add(image_truncated=2)
        time.sleep(.3)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        if "curate_rejected_total" in text and "curate_left_seconds" in text:
            break
        time.sleep(.2)
print(text)
"""


HOUSE = Path(__file__).parents[1]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads((HOUSE / "jobs/kuberay/grafana.json").read_text())
    asked = {name for panel in board["panels"] for name in re.findall(r"ray_curate_(\w+)", panel["targets"][0]["expr"])}
    made = set(re.findall(r'"curate_(\w+)"', (HOUSE / "pipelines/metrics.py").read_text()))
    assert asked == made
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.timeout(180)
def test_what_is_done_is_scraped() -> None:
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stdout.splitlines() if "curate_" in line and not line.startswith("#")]
    found = {re.match(r"\w+", line)[0]: (line, float(line.rpartition(" ")[2])) for line in lines}  # type: ignore[index]
    done, value = next(found[name] for name in found if name.startswith("ray_curate_done"))
    assert value == 80
    assert r'stage="embed with r\\xe9f\\xe9rence"' in done
    assert 'unit="row"' in done
    rejected, value = next(found[name] for name in found if name.startswith("ray_curate_rejected"))
    assert (value, 'reason="image_truncated"' in rejected) == (8, True)
    assert any(name.startswith("ray_curate_left_seconds") for name in found)
