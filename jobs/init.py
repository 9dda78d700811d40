"""`curate init`: a recipe for a pool, from what lies there; nothing is asked, and every choice says why it was made."""

import json
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from curate.errors import UserError
from curate.jobs.sample import Sample, sample_pool
from curate.messages import counted
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, read_batches
from curate.recipe import PoolSection, Recipe, SelectionSection

UID_COLUMNS = ("uid", "key", "id")
"""By convention, as img2dataset and DataComp call them."""
UNIQUE_ROWS, UNIQUE_SHARDS = 1_000, 8
"""Of each of some shards, whose ids must all differ for a column to be taken for one of ids."""
FILTER_RATIO: float = SelectionSection.model_fields["filter_ratio"].default
LEAST_SUPER_BATCHES, MOST_SUPER_BATCHES = 8, 500
"""A pool holds at least so many, or there is little to choose from; a round takes at most so many."""
LEAST_BATCH, LARGEST_BATCH = 16, 32_768
"""As many as there are chunks; the paper's."""

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


def write_recipe(pool: str, path: Path, *, image: str | None = None, caption: str | None = None) -> list[str]:
    """Write a recipe for a pool.

    Args:
        pool: as `pool.path`.
        path: of the recipe, which must not be there.
        image: column; found by convention if not given.
        caption: likewise.

    Returns:
        What was found and what to do next, a line each.

    Raises:
        UserError: there is a file of that name; or what `take_inventory` and a look at some rows find wrong.
    """
    if path.exists():
        raise UserError(f"{path}: expected no file, found one; remove it, or name another with --to")
    try:
        section = PoolSection(path=pool, image=image, caption=caption)
    except ValidationError as error:
        raise UserError(f"{pool!r}: expected a pool, found none ({error.errors()[0]['msg']}); name a folder") from None
    found = take_inventory(section)
    if not found.rows:
        raise UserError(f"{pool}: expected rows, found none; name a folder with some")
    sample = sample_pool(found)
    if sample.dropped.total() == sample.rows:
        raise UserError(f"{pool}: expected pictures with captions, found that {sample}; mend the files")
    least = _super_batch(LEAST_BATCH)
    if found.rows < least:
        raise UserError(f"{pool}: expected {least} rows to choose {LEAST_BATCH} from, found {found.rows}; add some")
    path.write_text(_recipe(pool, path, found, sample), encoding="utf-8")
    return [
        f"{path}: a recipe for {counted(found.rows, 'row')} in {counted(len(found.shards), 'shard')}; {sample}",
        f"next: look at its [reference], then curate check {path}",
    ]


def _recipe(path: str, to: Path, pool: Pool, sample: Sample) -> str:
    usable = round(pool.rows * (1 - sample.dropped.total() / sample.rows))
    b = batch_for(usable)
    super_batches = usable // _super_batch(b)
    uid = _uid(pool)
    return RECIPE.substitute(
        path=to,
        rows=counted(pool.rows, "row"),
        shards=counted(len(pool.shards), "shard"),
        size=f"{sum(shard.size for shard in pool.shards) / pool.rows / 1024:.1f} KiB",
        sound=sample,
        root=_about("root"),
        pool=_quoted(path),
        image=_quoted(pool.columns.paths or pool.columns.image),
        caption=_quoted(pool.columns.captions or pool.columns.caption),
        uid=f"uid = {_quoted(uid)}" if uid else f"# uid = …  # {_about('pool.uid')}",
        b=b,
        why_b=f"b, your trainer's global batch; the pool holds {super_batches} super-batches of 10 b",
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
    """A power of two, of which a pool holds some super-batches; `LEAST_BATCH` at least."""
    b = LARGEST_BATCH
    while b > LEAST_BATCH and LEAST_SUPER_BATCHES * _super_batch(b) > rows:
        b //= 2
    return b


def _super_batch(b: int) -> int:
    """B, with the defaults."""
    return SelectionSection(sub_batch_size=b).super_batch_size


def _uid(pool: Pool) -> str | None:
    """The column of ids, if one of a usual name has values that differ, as far as the heads of some shards tell."""
    full = [shard for shard in pool.shards if shard.rows]
    for name in UID_COLUMNS:
        if name not in pool.schema.names:
            continue
        kind = pool.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            continue
        values: list[Any] = []
        for shard in full[:: max(1, -(-len(full) // UNIQUE_SHARDS))]:
            batch = next(read_batches(shard, [name], batch_rows=UNIQUE_ROWS))
            values += batch[name].to_pylist() if name in batch.schema.names else [None]
        if None not in values and len(set(values)) == len(values):
            return name
    return None


def _quoted(text: str) -> str:
    """A TOML string; of JSON's it lacks pairs of surrogates alone."""
    return json.dumps(text, ensure_ascii=False)


def _about(field: str) -> str:
    """What a recipe's field is for, as its declaration says."""
    sections: dict[str, FieldInfo] = Recipe.model_fields
    *outer, name = field.split(".")
    for section in outer:
        annotation: Any = sections[section].annotation
        sections = annotation.model_fields
    return str(sections[name].description)
