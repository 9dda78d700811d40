"""Connecting to Ray, and the one pattern that selection and writing share: split by shard, join by destination."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from tqdm import tqdm

from curate.errors import CurateError
from curate.pool import Shard

if TYPE_CHECKING:
    import torch

P = TypeVar("P")
S = TypeVar("S")
D = TypeVar("D")
R = TypeVar("R")

MOST_GROUPS = 256
"""Splitting tasks at most: with m destinations they make 256·m objects, which Ray's driver still tracks with ease."""


def connect(address: str) -> None:
    """Join the cluster at `address`, or start Ray on this machine; nothing to do if that was done before."""
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local" and "RAY_ADDRESS" not in os.environ:
        # Two more than there are: actors that hold every CPU starve the tasks that feed them (ray#44687).
        cpus = max(2, os.cpu_count() or 1) + 2
        # Its core prints an "error" for every actor pool of Ray Data that may restart.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # "local" and not None, or Ray joins whatever cluster it finds on this machine.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        # Within a Ray job RAY_ADDRESS names the cluster that runs it.
        ray.init(address=None if "RAY_ADDRESS" in os.environ else address, **quiet)


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def free_cpus() -> int:
    """CPUs of the cluster less the two that feeding tasks need; at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 2)


def device() -> "torch.device":
    """Where a worker computes: the GPU that Ray gave it, else its CPUs."""
    import torch  # noqa: PLC0415 most tasks never compute, and importing it takes a worker seconds

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def groups(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Consecutive shards in at most `MOST_GROUPS` groups of about equal length."""
    count = min(len(shards), MOST_GROUPS)
    bounds = [len(shards) * i // count for i in range(count + 1)] if count else [0]
    return [list(shards[first:last]) for first, last in pairwise(bounds)]


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of ours as what it is, without the remote tracebacks that Ray wraps it in."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, CurateError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None or isinstance(cause, ray.exceptions.RayError):
            raise
        raise cause from None


def exchange(
    sources: Sequence[P],
    split: Callable[[P], Sequence[S]],
    destinations: Sequence[D],
    join: Callable[[D, Sequence[S]], R],
    *,
    title: str,
    join_gpus: int = 0,
) -> list[ray.ObjectRef]:
    """Move what lies by source to where it is wanted by destination, through Ray's object store.

    Args:
        sources: what each splitting task reads.
        split: from a source to one part for each destination, in their order; may run more than once.
        destinations: what each joining task makes.
        join: from a destination and its parts, in the order of the sources; may run more than once.
        title: of the progress bar.
        join_gpus: GPUs of each joining task.

    Returns:
        References to what `join` returned, in the order of the destinations; what a task raised, `fetch` raises.
    """
    if not destinations:
        return []
    count = len(destinations)

    def split_all(source: P) -> Any:
        parts = split(source)
        return parts[0] if count == 1 else tuple(parts)

    def join_all(destination: D, *parts: S) -> R:
        return join(destination, parts)

    splitting = ray.remote(split_all).options(num_returns=count)
    joining = ray.remote(join_all).options(num_gpus=join_gpus)
    parts = [refs if isinstance(refs := splitting.remote(source), list) else [refs] for source in sources]
    joined = [joining.remote(destination, *(refs[i] for refs in parts)) for i, destination in enumerate(destinations)]
    waiting = [refs[0] for refs in parts] + joined
    with tqdm(total=len(waiting), desc=title, unit="task", disable=None) as bar:
        while waiting:
            done, waiting = ray.wait(waiting, fetch_local=False)
            bar.update(len(done))
    return joined


def fetch(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """The values behind references.

    Raises:
        CurateError: as a task raised it.
    """
    with own_errors():
        return list(ray.get(list(refs)))
