"""`curate embeddings`: a reference's embeddings, out of one root and into another."""

from collections.abc import Iterator
from pathlib import Path

import torch

from curate.messages import counted
from curate.pipelines import progress
from curate.pool.inventory import take_inventory
from curate.recipe import DeviceType, Recipe
from curate.rounds.plan import indices_of, known_inventory, store_reference
from curate.rounds.travel import export_embeddings, import_embeddings, shards_of
from curate.storage import Store


def export_all(root: str, folder: str) -> Iterator[str]:
    """Export the embeddings of the newest round's reference; yields what was done.

    Raises:
        UserError: as `shards_of`.
    """
    store, target = Store(root), Store(folder)
    encoder, pool = shards_of(store)
    written = export_embeddings(store, target, pool, encoder)
    done = sum(1 for _ in progress.over(written, len(pool.shards), title="export", unit="shard"))
    way_in = f"curate embeddings import RECIPE {target.url}"
    yield f"{target.url}: embeddings of {counted(done, 'shard')}; elsewhere: {way_in}"


def import_all(recipe: Recipe, base: Path, folder: str) -> Iterator[str]:
    """Import embeddings into the root of a recipe; yields what was found and what is left to embed.

    Raises:
        UserError: mistakes of the recipe; or as `import_embeddings`.
    """
    store = Store(recipe.root)
    store.probe()
    device_type: DeviceType = "cuda" if torch.cuda.is_available() and recipe.resources.device != "cpu" else "cpu"
    pool = take_inventory(recipe.pool, known=known_inventory(store), indices=indices_of(store))
    encoder = store_reference(store, recipe, base=base, device_type=device_type)
    taken = import_embeddings(Store(folder), store, pool, encoder)
    found = [there for _, there in progress.over(taken, len(pool.shards), title="import", unit="shard")]
    yield f"{store.url}: embeddings of {counted(sum(found), 'shard')} of {len(found):,} are in place"
    if missing := len(found) - sum(found):
        yield f"{counted(missing, 'shard')} of other names or sizes: the next round embeds these"
