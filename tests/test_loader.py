"""Processes that decode: the same bytes as threads, whatever their number; rows that kill or hang one are named."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import curate.embed.loader
import curate.embed.run
from curate.embed.decode import DECODE_TIMEOUT, WORKER_CRASH
from curate.embed.files import read_embeddings
from curate.embed.loader import Inline, Loader, Processes, Threads, processes_that_fit
from curate.embed.pieces import Failed, Piece, Reading, Slice, cut_slices
from curate.embed.run import Embedder, embed_shard, reading_for
from curate.errors import ClusterError, ShardDamagedError
from curate.models.encoder import Encoder
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.recipe import EmbedSection, PoolSection
from curate.storage import Store
from tests.helpers import damage_page, drawn_pool
from tests.hostile import Hostile

torch.set_num_threads(1)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    drawn_pool(tmp_path / "pool", rows=240, shards=3, broken_share=0.2, duplicate_share=0.1)
    for path in sorted((tmp_path / "pool").iterdir()):
        pq.write_table(pq.read_table(path), path, row_group_size=17)
    return take_inventory(PoolSection(path=str(tmp_path / "pool"), uid="key"))


def with_sizes(pool: Pool, sizes: dict[tuple[int, int], tuple[int, int]]) -> Pool:
    """The pool with other pictures at (shard, row)."""
    from io import BytesIO

    for (number, row), size in sizes.items():
        path = Path(pool.shards[number].path)
        table = pq.read_table(path)
        out = BytesIO()
        PIL.Image.new("RGB", size, (9, 99, 200)).save(out, "PNG")
        at = table.schema.get_field_index("jpg")
        images = table["jpg"].to_pylist()
        images[row] = out.getvalue()
        table = table.set_column(at, table.schema.field(at), pa.array(images, table.schema.field(at).type))
        at = table.schema.get_field_index("caption")
        captions = table["caption"].to_pylist()
        captions[row] = "odd"
        table = table.set_column(at, table.schema.field(at), pa.array(captions, table.schema.field(at).type))
        pq.write_table(table, path, row_group_size=17)
    return take_inventory(PoolSection(path=str(Path(pool.shards[0].path).parent), uid="key"))


def test_processes_and_threads_write_the_same_bytes(store: Store, pool: Pool, encoder: Encoder) -> None:
    settings = EmbedSection(batch_size=9, chunk_rows=20)
    found: dict[str, list[bytes]] = {}
    for how in ({"threads": 1}, {"threads": 3}, {"loaders": 1}, {"loaders": 2}):
        name = "-".join(map(str, next(iter(how.items()))))
        embedder = Embedder({"x": encoder}, settings, **how)
        tallies = [embedder.embed(shard, {"x": f"{name}/{shard.index}"}, store) for shard in pool.shards]
        embedder.close()
        assert [sum(tally.values()) for tally in tallies] == [80, 80, 80]
        found[name] = [store.read_bytes(f"{name}/{shard.index}") for shard in pool.shards]
    first, *others = [[hashlib.sha256(data).hexdigest() for data in files] for files in found.values()]
    assert others == [first] * 3


def test_rows_that_kill_or_hang_a_process_cost_themselves(store: Store, pool: Pool, encoder: Encoder) -> None:
    pool = with_sizes(pool, {(0, 30): (99, 32), (2, 79): (98, 32)})
    encoder.crop = Hostile()  # type: ignore[assignment]
    reading = reading_for({"x": encoder})
    loader = Processes(reading, processes=2, piece_bytes=9 * 3 * 32 * 32, deadline_s=3)
    settings = EmbedSection(batch_size=9, chunk_rows=20)
    embedder = Embedder({"x": encoder}, settings, loader=loader)
    sound = [pq.read_table(shard.path)["broken"].to_pylist() for shard in pool.shards]
    for shard in pool.shards:
        embedder.embed(shard, {"x": f"x/{shard.index}"}, store)
    embedder.close()
    for shard, broken in zip(pool.shards, sound, strict=True):
        table = read_embeddings(store, f"x/{shard.index}", ["status", "error"])
        expected = [status or "ok" for status in broken]
        if shard.index == 0:
            expected[30] = WORKER_CRASH
            assert table["error"][30].as_py() == "a decoder ended with exit status -6"
        if shard.index == 2:
            expected[79] = DECODE_TIMEOUT
            assert table["error"][79].as_py() == "a decoder was still at it after 3 s"
        assert table["status"].to_pylist() == expected


def test_what_ends_the_processes_whatever_they_decode_is_told(
    store: Store, pool: Pool, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curate.embed.loader, "TRIES", 0)
    encoder.crop = Hostile()  # type: ignore[assignment]
    pool = with_sizes(pool, {(0, 3): (99, 32)})
    loader = Processes(reading_for({"x": encoder}), processes=1, piece_bytes=80 * 3 * 32 * 32)
    embedder = Embedder({"x": encoder}, EmbedSection(batch_size=80), loader=loader)
    with pytest.raises(ClusterError, match=r"embed: decoding processes ended 0 times .* lower resources\.loaders"):
        embedder.embed(pool.shards[0], {"x": "x/0"}, store)
    with pytest.raises(ClusterError):  # nor is there anything to do for the next one
        embedder.embed(pool.shards[1], {"x": "x/1"}, store)
    embedder.close()
    assert store.list("x") == []


def test_damage_is_told_in_the_same_words_by_whoever_meets_it(store: Store, pool: Pool, encoder: Encoder) -> None:
    damage_page(Path(pool.shards[1].path), "jpg", 3)
    pool = take_inventory(PoolSection(path=str(Path(pool.shards[0].path).parent), uid="key"))
    said = set()
    for how in ({"threads": 1}, {"threads": 2}, {"loaders": 2}):
        with pytest.raises(ShardDamagedError) as caught:
            embed_shard(pool.shards[1], {"x": encoder}, store, EmbedSection(batch_size=9, chunk_rows=9), **how)
        said.add((str(caught.value), caught.value.found))
    assert len(said) == 1
    assert "in column 'jpg' after row 45" in next(iter(said))[0]
    assert store.list("x") == []


def slices_of(pool: Pool, piece_rows: int, encoders: tuple[str, ...]) -> Iterator[Slice]:
    for shard in pool.shards:
        for start, stop in cut_slices([17] * 4 + [12], None, piece_rows=piece_rows, slice_rows=2 * piece_rows):
            yield Slice(
                job=shard.index,
                shard=shard,
                start=start,
                stop=stop,
                rows=None,
                piece_rows=piece_rows,
                encoders=encoders,
            )


@pytest.mark.parametrize("loader", [Inline, partial(Threads, threads=2, ahead=2)])
def test_pieces_are_those_of_a_plain_loop(pool: Pool, encoder: Encoder, loader: Callable[..., Loader]) -> None:
    """Whose pixels, tokens and rows are made one after the other."""
    from curate.pool.images import Dropped, clean_caption, decode_image

    reading = reading_for({"x": encoder})
    made = loader(reading, piece_bytes=9 * 3 * 32 * 32)
    asked = list(slices_of(pool, 9, ("x",)))
    for some in asked:
        made.submit(some)
    expected = {}
    for shard in pool.shards:
        rows = pq.read_table(shard.path).to_pylist()
        for number, start in enumerate(range(0, 80, 9)):
            pixels, captions = [], []
            for row in rows[start : start + 9]:
                try:
                    captions.append(clean_caption(row["caption"]))
                    pixels.append(encoder.crop(decode_image(row["jpg"])))
                except Dropped:
                    del captions[len(pixels) :]
            expected[shard.index, number] = (rows[start : start + 9], pixels, captions)
    for _ in range(len(expected)):
        piece = made.next()
        assert isinstance(piece, Piece)
        rows, pixels, captions = expected.pop((piece.job, piece.number))
        assert piece.table()["uid"].to_pylist() == [row["key"] for row in rows]
        assert piece.ok == len(pixels)
        assert np.array_equal(piece.pixels[encoder.view].numpy(), np.stack(pixels))
        texts = piece.texts[encoder.wording]
        assert texts[piece.of].equal(encoder.tokenize(captions))
        assert len(texts) == len(set(captions))
        piece.let_go()
    made.close()
    assert made.next() is None


@pytest.mark.parametrize("kind", [Inline, Threads])
def test_a_slice_that_cannot_be_read_says_so_and_the_next_is_read(
    pool: Pool, encoder: Encoder, kind: type[Inline] | type[Threads]
) -> None:
    Path(pool.shards[0].path).unlink()
    loader = kind(reading_for({"x": encoder}), piece_bytes=80 * 3 * 32 * 32)
    for some in list(slices_of(pool, 80, ("x",)))[:2]:
        loader.submit(some)
    failed, piece = loader.next(), loader.next()
    assert isinstance(failed, Failed)
    assert failed.job == 0
    assert isinstance(piece, Piece)
    assert piece.job == 1
    loader.close()


def test_how_long_the_models_waited_is_known(
    store: Store, pool: Pool, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves by what is done alone: a piece is a second on its way and three at the models."""
    clock = [0.0]

    class Slow(Inline):
        calls = 0

        def next(self) -> Piece | Failed | None:
            self.calls += 1
            found = super().next()
            clock[0] += 1
            return found

    encode = encoder.encode

    def slowly(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clock[0] += 3
        return encode(*args)

    monkeypatch.setattr(curate.embed.run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(encoder, "encode", slowly)
    loader = Slow(reading_for({"x": encoder}), piece_bytes=16 * 3 * 32 * 32)
    embedder = Embedder({"x": encoder}, EmbedSection(batch_size=16, chunk_rows=16), loader=loader)
    for number, shard in enumerate(pool.shards):  # of 80 rows, which are five pieces
        while loader.calls <= 5 * number:  # what came before is still being noted
            time.sleep(0.001)
        clock[0] += 1000  # in which nobody wants anything
        embedder.embed(shard, {"x": f"{number}"}, store)
    embedder.close()
    assert embedder.spent() == (3 * 15, 15)
    assert embedder.spent() == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_slices_hold_every_row_once_and_begin_where_pieces_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(50):
        groups = rng.integers(0, 400, rng.integers(1, 8)).tolist()
        rows = np.flatnonzero(rng.random(sum(groups)) < rng.random()) if rng.random() < 0.5 else None
        wanted = sum(groups) if rows is None else len(rows)
        piece_rows, slice_rows = int(rng.integers(1, 60)), int(rng.integers(1, 200))
        cuts = cut_slices(groups, rows, piece_rows=piece_rows, slice_rows=slice_rows)
        assert [row for start, stop in cuts for row in range(start, stop)] == list(range(wanted))
        assert all(start % piece_rows == 0 for start, _ in cuts)
        assert all(stop - start >= min(slice_rows, wanted) for start, stop in cuts[:-1])


def test_processes_have_room_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2**26  # of a container that nobody gave more
    monkeypatch.setattr(curate.embed.loader.shutil, "disk_usage", lambda _: Free(free))
    assert processes_that_fit(14, 256 * 3 * 224**2, ahead=2) == 0
    assert processes_that_fit(14, 2**20, ahead=2) == 12
    assert processes_that_fit(8, 2**20, ahead=2) == 8
    monkeypatch.setattr(curate.embed.loader, "SHARED_MEMORY", str(tmp_path / "none"))
    assert processes_that_fit(14, 256 * 3 * 224**2, ahead=2) == 14


@dataclass
class Free:
    free: int


def test_what_reading_needs_goes_to_other_processes(encoder: Encoder) -> None:
    import pickle

    reading = reading_for({"x": encoder})
    again: Reading = pickle.loads(pickle.dumps(reading))
    assert again.views == reading.views
    assert again.tokenizers[encoder.wording](["a red ring"]).equal(encoder.tokenize(["a red ring"]))
