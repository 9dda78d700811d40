"""The trainer's side: exactly the batches that were chosen, on any number of ranks, resumed anywhere."""

import io
import json
import multiprocessing
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import curate.reader.curated
import curate.rounds.stream
from curate import CuratedReader
from curate.errors import StreamStalledError, UserError
from curate.jobs.drawn_pool import draw_pair
from curate.pool.shards import Pool
from curate.reader.curated import Batch
from curate.reader.pieces import Joined
from curate.rounds.manifest import Manifest, manifest_name, read_manifest, round_folder
from curate.rounds.stream import end_stream, stream_end
from curate.storage import Store
from tests.helpers import commit_round, commit_rounds, drawn_pool, write_pool

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(60)

ROUNDS, SUB_BATCHES, SIZE = 3, 5, 12
TOTAL = ROUNDS * SUB_BATCHES


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return drawn_pool(tmp_path_factory.mktemp("reader") / "pool", rows=90, shards=3, image_size=16)


@pytest.fixture(scope="module")
def committed(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[str]]]:
    """A root of three rounds of five sub-batches of twelve rows, not to be changed; the uids of each batch."""
    root = str(tmp_path_factory.mktemp("reader") / "root")
    chosen = commit_rounds(Store(root), pool, rounds=ROUNDS, sub_batches=SUB_BATCHES, b=SIZE)
    return root, [[f"{shard:05d}{row:04d}" for shard, row in batch] for batch in chosen]


@pytest.fixture
def copied(committed: tuple[str, list[list[str]]], tmp_path: Path) -> str:
    """The same root, to be changed."""
    shutil.copytree(committed[0], tmp_path / "root")
    return str(tmp_path / "root")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate.rounds.stream, "FIRST_WAIT_S", 0.01)


def refusal(what: Callable[[], Any]) -> str:
    # Not pytest.raises, whose cycle of references would leave the workers to the garbage collector: 5 s each.
    try:
        what()
    except UserError as error:
        (line,) = error.lines
        assert "\n" not in line
        return line
    pytest.fail("nothing was refused")


def uids(batches: list[Batch]) -> list[list[str]]:
    return [batch.uids for batch in batches]


# --- one rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_batch_as_it_was_chosen_in_the_order_drawn(committed, pool: Pool, workers: int):
    root, chosen = committed
    batches = list(CuratedReader(root, workers=workers))
    assert uids(batches) == chosen
    assert [batch.number for batch in batches] == list(range(TOTAL))
    assert [(batch.round, batch.sub_batch) for batch in batches] == [divmod(i, SUB_BATCHES) for i in range(TOTAL)]
    source = {row["key"]: row for shard in pool.shards for row in pq.read_table(shard.path).to_pylist()}
    for batch in batches:
        assert batch.texts == [source[uid]["caption"] for uid in batch.uids]
        for picture, uid in zip(batch.images, batch.uids, strict=True):
            assert picture.tobytes() == Image.open(io.BytesIO(source[uid]["jpg"])).convert("RGB").tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_tensors_with_open_clips_transform_and_tokenizer(committed, workers: int):
    root, chosen = committed
    preprocess = open_clip.image_transform(16, is_train=False)
    tokenize = open_clip.tokenizer.SimpleTokenizer(context_length=20)
    plain = list(CuratedReader(root))
    batches = list(CuratedReader(root, preprocess=preprocess, tokenize=tokenize, workers=workers))
    assert uids(batches) == chosen
    for batch, pictures in zip(batches, plain, strict=True):
        assert batch.images.shape == (SIZE, 3, 16, 16)
        assert batch.images.equal(torch.stack([preprocess(picture) for picture in pictures.images]))
        assert batch.texts.equal(tokenize(pictures.texts))


