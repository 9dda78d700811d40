"""Compare: what is different between two rounds, and how much of one the other chose as well."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.rounds.explain import describe_round
from curate.rounds.manifest import steps_folder
from curate.select.files import read_selected, selected_name
from curate.storage import Store

MOST_ROWS = 5_000_000
"""Chosen rows of two rounds whose contents are compared: 80 MB. Beyond them the share is not told."""
COUNTS = ("pool_rows", "sub_batches", "sub_batch_size", "learnability", "uniform_learnability")


def compare_rounds(store: Store, a: int, b: int) -> dict[str, Any]:
    """What differs between two rounds.

    Returns:
        `fields`: by dotted name what the rounds' recipes, models, pools, libraries and counts have, a's and b's, where
        they differ; `in_both`: pairs that both chose, null where that is not known (rows were removed, or are too
        many); `rows`: pairs that each chose.

    Raises:
        UserError: one of them is not committed.
        DamagedError: a file is not what was written.
    """
    rounds = [describe_round(store, number) for number in (a, b)]
    facts = [dict(_facts(described)) for described in rounds]
    names = list(dict.fromkeys(name for found in facts for name in found))
    differ = {name: [found.get(name) for found in facts] for name in names}
    chosen = [described["sub_batches"] * described["sub_batch_size"] for described in rounds]
    known = sum(chosen) <= MOST_ROWS and not any(described["expired"] for described in rounds)
    in_both = len(np.intersect1d(_chosen(store, rounds[0]), _chosen(store, rounds[1]))) if known else None
    return {
        "rounds": [a, b],
        "rows": chosen,
        "in_both": in_both,
        "fields": {name: values for name, values in differ.items() if values[0] != values[1]},
    }


def _facts(described: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All that a round may differ in from another, by dotted names."""
    lineage = described["lineage"]
    yield "chosen_by", described["chosen_by"]
    for name in COUNTS:
        yield name, described[name]
    for step in described["steps"]:
        yield f"rows.{step['step']}.kept", step["kept"]
        for reason, rows in step["dropped"].items():
            yield f"rows.{step['step']}.{reason}", rows
    for name in ("recipe", "reference", "learner", "pool", "libraries"):
        yield from flat(lineage.get(name), name)
    yield "python", lineage["python"]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables, each by its dotted name.

    >>> dict(flat({"pool": {"uid": "key"}, "seed": 0}))
    {'pool.uid': 'key', 'seed': 0}
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def _chosen(store: Store, described: Mapping[str, Any]) -> npt.NDArray[np.uint64]:
    """Halves of the contents of all chosen pairs: 64 bits tell rows well enough apart to count them."""
    steps = steps_folder(described["round"], described["lineage"]["plan"])
    names = [selected_name(steps, i) for i in range(described["sub_batches"])]
    return np.concatenate([read_selected(store, name)[0]["content_low"].to_numpy() for name in names])
