"""Tasks on Ray, and what becomes of errors on the way back."""

import time
from collections.abc import Iterator

import pytest
import ray
import ray.data

from curate.errors import ClusterError, InputChangedError, StoreError, UserError
from curate.pipelines.cluster import groups, own_errors, run_tasks
from curate.pool.columns import Columns
from curate.pool.shards import Shard

pytestmark = pytest.mark.usefixtures("ray_local")


def add(item: int, shared: int) -> int:
    return item + shared


def fail(item: int, shared: dict[int, Exception]) -> int:
    if item in shared:
        raise shared[item]
    return item


def sleep(item: float, shared: None) -> float:
    if not item:
        raise UserError("at once")
    until = time.monotonic() + item
    while time.monotonic() < until:
        time.sleep(0.05)  # Ray interrupts between two lines of Python
    return item


def divide(item: int, shared: int) -> float:
    return item / shared


def test_tasks_answer_in_the_order_of_their_items() -> None:
    assert run_tasks(add, range(40), 5, title="test") == list(range(5, 45))
    assert run_tasks(add, [], 5, title="none") == []


@pytest.mark.parametrize("error", [UserError("first line", "second line"), InputChangedError("the shard changed")])
def test_an_error_of_ours_comes_back_as_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_tasks(fail, [1, 2], {2: error}, title="test")
    # Exactly ours: Ray's own stand-in is an instance of the class too, but prints a remote traceback.
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "lines", None) == getattr(error, "lines", None)


def test_an_error_stops_the_other_tasks() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="at once"):
        run_tasks(sleep, [0.0] + [60.0] * 20, None, title="test")
    assert run_tasks(sleep, [0.1] * 4, None, title="test") == [0.1] * 4  # their places are free again
    assert time.monotonic() - began < 30


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="ZeroDivisionError"):
        run_tasks(divide, [1], 0, title="test")


TASK = ray.exceptions.RayTaskError("task", "Traceback (most recent call last): of a worker", ValueError("bug"))
FAILURES = [
    (
        ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore"),
        "a worker was ended because its node ran out of memory",
    ),
    (ray.exceptions.OutOfDiskError("Local disk is full"), "no room is left"),
    (ray.exceptions.ObjectStoreFullError("full"), "no room is left"),
    (ray.exceptions.NodeDiedError("The node (id 1) has been marked dead"), "a node of the cluster died"),
    (ray.exceptions.LocalRayletDiedError(), "a node of the cluster died"),
    (ray.exceptions.WorkerCrashedError(), "a worker died"),
    (ray.exceptions.ActorDiedError(), "a worker died"),
    (ray.exceptions.ActorUnavailableError("Socket closed", None), "a worker died"),
    (ray.exceptions.ObjectLostError("ff", None, "here"), "what a worker had made was lost"),
    (ray.exceptions.OwnerDiedError("ff", None, "here"), "what a worker had made was lost"),
    (ray.exceptions.GetTimeoutError("Get timed out"), "a worker did not answer in time"),
    (ray.exceptions.RuntimeEnvSetupError("pip failed\n" * 50), "a node could not be made ready"),
    (ray.exceptions.TaskUnschedulableError("infeasible"), "no node of the cluster can run"),
    (ray.exceptions.RaySystemError("broken"), "a process of Ray's own failed"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a task"])
def test_a_failure_of_ray_is_a_line(error: Exception, words: str, inside: bool) -> None:
    raised = ray.exceptions.RayTaskError("task", "Traceback: of a worker", error).as_instanceof_cause()
    with pytest.raises(ClusterError) as caught, own_errors():
        raise raised if inside else error
    line = str(caught.value)
    assert line.startswith(f"Ray: {words}")
    assert line.endswith("and run the same command again: what is done stays")
    assert "\n" not in line
    assert "Traceback" not in line
    assert len(line) < 500


@pytest.mark.parametrize("error", [TASK.as_instanceof_cause(), ray.exceptions.ActorDiedError(TASK)])
def test_a_defect_keeps_its_traceback(error: ray.exceptions.RayError) -> None:
    with pytest.raises(type(error)) as caught, own_errors():
        raise error
    assert caught.value is error


class Embedder:
    """Fails as `EmbedShards` may."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, batch: object) -> Iterator[object]:
        raise self.error
        yield batch


@pytest.mark.parametrize(
    "error", [pytest.param(StoreError("no answer"), marks=pytest.mark.exhaustive), UserError("one", "two")]
)
def test_ray_data_adds_nothing(error: Exception) -> None:
    blocks = ray.data.from_items([{"a": 1}]).map_batches(
        Embedder, fn_constructor_args=(error,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=1)
    )
    with pytest.raises(type(error)) as caught, own_errors():
        list(blocks.iter_rows())
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "lines", None) == getattr(error, "lines", None)


def test_groups_bound_the_rows_that_one_task_holds() -> None:
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = [
        Shard(index=i, name=f"{i}", path=f"{i}", size=1, version="1", rows=rows, columns=columns)
        for i, rows in enumerate([4, 6, 1, 0, 25, 3, 7, 1])
    ]
    assert [[shard.index for shard in group] for group in groups(shards, 10)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert groups([], 10) == []