def test_an_image_column_of_hugging_face(tmp_path: Path):
    import pyarrow as pa

    pairs = [draw_pair(0, row, image_size=16) for row in range(6)]
    table = pa.table({"image": [{"bytes": jpg, "path": None} for jpg, _ in pairs], "caption": [c for _, c in pairs]})
    store = Store(str(tmp_path / "root"))
    commit_round(store, write_pool(tmp_path / "pool", table), [[(0, 5), (0, 2)], [(0, 0), (0, 1)]], number=0)
    batches = list(CuratedReader(store.url))
    assert [batch.texts for batch in batches] == [[pairs[5][1], pairs[2][1]], [pairs[0][1], pairs[1][1]]]
    assert batches[0].images[1].tobytes() == Image.open(io.BytesIO(pairs[2][0])).tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_over_s3(s3_root: str, tmp_path: Path, workers: int):
    chosen = commit_rounds(Store(s3_root), drawn_pool(tmp_path / "pool", rows=24), rounds=2, sub_batches=2, b=6)
    reader = CuratedReader(s3_root, rank=1, world_size=2, workers=workers, verify=True)
    assert uids(list(reader)) == [[f"{s:05d}{row:04d}" for s, row in batch[3:]] for batch in chosen]
    assert multiprocessing.active_children() == []  # s3fs keeps frames alive; what they hold must be gone all the same


# --- several ranks -----------------------------------------------------------------------------------------------


def read_together(root: str, world_size: int, state: dict[str, int], count: int) -> tuple[list[list[Batch]], dict]:
    """`count` batches on each of so many ranks; all ranks must end in the same state."""
    found, states = [], []
    for rank in range(world_size):
        reader = CuratedReader(root, rank=rank, world_size=world_size)
        reader.load_state_dict(state)
        batches = iter(reader)
        found.append([next(batches) for _ in range(count)])
        states.append(reader.state_dict())
    assert all(s == states[0] for s in states)
    return found, states[0]


def test_two_ranks_then_three_read_what_one_rank_reads(committed):
    root, chosen = committed
    first, state = read_together(root, 2, {"next_batch": 0}, 7)
    assert state == {"next_batch": 7}
    second, state = read_together(root, 3, json.loads(json.dumps(state)), TOTAL - 7)
    assert state == {"next_batch": TOTAL}
    together = []
    for ranks in (first, second):
        for slices in zip(*ranks, strict=True):
            assert len({s.number for s in slices}) == 1
            assert len({len(s.uids) for s in slices}) == 1  # gathers want equal sizes
            together.append(list(chain(*(s.uids for s in slices))))
    assert together == chosen
    assert Counter(chain(*together)) == Counter(chain(*chosen))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_slices_of_all_ranks_make_up_each_batch(committed, world_size: int):
    root, chosen = committed
    ranks = [uids(list(CuratedReader(root, rank=rank, world_size=world_size))) for rank in range(world_size)]
    assert [list(chain(*slices)) for slices in zip(*ranks, strict=True)] == chosen


