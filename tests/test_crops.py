"""Actors without a device that decode for one that has it: the same bytes, and nothing lost with one that dies."""

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from curate.embed.decode import WORKER_CRASH
from curate.embed.files import embedding_name, read_embeddings
from curate.embed.pieces import Piece, Slice
from curate.embed.run import Embedder, embed_shard, reading_for
from curate.errors import ShardDamagedError, UserError
from curate.models.encoder import Encoder
from curate.pipelines.cluster import CPUS
from curate.pipelines.crops import Croppers
from curate.pipelines.embed import embed_pool
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.recipe import EmbedSection, PoolSection, ResourcesSection
from curate.storage import Store
from tests.helpers import damage_page, drawn_pool
from tests.hostile import Hostile
from tests.test_loader import with_sizes

pytestmark = pytest.mark.usefixtures("ray_local")
torch.set_num_threads(1)
SIZES = EmbedSection(batch_size=9, chunk_rows=20)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return drawn_pool(tmp_path / "pool", rows=240, shards=3, broken_share=0.2, duplicate_share=0.1)


@pytest.fixture
def croppers(encoder: Encoder, request: pytest.FixtureRequest) -> Iterator[Croppers]:
    encoder.crop = getattr(request, "param", encoder.crop)
    found = Croppers(reading_for({"x": encoder}), 2, pin=False)
    yield found
    found.close()


def digests(store: Store, names: list[str]) -> list[str]:
    return [hashlib.sha256(store.read_bytes(name)).hexdigest() for name in names]


@pytest.mark.exhaustive  # of two runs of actors; what one writes is seen below
def test_the_step_writes_the_same_bytes_with_them(store: Store, pool: Pool, encoder: Encoder) -> None:
    names = [embedding_name(encoder.spec.sha, shard) for shard in pool.shards]
    embed_pool(store, pool, [encoder.spec], SIZES, ResourcesSection(workers=1), CPUS)
    without = digests(store, names)
    for name in names[1:]:
        store.delete(name)
    kept = store.local_path(names[0]).stat().st_ino
    embed_pool(store, pool, [encoder.spec], SIZES, ResourcesSection(workers=1, crop_actors=2), CPUS)
    assert digests(store, names) == without
    assert store.local_path(names[0]).stat().st_ino == kept  # what was done stays


@pytest.mark.exhaustive  # each row that kills starts an actor anew, which takes its time
@pytest.mark.parametrize("croppers", [Hostile()], indirect=True)
def test_a_row_that_kills_one_costs_itself(store: Store, pool: Pool, encoder: Encoder, croppers: Croppers) -> None:
    pool = with_sizes(pool, {(0, 30): (99, 32), (2, 79): (99, 32)})
    expected = [[row or "ok" for row in pq.read_table(shard.path)["broken"].to_pylist()] for shard in pool.shards]
    expected[0][30] = expected[2][79] = WORKER_CRASH
    embedder = Embedder({"x": encoder}, SIZES, loader=croppers)
    for shard, statuses in zip(pool.shards, expected, strict=True):
        embedder.embed(shard, {"x": f"x/{shard.index}"}, store)
        table = read_embeddings(store, f"x/{shard.index}", ["status", "error"])
        assert table["status"].to_pylist() == statuses
    assert table["error"][79].as_py() == "a decoder ended with exit status -6"
    embedder.close()


def test_they_write_the_same_bytes_and_tell_of_damage_in_the_same_words(
    store: Store, pool: Pool, encoder: Encoder, croppers: Croppers
) -> None:
    damage_page(Path(pool.shards[1].path), "jpg")
    pool = take_inventory(PoolSection(path=str(Path(pool.shards[0].path).parent), uid="key"))
    with pytest.raises(ShardDamagedError) as here:
        embed_shard(pool.shards[1], {"x": encoder}, store, SIZES)
    embedder = Embedder({"x": encoder}, SIZES, loader=croppers)
    with pytest.raises(ShardDamagedError) as there:
        embedder.embed(pool.shards[1], {"x": "x/1"}, store)
    assert str(there.value) == str(here.value)
    embedder.embed(pool.shards[0], {"x": "x/0"}, store)  # they go on
    assert store.list("x") == ["x/0"]
    embedder.close()
    embed_shard(pool.shards[0], {"y/0": encoder}, store, SIZES)
    assert store.read_bytes("x/0") == store.read_bytes("y/0")


def test_more_than_the_cluster_has_cpus_for_are_refused(store: Store, pool: Pool, encoder: Encoder) -> None:
    with pytest.raises(UserError) as caught:
        embed_pool(store, pool, [encoder.spec], SIZES, ResourcesSection(workers=2, crop_actors=4), CPUS)
    assert str(caught.value) == (
        "resources.crop_actors = 4: with 2 workers this needs 9.0 CPUs, the cluster has 3; lower it, or add nodes"
    )


def test_one_way_to_decode_is_enough() -> None:
    with pytest.raises(ValidationError, match="must be 0 where loaders = 2 decode; leave out one of the two"):
        ResourcesSection(loaders=2, crop_actors=1)
    assert ResourcesSection(loaders=0, crop_actors=1).crop_actors == 1


def test_a_piece_comes_out_of_memory_that_is_read_only(pool: Pool, encoder: Encoder) -> None:
    """As Ray's object store has it; torch would warn of it, and be right."""
    reading = reading_for({"x": encoder})
    some = Slice(job=0, shard=pool.shards[0], start=0, stop=9, rows=None, piece_rows=9, encoders=("x",))
    from curate.embed.decode import Watched

    (piece,) = [reading.piece(raw, Watched(reading.crops)) for raw in reading.raw(some)]
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(piece, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 10_000 < sum(memoryview(buffer).nbytes for buffer in buffers)  # pixels go beside it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found: Piece = pickle.loads(data, buffers=[memoryview(buffer).toreadonly() for buffer in buffers])
    assert found.table().equals(piece.table())
    assert np.array_equal(found.pixels[encoder.view], piece.pixels[encoder.view])
    assert found.texts[encoder.wording].equal(piece.texts[encoder.wording])
    assert found.of.equal(piece.of)
