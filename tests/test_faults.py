"""A store that fails: the same bytes, or one line that blames the store; never fewer rows, never the shard."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from curate import access
from curate.errors import StoreError, UserError
from curate.pipelines.round import run_round
from curate.pool.inventory import take_inventory
from curate.reader.curated import CuratedReader
from tests.small_round import OnS3, Stage, left, on_s3, recipe, run_stage, s3_stages, stages, told, world
from tests.stand_in import Blocks, without_ray

__all__ = ["on_s3", "s3_stages", "stages", "without_ray", "world"]

MODES = ("503", "403", "409", "drop", "drop-ack", "truncate")


def test_the_stand_in_writes_what_ray_writes(
    world: Path, stages: dict[str, Stage], tmp_path: Path, ray_local: None
) -> None:
    for stage in ("dedup", "round"):
        run_stage(stage, recipe(world, str(tmp_path / "root")), world)
        assert left(tmp_path / "root") == stages[stage].after


@pytest.mark.usefixtures("without_ray")
def test_actors_have_limits_of_restarts(world: Path, tmp_path: Path) -> None:
    """Without them Ray starts an actor again for ever, on a row that kills it."""
    run_stage("round", recipe(world, str(tmp_path / "root")), world)
    assert 1 <= Blocks.asked["max_restarts"] < 10
    assert 1 <= Blocks.asked["max_task_retries"] < 10
    assert Blocks.asked["memory"] > 2**30


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_store_that_fails_at_a_footer_is_not_blamed_on_the_shard(on_s3: OnS3, mode: str, method: str) -> None:
    """Not even where bad shards are to be skipped: a round with fewer rows would be committed, and nobody told."""
    section = on_s3.recipe("root").pool
    whole = take_inventory(section)
    fault = on_s3.proxy.fail(mode, method=method, key="pool/00001.parquet")
    try:
        found = take_inventory(section)
    except UserError as error:
        refusal = str(error)
        assert mode == "403"
        assert "the store answered 403" in refusal
        assert len(refusal.splitlines()) == 1
    else:
        assert found == whole
        assert mode != "403" or fault.seen == 0
    assert whole.rows == 96


@pytest.mark.usefixtures("without_ray")
def test_a_store_that_fails_while_a_shard_is_read_is_not_blamed_on_the_shard(on_s3: OnS3, monkeypatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 1.0)
    on_s3.run("round", "root")  # so that models and inventory are there
    on_s3.proxy.fail("503", method="GET", key="pool/00001.parquet", times=10**6)
    with pytest.raises(StoreError, match="the store gave no usable answer for 1 s"):
        run_round(on_s3.recipe("root"), base=on_s3.world, number=1)


class Short(io.BytesIO):
    """A file whose first answer is cut off, without a word."""

    cut = True

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        cut, Short.cut = Short.cut, False
        return data[: len(data) // 2] if cut else data


def test_a_read_that_comes_short_is_made_again(monkeypatch) -> None:
    content = bytes(range(200))
    fs = SimpleNamespace(open=lambda *_, **__: Short(content))
    monkeypatch.setattr(access, "filesystem", lambda url: (fs, url))
    monkeypatch.setattr(access, "PAUSES_S", (0.01, 0.1))
    with access.open_input("https://host/file") as file:
        assert file.read(150) == content[:150]
        assert file.read() == content[150:]


# --- at random -------------------------------------------------------------------------------------------------------


def read(on_s3: OnS3, prefix: str) -> Iterator[tuple[int, str]]:
    """Number and content of each batch that a reader hands out."""
    for batch in CuratedReader(f"s3://{on_s3.bucket}/{prefix}"):
        assert isinstance(batch.images, list)
        images = [image.tobytes() for image in batch.images]
        yield batch.number, hashlib.sha256(repr((batch.uids, batch.texts, images)).encode()).hexdigest()


def fail_at_random(s3_stages: OnS3, seed: int) -> Iterator[tuple[str, str]]:
    """Round, reader and trainer, each while requests fail by the seed; yields how each ended."""
    rng, prefix, proxy = np.random.default_rng(seed), f"random-{seed}", s3_stages.proxy
    batches = list(read(s3_stages, "before-train"))
    seen: list[tuple[int, str]] = []

    def disturbed(act: Callable[[], None], requests: int) -> str:
        for _ in range(int(rng.integers(1, 4))):
            mode, times = str(rng.choice(MODES)), int(rng.integers(1, 4))
            proxy.fail(mode, method="", skip=int(rng.integers(0, requests)), times=times)
        ended = told(act)
        proxy.mend()
        return ended

    def read_all() -> None:
        for batch in read(s3_stages, prefix):
            seen.append(batch)

    yield "round", disturbed(lambda: s3_stages.run("round", prefix), 250)
    s3_stages.run("round", prefix)
    assert s3_stages.left(prefix) == s3_stages.after["round"]
    yield "reader", (ended := disturbed(read_all, 12))
    assert seen == (batches if ended == "done" else batches[: len(seen)])
    yield "trainer", disturbed(lambda: s3_stages.run("train", prefix), len(s3_stages.methods["train"]))
    s3_stages.run("train", prefix)
    assert s3_stages.left(prefix) == s3_stages.after["train"]
    s3_stages.delete(prefix)


def test_a_round_whose_store_fails_at_random(s3_stages: OnS3, monkeypatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 10.0)
    assert [who for who, _ in fail_at_random(s3_stages, 0)] == ["round", "reader", "trainer"]


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_two_hundred_rounds_whose_store_fails_at_random(s3_stages: OnS3, monkeypatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 10.0)
    outcomes = Counter(ended for seed in range(200) for ended in fail_at_random(s3_stages, seed))
    for (who, ended), times in sorted(outcomes.items()):
        print(f"{who:8}{ended:6}{times:6}")
    assert min(outcomes["round", ended] for ended in ("done", "told")) > 20
    assert min(outcomes[who, "told"] for who in ("reader", "trainer")) > 10
