"""What of a recipe changed since the last round, and what that means for the next one."""

import json
from collections.abc import Iterator, Mapping

from curate.recipe import Recipe
from curate.rounds.compare import flat
from curate.rounds.manifest import Manifest

ANEW = "the reference embeds the pool anew, and a new epoch begins"
CUT = "a new epoch begins"
MEANS = {
    "seed": f"other draws; {CUT}",
    "pool": f"rows that are new are embedded; {CUT}",
    "reference": ANEW,
    "embed.exact_pixels": ANEW,
    "embed": "the same embeddings, made in other pieces",
    "dedup": f"near-duplicates are decided anew; {CUT}",
    "learner": "no effect once a learner is published: rounds score with the newest one in the root",
    "selection.sub_batch_size": f"{CUT}; a trainer reads batches of one size: give the new size a root of its own",
    "selection.filter_ratio": CUT,
    "selection.super_batches": "rounds of another length, with windows that are cut anew; " + CUT,
    "selection.window_rows": f"windows are cut anew; {CUT}",
    "selection": "other choices from the same candidates",
    "output": "files of another length",
}
"""By field, or by section for its other fields."""


def changes_since(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """A line for each field that decides rounds and is another than the last round's."""
    before, now = (dict(flat(fields)) for fields in (manifest.lineage["recipe"], recipe.of_round()))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            was, becomes = (json.dumps(fields.get(name), ensure_ascii=False) for fields in (before, now))
            yield f"changed since round {manifest.round}: {name} {was} → {becomes}: {_meaning(name, MEANS)}"


def _meaning(name: str, means: Mapping[str, str]) -> str:
    return next(means[key] for key in (name, name.partition(".")[0]) if key in means)