@pytest.mark.parametrize(("b", "world_size"), [(384, 1), (384, 2), (384, 3), (384, 6), (127, 1)])
def test_a_rank_reads_its_own_row_groups_only(tmp_path: Path, monkeypatch, b: int, world_size: int):
    pool = drawn_pool(tmp_path / "pool", rows=2 * b)
    store = Store(str(tmp_path / "root"))
    chosen = commit_rounds(store, pool, rounds=1, sub_batches=2, b=b)
    read_groups: list[int] = []
    read_bytes = [0]
    read_row_groups = pq.ParquetFile.read_row_groups

    def counting(self: pq.ParquetFile, groups: range, columns: list[str]) -> Any:
        read_groups.extend(groups)
        return read_row_groups(self, groups, columns=columns)

    class Counted(io.RawIOBase):
        def __init__(self, file: Any) -> None:
            self.file = file

        def read(self, size: int = -1) -> bytes:
            data = self.file.read(size)
            read_bytes[0] += len(data)
            return data

        def seek(self, *where: int) -> int:
            return self.file.seek(*where)

        def tell(self) -> int:
            return self.file.tell()

        def seekable(self) -> bool:
            return True

        def readable(self) -> bool:
            return True

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counting)
    monkeypatch.setattr(Store, "open_for_arrow", lambda self, name: Counted(self.open_input(name)))
    (file,) = read_manifest(store, 0)[0].files
    for rank in range(world_size):
        read_groups.clear()
        read_bytes[0] = 0
        batches = list(CuratedReader(store.url, rank=rank, world_size=world_size))
        share = b // world_size
        mine = [batch[rank * share : (rank + 1) * share] for batch in chosen]
        assert uids(batches) == [[f"{s:05d}{row:04d}" for s, row in batch] for batch in mine]
        groups = 6 if b == 384 else 2  # of a sub-batch: 64 rows each, or 64 and 63
        per_rank = groups // world_size
        expected = [sub * groups + rank * per_rank + i for sub in range(2) for i in range(per_rank)]
        assert read_groups == expected
        # Once pyarrow reads the last 64 KiB, where the footer is.
        assert file.size / world_size / 2 < read_bytes[0] < 1.1 * file.size / world_size + 2**16


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 3)])
def test_large_batches_are_read_in_pieces(tmp_path: Path, monkeypatch, workers: int, world_size: int):
    b = 768  # row groups of 96, and so pieces of 192
    store = Store(str(tmp_path / "root"))
    chosen = commit_rounds(
        store, drawn_pool(tmp_path / "pool", rows=2 * b, image_size=16), rounds=1, sub_batches=2, b=b
    )
    handed: list[int] = []
    join = Joined.add
    monkeypatch.setattr(Joined, "add", lambda self, piece: handed.append(len(piece)) or join(self, piece))

    def mean_of(picture: Image.Image) -> torch.Tensor:
        return torch.tensor([float(sum(picture.tobytes()))])

    def length_of(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[len(caption)] for caption in captions])

    for rank in range(world_size):
        where = {"rank": rank, "world_size": world_size, "workers": workers}
        plain, batches = (
            list(CuratedReader(store.url, **where, **how))
            for how in ({}, {"preprocess": mean_of, "tokenize": length_of})
        )
        share = b // world_size
        mine = [batch[rank * share : (rank + 1) * share] for batch in chosen]
        assert uids(batches) == uids(plain) == [[f"{s:05d}{row:04d}" for s, row in batch] for batch in mine]
        assert [(batch.number, batch.last) for batch in batches] == [(0, False), (1, True)]
        for batch, pictures in zip(batches, plain, strict=True):
            assert batch.images.equal(torch.stack([mean_of(picture) for picture in pictures.images]))
            assert batch.texts.equal(length_of(pictures.texts))
    assert max(handed) == 192


def test_a_reader_that_is_left_stops_in_the_middle_of_a_batch(tmp_path: Path):
    b = 768
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=2 * b, image_size=16), rounds=1, sub_batches=2, b=b)
    batches = iter(CuratedReader(store.url, workers=1))
    assert next(batches).number == 0
    batches.close()
    assert multiprocessing.active_children() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


def test_captions_of_different_lengths(tmp_path: Path):
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, drawn_pool(tmp_path / "pool", rows=768, image_size=16), rounds=1, sub_batches=1, b=768)
    calls: list[int] = []

    def longest(captions: list[str]) -> torch.Tensor:
        calls.append(1)
        return torch.zeros(len(captions), len(calls))

    line = refusal(lambda: list(CuratedReader(store.url, tokenize=longest)))
    assert "expected rows of one shape, found [1] and [2]; crop to one size and pad to one length" in line


# --- the state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_one_integer_resumes_after_every_step(committed, workers: int):
    root, chosen = committed
    steps = range(TOTAL + 1) if workers == 0 else (1, 5, 8, 14)
    for step in steps:
        first = CuratedReader(root, workers=workers)
        before = []
        if step:
            for batch in first:
                before.append(batch)
                if len(before) == step:
                    break
        state = pickle.loads(pickle.dumps(first.state_dict()))
        assert state == {"next_batch": step}
        second = CuratedReader(root, workers=workers)
        second.load_state_dict(state)
        assert uids(before) + uids(list(second)) == chosen
        assert second.state_dict() == {"next_batch": TOTAL}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_reader_may_be_set_back_or_go_on(committed, workers: int):
    root, chosen = committed
    reader = CuratedReader(root, workers=workers)
    batches = iter(reader)
    assert uids([next(batches) for _ in range(8)]) == chosen[:8]
    assert reader.state_dict() == {"next_batch": 8}  # whatever the workers have read ahead
    reader.load_state_dict({"next_batch": 2})
    assert uids(list(reader)) == chosen[2:]
    assert list(reader) == []
    reader.load_state_dict({"next_batch": 14})
    assert uids(list(reader)) == chosen[14:]


