"""Tasks on Ray, and what becomes of errors on the way back."""

import time

import pytest
import ray

from curate.errors import InputChangedError, UserError
from curate.pool import Columns, Shard
from pipelines.cluster import groups, run_tasks

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


def test_groups_bound_the_rows_that_one_task_holds() -> None:
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = [
        Shard(index=i, name=f"{i}", path=f"{i}", size=1, version="1", rows=rows, columns=columns)
        for i, rows in enumerate([4, 6, 1, 0, 25, 3, 7, 1])
    ]
    assert [[shard.index for shard in group] for group in groups(shards, 10)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert groups([], 10) == []
