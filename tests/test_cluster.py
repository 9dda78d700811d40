"""Moving rows through Ray, and what becomes of errors on the way back."""

from collections.abc import Iterator, Sequence

import pytest
import ray
import ray.data

from curate.errors import ClusterError, InputChangedError, StoreError, UserError
from curate.pool import Columns, Shard
from pipelines import cluster
from pipelines.cluster import exchange, fetch, groups, own_errors

pytestmark = pytest.mark.usefixtures("ray_local")


def test_exchange_sends_every_part_to_its_destination_in_the_order_of_the_sources() -> None:
    def split(source: int) -> list[str]:
        return [f"{source}→{destination}" for destination in "abc"]

    def join(destination: str, parts: Sequence[str]) -> tuple[str, list[str]]:
        return destination, list(parts)

    found = fetch(exchange([1, 2, 3, 4], split, list("abc"), join, title="test"))
    assert found == [(d, [f"{s}→{d}" for s in (1, 2, 3, 4)]) for d in "abc"]
    (single,) = fetch(exchange([1, 2], lambda source: [source], ["x"], lambda _, parts: list(parts), title="one"))
    assert single == [1, 2]
    assert exchange([1], split, [], join, title="none") == []


@pytest.mark.parametrize("error", [UserError("first line", "second line"), InputChangedError("the shard changed")])
@pytest.mark.parametrize("where", ["split", "join"])
def test_an_error_of_ours_comes_back_as_what_it_is(error: Exception, where: str) -> None:
    def fail(name: str) -> None:
        if name == where:
            raise error

    def split(source: int) -> list[int]:
        fail("split")
        return [source, source]

    def join(destination: int, parts: Sequence[int]) -> int:
        fail("join")
        return sum(parts) + destination

    with pytest.raises(type(error)) as caught:
        fetch(exchange([1, 2], split, [0, 1], join, title="test"))
    # Exactly ours: Ray's own stand-in is an instance of the class too, but prints a remote traceback.
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "lines", None) == getattr(error, "lines", None)


def test_other_errors_keep_their_traceback() -> None:
    def join(destination: int, parts: Sequence[int]) -> int:
        return destination // sum(parts)

    with pytest.raises(ray.exceptions.RayTaskError, match="ZeroDivisionError"):
        fetch(exchange([0], lambda source: [source], [1], join, title="test"))


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


@pytest.mark.parametrize("error", [StoreError("no answer"), UserError("one", "two")])
def test_ray_data_adds_nothing(error: Exception) -> None:
    blocks = ray.data.from_items([{"a": 1}]).map_batches(
        Embedder, fn_constructor_args=(error,), batch_size=1, compute=ray.data.ActorPoolStrategy(size=1)
    )
    with pytest.raises(type(error)) as caught, own_errors():
        list(blocks.iter_rows())
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "lines", None) == getattr(error, "lines", None)


def test_groups_bound_the_rows_that_one_task_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GROUP_ROWS", 10)
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = [
        Shard(index=i, name=f"{i}", path=f"{i}", size=1, version="1", rows=rows, columns=columns)
        for i, rows in enumerate([4, 6, 1, 0, 25, 3, 7, 1])
    ]
    assert [[shard.index for shard in group] for group in groups(shards)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert groups([]) == []
