"""Compare: what is different between two rounds, and how much of one the other chose as well."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.recipe_file import flat
from curate.rounds.explain import chosen_by, mean_of, read_committed
from curate.rounds.manifest import Manifest, is_expired, steps_folder
from curate.select.files import selected_rows
from curate.storage import Store

MOST_ROWS = 5_000_000
"""Chosen rows of two rounds whose contents are compared: 80 MB. Beyond them the share is not told."""


def compare_rounds(store: Store, a: int, b: int) -> dict[str, Any]:
    """What differs between two rounds.

    Returns:
        `fields`: by dotted name what the rounds' recipes, models, pools, libraries and counts have, a's and b's, where
        they differ; `in_both`: pairs that both chose, null where that is not known (rows were removed, or are too
        many); `rows`: pairs that each chose.

    Raises:
        UserError: one of them is not committed, or something that it left is gone.
        DamagedError: a file is not what was written.
    """
    rounds = [read_committed(store, number)[0] for number in (a, b)]
    facts = [dict(_facts(manifest)) for manifest in rounds]
    names = list(dict.fromkeys(name for found in facts for name in found))
    differ = {name: [found.get(name) for found in facts] for name in names}
    chosen = [manifest.sub_batches * manifest.sub_batch_size for manifest in rounds]
    known = sum(chosen) <= MOST_ROWS and not any(is_expired(store, number) for number in (a, b))
    in_both = len(np.intersect1d(_chosen(store, rounds[0]), _chosen(store, rounds[1]))) if known else None
    return {
        "rounds": [a, b],
        "rows": chosen,
        "in_both": in_both,
        "fields": {name: values for name, values in differ.items() if values[0] != values[1]},
    }


def _facts(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """All that a round may differ in from another, by dotted names."""
    yield "chosen_by", chosen_by(manifest)
    yield "pool_rows", manifest.pool_rows
    yield "sub_batches", manifest.sub_batches
    yield "sub_batch_size", manifest.sub_batch_size
    yield "learnability", mean_of(manifest.learnability)
    yield "uniform_learnability", mean_of(manifest.uniform_learnability)
    for step in manifest.tallies:
        yield f"rows.{step.step}.kept", step.kept
        for reason, rows in step.dropped.items():
            yield f"rows.{step.step}.{reason}", rows
    for name in ("recipe", "reference", "learner", "pool", "libraries"):
        yield from flat(manifest.lineage.get(name), name)
    yield "python", manifest.lineage["python"]


def _chosen(store: Store, manifest: Manifest) -> npt.NDArray[np.uint64]:
    """Halves of the contents of all chosen pairs: 64 bits tell rows well enough apart to count them."""
    steps = steps_folder(manifest.round, manifest.lineage["plan"])
    found = [selected_rows(store, steps, number)["content_low"].to_numpy() for number in range(manifest.sub_batches)]
    return np.concatenate(found)
