"""What to compute on, what is made again, and how the steps run their tasks."""

import contextlib
import logging
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import ray
from ray.autoscaler.sdk import request_resources

from curate.errors import DamagedError, UserError
from curate.messages import counted
from curate.pipelines import progress
from curate.pipelines.joining import join, meant, start
from curate.pipelines.ray_errors import told_plainly
from curate.recipe import DeviceType, ResourcesSection
from curate.select.index import made_with
from curate.storage import Store

if TYPE_CHECKING:
    import torch

R = TypeVar("R")


class HasRows(Protocol):
    """A shard, or a file of records."""

    @property
    def rows(self) -> int:
        """How many there are."""


S = TypeVar("S", bound=HasRows)

POLL_S = 0.5
AT_ONCE = 16
"""Finished tasks that are waited for together: each look at the waiting ones takes as long as there are such."""
MOST_REMADE = 20
STDERR = 2
CORE_LOG = re.compile(rb"\[\d{4}-\d\d-\d\d [^\]]*\] \w+\.cc:\d+: ")
# Below one per thread, so that the tasks which feed the actors find a CPU (ray#44687).
CPU_SHARE = 0.9
# Without limits Ray restarts an actor for ever on a row that kills it.
RETRIES = {"max_restarts": 4, "max_task_retries": 2}


