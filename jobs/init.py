"""`curate init`: a recipe for a pool, from what lies there; nothing is asked, and every choice says why it was made."""

import json
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
from pydantic.fields import FieldInfo

from curate.errors import UserError
from curate.messages import counted
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, read_batches
from curate.recipe import PoolSection, Recipe, SelectionSection
from jobs.check import Sample, sample_pool

UID_COLUMNS = ("uid", "key", "id")
"""By convention, as img2dataset and DataComp call them."""
UNIQUE_ROWS = 10_000
"""Rows of the first shard whose ids must differ for a column to be taken for one of ids."""
FILTER_RATIO: float = SelectionSection.model_fields["filter_ratio"].default
LEAST_SUPER_BATCHES, MOST_SUPER_BATCHES = 8, 500
"""A pool holds at least so many, or there is little to choose from; a round takes at most so many."""
LARGEST_BATCH = 32_768
"""The paper's."""

RECIPE = Template(
    """\
# Written by `curate init` for $rows in $shards, about $size each; $sound.
# Next: curate check $path    what a round would do, what it costs and what is wrong
root = "curation"  # $root

[pool]
path = $pool
image = $image
caption = $caption
$uid

# The fixed model that tells good pairs from bad ones: the better it is on what you want, the more selection gains.
# Without a pretrained one that knows your pictures, train one on pairs that you trust, for instance a clean part of the
# pool, with a recipe whose [train] has data = "pool" and steps = 5000:
#   curate train reference.toml --save-to reference      and then here: model = "local-dir:reference"
[reference]
model = "ViT-B-16-SigLIP"  # any model of open_clip, docs/models.md
pretrained = "webli"

# The model that is trained. It begins with random weights; pretrained = … begins with others.
[learner]
model = "ViT-B-16-SigLIP"

[selection]
sub_batch_size = $b  # $why_b
filter_ratio = $filter_ratio  # $about_filter_ratio
criterion = "auto"  # $about_criterion
$super_batches

# Near-duplicates leave as well: look at them first, with `curate dedup $path --sheet pairs.html`.
# [dedup]
# threshold = 0.95

[train]
# steps = 10000  # $about_steps
follow = "wait"  # $about_follow

# [evaluate]  # a held-out set, on which the learner is measured while it trains
# path = "…"

[schedule]
rounds = 10  # $about_rounds
"""
)


def write_recipe(pool: str, path: Path) -> list[str]:
    """Write a recipe for a pool.

    Args:
        pool: as `pool.path`.
        path: of the recipe, which must not be there.

    Returns:
        What was found and what to do next, a line each.

    Raises:
        UserError: there is a file of that name; or what `take_inventory` and a look at some rows find wrong.
    """
    if path.exists():
        raise UserError(f"{path}: expected no file, found one; remove it, or name another with --to")
    found = take_inventory(PoolSection(path=pool))
    if not found.rows:
        raise UserError(f"{pool}: expected rows, found none; name a folder with some")
    sample = sample_pool(found)
    if sample.dropped.total() == sample.rows:
        raise UserError(f"{pool}: expected pictures with captions, found that {sample}; mend the files")
    path.write_text(_recipe(pool, path, found, sample), encoding="utf-8")
    return [
        f"{path}: a recipe for {counted(found.rows, 'row')} in {counted(len(found.shards), 'shard')}; {sample}",
        f"next: look at its [reference], then curate check {path}",
    ]


def _recipe(path: str, to: Path, pool: Pool, sample: Sample) -> str:
    usable = round(pool.rows * (1 - sample.dropped.total() / sample.rows))
    b = batch_for(usable)
    super_batches = usable // round(b / (1 - FILTER_RATIO))
    uid = _uid(pool)
    return RECIPE.substitute(
        path=to,
        rows=counted(pool.rows, "row"),
        shards=counted(len(pool.shards), "shard"),
        size=f"{sum(shard.size for shard in pool.shards) / pool.rows / 1024:.1f} KiB",
        sound=sample,
        root=_about("root"),
        pool=json.dumps(path),
        image=json.dumps(pool.columns.image),
        caption=json.dumps(pool.columns.caption),
        uid=f"uid = {json.dumps(uid)}" if uid else f"# uid = …  # {_about('pool.uid')}",
        b=b,
        why_b=f"the pool holds {super_batches} times the 10 b of a super-batch; b is your trainer's global batch",
        filter_ratio=FILTER_RATIO,
        about_filter_ratio=_about("selection.filter_ratio"),
        about_criterion=_about("selection.criterion"),
        super_batches=("" if super_batches > MOST_SUPER_BATCHES else "# ")
        + f"super_batches = {MOST_SUPER_BATCHES}  # {_about('selection.super_batches')}",
        about_steps=_about("train.steps"),
        about_follow=_about("train.follow"),
        about_rounds=_about("schedule.rounds"),
    )


def batch_for(rows: int) -> int:
    """A power of two, of which a pool holds some super-batches; 16 at least."""
    b = LARGEST_BATCH
    while b > 16 and LEAST_SUPER_BATCHES * round(b / (1 - FILTER_RATIO)) > rows:
        b //= 2
    return b


def _uid(pool: Pool) -> str | None:
    """The column of ids, if there is one of a usual name whose values differ."""
    for name in UID_COLUMNS:
        if name not in pool.schema.names:
            continue
        kind = pool.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            continue
        shard = next(shard for shard in pool.shards if shard.rows)
        values = next(read_batches(shard, [name], batch_rows=UNIQUE_ROWS))[name]
        if not values.null_count and len(values.unique()) == len(values):
            return name
    return None


def _about(field: str) -> str:
    """What a recipe's field is for, as its declaration says."""
    sections: dict[str, FieldInfo] = Recipe.model_fields
    *outer, name = field.split(".")
    for section in outer:
        annotation: Any = sections[section].annotation
        sections = annotation.model_fields
    return str(sections[name].description)
