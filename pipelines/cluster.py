"""Connecting to Ray, and the one pattern that selection and writing share: split by shard, join by destination."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from tqdm import tqdm

from curate.errors import CurateError, UserError
from curate.pool import Shard

if TYPE_CHECKING:
    import torch

P = TypeVar("P")
S = TypeVar("S")
D = TypeVar("D")
R = TypeVar("R")

GROUP_ROWS = 65_536
"""Rows of the shards that one splitting task reads: bounds its memory, whatever the size of the pool."""


def connect(address: str) -> None:
    """Join the cluster at `address`, or start Ray on this machine; nothing to do if that was done before.

    Raises:
        UserError: no cluster answers.
    """
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
        try:
            ray.init(address=None if "RAY_ADDRESS" in os.environ else address, **quiet)
        except ConnectionError as error:
            where = os.environ.get("RAY_ADDRESS", address)
            raise UserError(
                f"resources.address = {where!r}: no Ray cluster answers there ({error}); start one, or use local"
            ) from error


def footers_bar(footers: Iterable[Any], total: int) -> Iterable[Any]:
    """The progress bar of an inventory."""
    return tqdm(footers, total=total, desc="inventory", unit="shard", disable=None)


def gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def free_cpus() -> int:
    """CPUs of the cluster less the two that feeding tasks need; at least one."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 2)


def largest_node_cpus() -> int:
    """CPUs of the node that has most."""
    return max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())


def device() -> "torch.device":
    """Where a worker computes: the GPU that Ray gave it, else its CPUs."""
    import torch  # noqa: PLC0415 most tasks never compute, and importing it takes a worker seconds

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def groups(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Consecutive shards in groups of at most `GROUP_ROWS` rows, or of one shard that alone has more."""
    found: list[list[Shard]] = []
    rows = 0
    for shard in shards:
        if not found or rows + shard.rows > GROUP_ROWS:
            found.append([])
            rows = 0
        found[-1].append(shard)
        rows += shard.rows
    return found


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of ours as what it is, without the remote tracebacks that Ray wraps it in."""
    try:
        yield
    except ray.exceptions.RayError as error:
        # What Ray raises is an instance of our class, too, whose text is a remote traceback: the cause is inside.
        cause: BaseException | None = error
        while cause is not None and (isinstance(cause, ray.exceptions.RayError) or not isinstance(cause, CurateError)):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
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
    del parts  # or every part would stay in the object store until the last one is joined
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