def test_files_of_rounds_gone_by_are_not_needed(copied: str, committed):
    shutil.rmtree(Path(copied) / round_folder(0) / "steps", ignore_errors=True)
    for path in (Path(copied) / round_folder(0)).glob("*.parquet"):
        path.unlink()
    reader = CuratedReader(copied, verify=True)
    reader.load_state_dict({"next_batch": 5})
    assert uids(list(reader)) == committed[1][5:]


def test_a_state_beyond_the_end(committed):
    reader = CuratedReader(committed[0])
    reader.load_state_dict({"next_batch": TOTAL + 1})
    line = refusal(lambda: list(reader))
    assert f"batch {TOTAL + 1} is next" in line
    assert f"only {TOTAL}" in line


@pytest.mark.parametrize("state", [{}, {"next_batch": -1}, {"next_batch": "3"}, {"next_batch": None}, {"epoch": 1}])
def test_a_state_that_is_none(committed, state: Any):
    assert "{'next_batch': n}" in refusal(lambda: CuratedReader(committed[0]).load_state_dict(state))


# --- following ---------------------------------------------------------------------------------------------------


@pytest.fixture
def publisher() -> Iterator[Callable[..., None]]:
    """Runs something a little later, in a thread."""
    threads = []

    def later(what: Callable[[], Any], after_s: float = 0.1) -> None:
        threads.append(threading.Timer(after_s, what))
        threads[-1].start()

    yield later
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_follower_picks_up_what_is_published_later(tmp_path: Path, pool: Pool, publisher, workers: int):
    store = Store(str(tmp_path / "root"))
    places = [[(0, row) for row in range(start, start + 4)] for start in (0, 4, 8, 12)]
    reader = CuratedReader(store.url, follow=True, timeout_s=30, workers=workers)
    publisher(lambda: commit_round(store, pool, places[:2], number=0))
    batches = iter(reader)
    found = [next(batches), next(batches)]
    publisher(lambda: commit_round(store, pool, places[2:], number=1))
    found += [next(batches), next(batches)]
    assert uids(found) == [[f"{s:05d}{row:04d}" for s, row in batch] for batch in places]
    assert [batch.round for batch in found] == [0, 0, 1, 1]
    end_stream(store)
    assert next(batches, None) is None


def test_a_follower_checks_the_parent_of_what_is_published_later(tmp_path: Path, pool: Pool, publisher):
    store, other = Store(str(tmp_path / "root")), Store(str(tmp_path / "other"))
    mine, theirs = [[(0, row) for row in range(4)]], [[(1, row) for row in range(4)]]
    commit_round(store, pool, mine, number=0)
    commit_round(other, pool, theirs, number=0)
    commit_round(other, pool, theirs, number=1)

    def mix() -> None:
        for file in read_manifest(other, 1)[0].files:
            store.put_bytes(f"{round_folder(1)}/{file.name}", other.read_bytes(f"{round_folder(1)}/{file.name}"))
        store.put_bytes(manifest_name(1), other.read_bytes(manifest_name(1)))

    batches = iter(CuratedReader(store.url, follow=True, timeout_s=30))
    next(batches)
    publisher(mix)
    line = refusal(lambda: next(batches))
    assert line.startswith("rounds/r000001/manifest.json: its parent is ")
    assert read_manifest(store, 0)[1] in line


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_follower_says_when_nothing_came_for_so_long(tmp_path: Path, pool: Pool, rounds: int, monkeypatch):
    monkeypatch.setattr(curate.rounds.stream, "FIRST_WAIT_S", 0.25)
    store = Store(str(tmp_path / "root"))
    if rounds:
        commit_round(store, pool, [[(0, 0), (0, 1)]], number=0)
    start = time.monotonic()
    batches = iter(CuratedReader(store.url, follow=True, timeout_s=0.4))
    assert sum(1 for _ in islice(batches, rounds)) == rounds
    with pytest.raises(StreamStalledError, match=f"round {rounds} did not come within 0.4 s"):
        next(batches)
    assert 0.39 <= time.monotonic() - start < 30


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_follower_stops_where_the_stream_was_ended(root: str, pool: Pool, rounds: int):
    store = Store(root)
    for number in range(rounds):
        commit_round(store, pool, [[(0, 0), (0, 1)]], number=number)
    assert end_stream(store) == end_stream(store) == stream_end(store) == rounds
    assert len(list(CuratedReader(root, follow=True, timeout_s=30))) == rounds


