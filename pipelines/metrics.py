"""Metrics: what is done by stage, through Ray's own metrics API, for whoever scrapes the cluster with Prometheus.

    ray_curate_done_total{stage="embed with ViT-B-16-SigLIP/webli", unit="row"}
    ray_curate_rejected_total{reason="image_truncated"}
    ray_curate_left_seconds{stage="embed with ViT-B-16-SigLIP/webli"}

jobs/kuberay/grafana.json shows them. Ray exports them while the process that runs a round lives; what a round was like
stays in its manifest.
"""

import functools
from typing import Any

import ray
from ray.util import metrics


@functools.cache
def _made() -> tuple[Any, Any, Any]:
    return (
        metrics.Counter("curate_done_total", "rows, tasks or shards that are done", ("stage", "unit")),
        metrics.Counter("curate_rejected_total", "rows that cannot be used", ("reason",)),
        metrics.Gauge("curate_left_seconds", "time that is left of a stage, by its rate so far", ("stage",)),
    )


def count_done(stage: str, unit: str, done: int, left_s: float | None) -> None:
    """Count what is done of a stage; nothing where Ray does not run."""
    if not ray.is_initialized():
        return
    counter, _, left = _made()
    tag = stage.encode("ascii", "backslashreplace").decode()  # Ray takes no others, and a model's name may have some
    if done:
        counter.inc(done, {"stage": tag, "unit": unit})
    if left_s is not None:
        left.set(left_s, {"stage": tag})


def count_rejected(reason: str, rows: int) -> None:
    """Count rows that cannot be used; nothing where Ray does not run."""
    if rows and ray.is_initialized():
        _made()[1].inc(rows, {"reason": reason})