def connect(address: str) -> None:
    """Join the cluster at `address`, or start Ray on this machine; nothing to do if that was done before.

    Raises:
        UserError: no cluster answers there or lets us in, or no folder's name is short enough for Ray.
        CurateError: Ray does not start on this machine.
    """
    if ray.is_initialized():
        return
    _silence_ray()
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    with _own_signals(), _without_core_log(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (where := meant(address)) == "local":
            start(quiet)
        else:
            join(where, quiet)


def _silence_ray() -> None:
    """Keep what Ray says to people who run Ray from people who run this: what matters comes as an exception."""
    # Its core prints an "error" for every actor pool of Ray Data that may restart.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # And its drivers a traceback for every failure of its own helpers.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Under `uv run` it would upload the working directory, pool and all, for workers that have what they need.
    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    # No option keeps the messages of raylets, such as "will be retried", from stdout, where a command's answer belongs.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's core replaces it by one that prints a C++ stack and aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_core_log() -> Iterator[None]:
    """Leave out lines of the log of Ray's core, which says on stderr, whatever it is told, what it was told to say."""
    # In memory, for the disk may be what is the matter.
    with open(os.memfd_create("log"), "w+b") as kept:
        real = os.dup(STDERR)
        os.dup2(kept.fileno(), STDERR)
        try:
            yield
        except BaseException:
            kept.truncate(0)  # what went wrong is in the exception
            raise
        finally:
            os.dup2(real, STDERR)
            os.close(real)
            kept.seek(0)
            for line in kept:
                if not CORE_LOG.match(line):
                    os.write(STDERR, line)


def remaking(run: Callable[[], R], store: Store, ours: Callable[[str], bool], say: Callable[[str], None]) -> R:
    """Do something that makes what is missing; what turns out damaged and can be made again is deleted, and made again.

    Args:
        run: may be called again at any time.
        store: the root.
        ours: whether `run` makes a file, by its name.
        say: told of each file that was damaged.

    Raises:
        DamagedError: of a file that nobody can make again, or of so many that the store must be to blame.
    """
    for _ in range(MOST_REMADE):
        try:
            return run()
        except DamagedError as error:
            if not ours(error.name):
                raise
            for name in made_with(store, error.name):
                store.delete(name)
            say(f"{error.name}: was damaged ({error.reason}); it is deleted, and made again")
    return run()


def footers_bar(footers: Iterable[Any], total: int) -> Iterable[Any]:
    """The progress bar of an inventory."""
    return progress.over(footers, total, title="inventory", unit="shard")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What the actors and tasks of one run compute on."""

    gpus: int
    """Of the cluster; 0 if CPUs do all."""

    @property
    def type(self) -> DeviceType:
        """As `torch.device.type` names it."""
        return "cuda" if self.gpus else "cpu"


CPUS = Devices(gpus=0)


def take_devices(resources: ResourcesSection, say: Callable[[str], None]) -> Devices:
    """Decide what to compute on; GPUs that the recipe asks for are waited for.

    Args:
        resources: of the recipe.
        say: told what was taken, and why.

    Raises:
        UserError: fewer GPUs than asked for have joined the cluster within `resources.wait_s`.
    """
    if resources.device == "cpu":
        return CPUS
    if resources.device == "cuda":
        return _wait_for_gpus(resources, say)
    found, nodes = _gpus(), len(ray.nodes())
    where = "this machine" if nodes == 1 else f"the cluster's {nodes} nodes"
    if found:
        say(f"computing on {counted(found, 'GPU')} of {where}; resources.device = 'cpu' would leave them alone")
    else:
        say(f"computing on CPUs: Ray finds no GPU on {where}; resources.device = 'cuda' would insist on one")
    return Devices(gpus=found)


def _wait_for_gpus(resources: ResourcesSection, say: Callable[[str], None]) -> Devices:
    wanted = resources.workers or 1
    begun, told = time.monotonic(), False
    try:
        while (found := _gpus()) < wanted:
            if meant(resources.address) == "local":
                raise UserError(
                    f"resources.device = 'cuda': expected {counted(wanted, 'GPU')} on this machine, found {found}; "
                    f"{_CPU}"
                )
            if time.monotonic() - begun > resources.wait_s:
                raise UserError(
                    f"resources.device = 'cuda': expected {counted(wanted, 'GPU')} in the cluster, found {found} on "
                    f"{counted(len(ray.nodes()), 'node')} after {resources.wait_s:g} s; add GPU nodes, raise "
                    f"resources.wait_s, or {_CPU}"
                )
            if not told:
                say(f"waiting for {counted(wanted, 'GPU')}: {found} there; for {resources.wait_s:g} s at most")
                # A cluster that scales adds nodes for what somebody waits for, and for nothing else.
                request_resources(bundles=[{"GPU": 1}] * wanted)
                told = True
            time.sleep(POLL_S)
    finally:
        if told:
            request_resources(bundles=[])
    return Devices(gpus=found)


_CPU = "set resources.device to 'cpu' or 'auto'"


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def all_cpus() -> float:
    """Of the cluster."""
    return float(ray.cluster_resources().get("CPU", 1))


def free_cpus() -> int:
    """Of the cluster's CPUs those for actors."""
    return free_of(all_cpus())


def free_of(cpus: float) -> int:
    """Of so many CPUs all but the two that feeding tasks need; at least one."""
    return max(1, int(cpus) - 2)


def largest_node(resource: str) -> float:
    """How much of a resource, such as CPU or memory, the node has that has most."""
    return max(float(node["Resources"].get(resource, 0)) for node in ray.nodes())


def places_for(memory: int) -> int:
    """How many tasks of so many bytes fit into the memory of the cluster's nodes at a time."""
    return sum(int(node["Resources"].get("memory", 0) // memory) for node in ray.nodes())


def device() -> "torch.device":
    """Where a task or actor computes: the GPU that Ray gave it, else its CPUs. The driver has none.

    What torch sees says nothing: Ray 2.60 leaves all GPUs visible to a task that was given none.

    Raises:
        UserError: Ray gave a GPU that torch cannot use.
    """
    import torch  # noqa: PLC0415 most tasks never compute, and importing it takes a worker seconds

    if not (given := ray.get_runtime_context().get_accelerator_ids()["GPU"]):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"node {ray.util.get_node_ip_address()}: Ray gave GPU {given[0]} to a worker whose torch "
            f"{torch.__version__} finds no CUDA; look at the node's driver and at its build of torch, or set "
            "resources.device = 'cpu'"
        )
    return torch.device("cuda", 0)  # of those that are visible, which for who was given one is that one


def restarted() -> bool:
    """Whether this is an actor that Ray started again after it died."""
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and bool(context.was_current_actor_reconstructed)


def groups(shards: Sequence[S], most_rows: int) -> list[list[S]]:
    """Consecutive shards, or files, in groups of at most so many rows, or of one that alone has more."""
    found: list[list[S]] = []
    rows = 0
    for shard in shards:
        if not found or rows + shard.rows > most_rows:
            found.append([])
            rows = 0
        found[-1].append(shard)
        rows += shard.rows
    return found


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of ours as what it is, and a failure of Ray's as a line, without remote tracebacks.

    Raises:
        CurateError: as a task raised it.
        ClusterError: Ray lost a worker or a node, or had no room left.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        if (told := told_plainly(error)) is None:
            raise
        raise told from None


def run_tasks(
    task: Callable[..., R],
    items: Sequence[Any],
    shared: Any,
    *,
    title: str,
    memory: int = 0,
    devices: Devices = CPUS,
) -> list[R]:
    """Call `task(item, shared)` for each item, on the cluster; what the tasks hold stays with them.

    Args:
        task: a function of a module; may run more than once for an item.
        items: small: the driver sends each with its task.
        shared: what all tasks are given; put into the object store once.
        title: of the progress bar.
        memory: bytes that a task holds, where that may be gigabytes: Ray then runs fewer at a time.
        devices: whose GPUs, if there are any, compute; a GPU's actor lives through all its items, so that imports and
            CUDA's context are made once.

    Returns:
        What the tasks returned, in the order of the items. Small, for the driver holds it.

    Raises:
        UserError: no node has the memory that a task needs.
        CurateError: as the first task that failed raised it; the others are stopped.
    """
    if not items:
        return []
    require_memory(memory, title)
    constant = ray.put(shared)
    if devices.gpus:
        actor = ray.remote(_Computer).options(num_gpus=1, memory=memory or None, **RETRIES)
        actors = [actor.remote(task) for _ in range(min(devices.gpus, len(items), places_for(memory or 1)))]
        # In turn: the items of one step are alike.
        calls = [actors[i % len(actors)].compute for i in range(len(items))]
    else:
        calls = [ray.remote(task).options(memory=memory or None)] * len(items)
    refs = [call.remote(item, constant) for call, item in zip(calls, items, strict=True)]
    found: dict[Any, R] = {}
    waiting = list(refs)
    try:
        with progress.bar(title, len(refs), unit="task") as bar, own_errors():
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=min(len(waiting), AT_ONCE), timeout=POLL_S)
                found |= zip(done, ray.get(done), strict=True)
                bar.update(len(done))
    finally:
        for ref in waiting:
            ray.cancel(ref)
    return [found[ref] for ref in refs]


class _Computer:
    """The actor that computes on one GPU.

    A task would do, but for its worker: Ray lends one process to many tasks, and with them device 0, then 1, while it
    still holds context and memory of the other.
    """

    def __init__(self, task: Callable[..., Any]) -> None:
        self._task = task

    def compute(self, item: Any, shared: Any) -> Any:
        return self._task(item, shared)


def require_memory(needed: int, title: str) -> None:
    """Refuse what would wait for ever.

    Raises:
        UserError: no node of the cluster has so many bytes for its tasks.
    """
    if needed > (most := largest_node("memory")):
        raise UserError(
            f"{title}: a task needs {needed / 2**30:.1f} GiB, the largest node has {most / 2**30:.1f} GiB for tasks; "
            "take larger nodes, or start Ray there with more --memory"
        )