def test_an_end_that_comes_while_a_follower_waits(tmp_path: Path, pool: Pool, publisher):
    store = Store(str(tmp_path / "root"))
    commit_round(store, pool, [[(0, 0), (0, 1)]], number=0)
    batches = iter(CuratedReader(store.url, follow=True, timeout_s=30))
    next(batches)
    publisher(lambda: end_stream(store))
    assert next(batches, None) is None


def test_rounds_behind_are_not_read_again(tmp_path: Path, pool: Pool, monkeypatch):
    store = Store(str(tmp_path / "root"))
    commit_rounds(store, pool, rounds=3, sub_batches=2, b=4)
    reader = CuratedReader(store.url)
    first = uids(list(reader))
    read: list[int] = []
    monkeypatch.setattr(curate.reader.curated, "read_manifest", lambda s, n: read.append(n) or read_manifest(s, n))
    assert list(reader) == []
    assert read == [3]
    reader.load_state_dict({"next_batch": 3})
    assert uids(list(reader)) == first[3:]
    assert read == [3, 1, 2, 3]


def test_a_follower_waits_for_all_of_its_time(tmp_path: Path, pool: Pool, publisher, monkeypatch):
    monkeypatch.setattr(curate.rounds.stream, "FIRST_WAIT_S", 0.3)
    store = Store(str(tmp_path / "root"))
    manifest = commit_round(store, pool, [[(0, 0), (0, 1)]], number=0)
    store.local_path(manifest_name(0)).unlink()
    publisher(lambda: store.put_bytes(manifest_name(0), manifest.to_bytes()), 0.4)
    # Looked for at 0, at 0.3 and, rather than at 0.9, at the end.
    batches = iter(CuratedReader(store.url, follow=True, timeout_s=0.8))
    assert next(batches).round == 0


def test_a_round_that_is_not_committed_is_not_there(copied: str, committed):
    (Path(copied) / manifest_name(2)).unlink()
    assert uids(list(CuratedReader(copied))) == committed[1][:10]


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_root_without_rounds(tmp_path: Path):
    for root in (tmp_path / "nothing", tmp_path):
        line = refusal(lambda root=root: list(CuratedReader(str(root))))
        assert line == f"{root}: expected a committed round, found none; run: curate round RECIPE"


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_none(committed, rank: int, world_size: int):
    line = refusal(lambda: CuratedReader(committed[0], rank=rank, world_size=world_size))
    assert f"rank = {rank}" in line
    assert f"world_size = {world_size}" in line


def test_ranks_that_do_not_divide_the_batch(committed):
    line = refusal(lambda: list(CuratedReader(committed[0], rank=4, world_size=5)))
    assert "12 pairs per batch do not divide over 5 ranks; use a divisor of 12" in line


def test_another_batch_size(committed):
    line = refusal(lambda: list(CuratedReader(committed[0], batch_size=6)))
    assert "its batches hold 12 pairs and were chosen as wholes, the trainer asked for 6" in line
    assert "sub_batch_size = 6" in line
    assert len(list(CuratedReader(committed[0], batch_size=12))) == TOTAL


