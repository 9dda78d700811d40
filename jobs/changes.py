"""What of a recipe changed since the last round, and what that means for the next one."""

import json
from collections.abc import Iterator

from curate.recipe import Recipe
from curate.recipe_file import flat
from curate.rounds.manifest import Manifest

ANEW = "the reference embeds the pool anew, and a new epoch begins"
CUT = "a new epoch begins"
MEANS = {
    "seed": f"other draws; {CUT}",
    "pool": f"where that makes another pool, rows that are new are embedded, and {CUT}",
    "pool.where": f"other rows are wanted: {ANEW}",
    "pool.keep": f"other rows are wanted, if the list is another: {ANEW}",
    "pool.caption_seed": f"other captions of those that rows have: {ANEW}",
    "pool.images": f"pictures are fetched from elsewhere: {ANEW}",
    "pool.max_row_group_bytes": "how large a shard's row groups may be, and nothing else",
    "pool.on_bad_shard": f"where shards are bad; with other shards left in, {CUT}",
    "reference": ANEW,
    "reference.trusted": "how a checkpoint is opened, and nothing else",
    "embed.exact_pixels": ANEW,
    "embed": "the same embeddings, made in other pieces",
    "dedup": f"near-duplicates are decided anew; {CUT}",
    "learner": "no effect once a learner is published: rounds score with the newest one in the root",
    "learner.scoring_resolution": "rounds score the learner on pictures of that size",
    "selection.sub_batch_size": f"{CUT}; a trainer that wants batches of one size wants a root for each",
    "selection.filter_ratio": CUT,
    "selection.super_batches": f"rounds of another length, and windows that are cut anew; {CUT}",
    "selection.window_rows": f"windows are cut anew; {CUT}",
    "selection": "other choices from the same candidates",
    "output": "files of another length",
    "output.mode": "whether rounds hold pictures; earlier ones stay as they are",
}
"""By field, or by section for its other fields."""
LEFT_OUT = {"embed.exact_pixels": True}
"""What a round's recipe does not say where it is so: see `Recipe.of_round`."""


def changes_since(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """A line for each field that decides rounds and is another than the last round's."""
    before, now = (LEFT_OUT | dict(flat(fields)) for fields in (manifest.lineage["recipe"], recipe.of_round()))
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            was, becomes = (json.dumps(fields.get(name), ensure_ascii=False) for fields in (before, now))
            means = next(MEANS[key] for key in (name, name.partition(".")[0]) if key in MEANS)
            yield f"changed since round {manifest.round}: {name} {was} → {becomes}: {means}"
