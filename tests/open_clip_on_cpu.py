"""`curate` whose open_clip may train on ranks without GPUs: it hands DDP its device, which DDP takes for GPUs alone."""

from typing import Any

import torch

from curate.jobs.cli import main

whole = torch.nn.parallel.DistributedDataParallel


def on_cpu(model: Any, device_ids: Any = None, **others: Any) -> Any:
    return whole(model, **others)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = on_cpu  # type: ignore[assignment, misc]
    main()
