"""`curate embeddings`: a reference's embeddings, out of one root and into another."""

from collections.abc import Iterator
from pathlib import Path

import loky
import torch

from curate.embed.layouts import Layout
from curate.embed.taking import take_shards
from curate.messages import counted
from curate.models.encoder import load_encoder
from curate.models.spec import EncoderSpec
from curate.pipelines import progress
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool, Shard
from curate.recipe import DeviceType, Recipe
from curate.rounds.plan import indices_of, known_inventory, store_reference
from curate.rounds.travel import RECORD, export_embeddings, import_embeddings, shards_of
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
        UserError: mistakes of the recipe; or as `import_embeddings`, `Layout` or `take_shards`.
    """
    store = Store(recipe.root)
    store.probe()
    device_type: DeviceType = "cuda" if torch.cuda.is_available() and recipe.resources.device != "cpu" else "cpu"
    pool = take_inventory(recipe.pool, known=known_inventory(store), indices=indices_of(store))
    encoder = store_reference(store, recipe, base=base, device_type=device_type)
    source = Store(folder)
    if source.exists(RECORD):
        taken = import_embeddings(source, store, pool, encoder)
        left = "of other names or sizes"
    else:
        taken = _by_pair(source, store, pool, encoder, device_type)
        left = "that could not be read, or not all of whose pairs were found"
    found = [there for _, there in progress.over(taken, len(pool.shards), title="import", unit="shard")]
    yield f"{store.url}: embeddings of {counted(sum(found), 'shard')} of {len(found):,} are in place"
    if missing := len(found) - sum(found):
        yield f"{counted(missing, 'shard')} {left}: the next round embeds these"


def _by_pair(
    source: Store, store: Store, pool: Pool, encoder: EncoderSpec, device_type: DeviceType
) -> Iterator[tuple[Shard, bool]]:
    """As `import_embeddings`, out of a folder that another tool left."""
    with store.local_scratch() as scratch:
        layout = Layout(source, scratch, columns=pool.columns, embed_dim=encoder.embed_dim)
        loaded = load_encoder(store, encoder, torch.device(device_type))
        yield from take_shards(layout, pool.shards, loaded, store, at_once=loky.cpu_count())