def first_file(root: str, number: int = 1) -> Path:
    manifest, _ = read_manifest(Store(root), number)
    return Path(root) / round_folder(number) / manifest.files[0].name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_file(copied: str, workers: int):
    path = first_file(copied)
    size = path.stat().st_size
    path.unlink()
    batches = iter(CuratedReader(copied, workers=workers))
    for _ in range(SUB_BATCHES):
        next(batches)
    line = refusal(lambda: next(batches))
    assert line == f"rounds/r000001/{path.name}: expected {size} bytes, found None; restore the file"


def test_a_file_of_another_size(copied: str):
    path = first_file(copied)
    path.write_bytes(path.read_bytes()[:-1])
    assert "expected" in refusal(lambda: list(CuratedReader(copied)))


def test_a_file_that_vanishes_while_it_is_read(copied: str):
    batches = iter(CuratedReader(copied))
    next(batches)
    first_file(copied, 0).unlink()
    line = refusal(lambda: next(batches))
    assert line.startswith(f"rounds/r000000/{first_file(copied, 0).name}: cannot be read at sub-batch 1")


def test_a_byte_that_flips_is_found_when_asked(copied: str, committed):
    path = first_file(copied)
    data = path.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(data), 12).tolist():
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 4]) + data[offset + 1 :])
        batches = iter(CuratedReader(copied, verify=True))
        for _ in range(SUB_BATCHES):
            next(batches)
        assert f"{path.name}: expected sha256" in refusal(lambda batches=batches: next(batches))
    path.write_bytes(data)
    assert uids(list(CuratedReader(copied, verify=True))) == committed[1]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_flipped_bit_ends_in_one_line_or_does_no_harm(copied: str, committed, workers: int):
    path = first_file(copied, 0)

    def content(batch: Batch) -> tuple[Any, ...]:
        return batch.uids, batch.texts, [image.tobytes() for image in batch.images]

    whole = [content(batch) for batch in islice(CuratedReader(copied), 2)]
    data = path.read_bytes()
    jpeg = data.index(b"\xff\xd8\xff")
    places = np.random.default_rng(1).integers(0, len(data), 60 if workers == 0 else 2).tolist()
    lines = 0
    for offset in [jpeg, len(data) - 6, len(data) - 1, *places]:
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        batches = iter(CuratedReader(copied, workers=workers))
        try:
            assert [content(next(batches)) for _ in range(2)] == whole
        except UserError as error:
            (line,) = error.lines
            assert "\n" not in line
            assert f"{path.name}: expected what was written there, found damage (" in line
            lines += 1
    assert lines >= 3


def test_rounds_of_two_roots(copied: str):
    manifest, _ = read_manifest(Store(copied), 0)
    other = replace(manifest, lineage={"another": "root"})
    (Path(copied) / manifest_name(0)).write_bytes(other.to_bytes())
    batches = iter(CuratedReader(copied))
    for _ in range(SUB_BATCHES):
        next(batches)
    line = refusal(lambda: next(batches))
    assert line.startswith("rounds/r000001/manifest.json: its parent is ")
    assert "two roots are mixed" in line


def test_a_manifest_that_is_none(copied: str):
    (Path(copied) / manifest_name(0)).write_bytes(b"{}")
    assert "expected a manifest" in refusal(lambda: list(CuratedReader(copied)))


def test_an_own_mistake_in_the_transform_keeps_its_traceback(committed):
    def wrong(_image: Image.Image) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        list(CuratedReader(committed[0], preprocess=wrong))


def test_a_round_may_have_another_batch_size(tmp_path: Path, pool: Pool):
    store = Store(str(tmp_path / "root"))
    commit_round(store, pool, [[(0, row) for row in range(4)]], number=0)
    commit_round(store, pool, [[(1, row) for row in range(i, i + 6)] for i in (0, 6)], number=1)
    reader = CuratedReader(store.url, rank=1, world_size=2)
    assert [len(batch.uids) for batch in reader] == [2, 3, 3]
    assert isinstance(read_manifest(store, 1)[0], Manifest)
