"""Moving rows through Ray, and what becomes of errors on the way back."""

from collections.abc import Sequence

import pytest
import ray

from curate.errors import InputChangedError, UserError
from curate.pool import Columns, Shard
from pipelines import cluster
from pipelines.cluster import exchange, fetch, groups

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


def test_groups_bound_the_rows_that_one_task_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GROUP_ROWS", 10)
    columns = Columns(image="jpg", caption="caption", uid=None)
    shards = [
        Shard(index=i, name=f"{i}", path=f"{i}", size=1, version="1", rows=rows, columns=columns)
        for i, rows in enumerate([4, 6, 1, 0, 25, 3, 7, 1])
    ]
    assert [[shard.index for shard in group] for group in groups(shards)] == [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert groups([]) == []
