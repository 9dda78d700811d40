"""A stand-in for Ray that runs tasks and actors in this process, one after the other: faults are tried by the hundred.

What a round writes with it is, byte for byte, what it writes with Ray (tests/test_faults.py compares them).
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

import curate.pipelines.cluster
import curate.pipelines.embed
import curate.pipelines.neighbours
import curate.pipelines.select
import curate.pipelines.standing

CPU = torch.device("cpu")


class Ref:
    """What a task returned, pickled once: no two tasks share what they hold, as none do in Ray."""

    def __init__(self, value: Any) -> None:
        self.data = pickle.dumps(value)

    def get(self) -> Any:
        return pickle.loads(self.data)


class Remote:
    """A remote function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def options(self, **_: Any) -> "Remote":
        return self

    def remote(self, *arguments: Any) -> Any:
        return Ref(self.function(*(value.get() if isinstance(value, Ref) else value for value in arguments)))


class Blocks:
    """A data set of Ray Data, as far as a round uses it."""

    asked: ClassVar[dict[str, Any]] = {}
    """What Ray would have been asked for, the last time."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def map_batches(self, actor: type, *, fn_constructor_args: Sequence[Any], **asked: Any) -> "Blocks":
        Blocks.asked = asked
        import pyarrow as pa

        made = actor(*fn_constructor_args)
        try:
            self.found = [receipt for item in self.items for receipt in made(pa.Table.from_pylist([item]))]
        finally:
            if made.failure is None:  # its threads, and the models that they hold, end with an actor's process
                made.embedder.close()
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return ({name: values[0] for name, values in receipt.items()} for receipt in self.found)


class Data:
    """The module `ray.data`."""

    @staticmethod
    def from_items(items: Sequence[Any], **_: Any) -> Blocks:
        return Blocks(items)


class StandIn:
    """The module `ray`."""

    data = Data
    remote = staticmethod(Remote)
    put = staticmethod(Ref)

    class exceptions:  # noqa: N801
        class RayError(Exception):
            """Nothing raises it: an error of a task is raised where the task is called."""

    @staticmethod
    def get(refs: Any) -> Any:
        return [ref.get() for ref in refs] if isinstance(refs, list) else refs.get()

    @staticmethod
    def wait(refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        return refs, []

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def nodes() -> list[dict[str, Any]]:
        return [{"Resources": {"CPU": 4, "memory": 2**40}}]

    @staticmethod
    def cluster_resources() -> dict[str, float]:
        return {"CPU": 4}


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds run in this process."""
    for module in (curate.pipelines.cluster, curate.pipelines.embed):
        monkeypatch.setattr(module, "ray", StandIn)
    monkeypatch.setattr(curate.pipelines.embed, "restarted", lambda: False)
    for module in (
        curate.pipelines.embed,
        curate.pipelines.neighbours,
        curate.pipelines.select,
        curate.pipelines.standing,
    ):
        monkeypatch.setattr(module, "device", lambda: CPU)
