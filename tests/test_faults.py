"""Every operation of a round on its root, failed in every way: the same bytes after a plain rerun, or one line."""

import contextlib
import hashlib
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from curate import access
from curate.errors import CurateError, StoreError, UserError
from curate.manifest import Manifest
from curate.pool import take_inventory
from curate.recipe import Recipe
from curate.storage import Store
from jobs.drawn_pool import draw_pool
from pipelines.round import run_round
from tests.faults import FaultProxy
from tests.helpers import write_tiny
from tests.stand_in import Blocks, without_ray

__all__ = ["without_ray"]

OPERATIONS = ("read_bytes", "size", "list", "open_input", "put_if_absent", "put_bytes", "put_file", "delete")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny(folder, "reference.json")
    write_tiny(folder, "learner.json", embed_dim=24)
    draw_pool(folder / "pool", rows=96, shards=2, seed=0, image_size=32, broken_share=0.05, duplicate_share=0.1)
    return folder


def recipe(world: Path, root: str) -> Recipe:
    return Recipe.model_validate(
        {
            "root": root,
            "pool": {"path": str(world / "pool"), "uid": "key"},
            "reference": {"model": "reference.json"},
            "learner": {"model": "learner.json"},
            "dedup": {"threshold": 0.9999},
            "selection": {
                "sub_batch_size": 4,
                "n_chunks": 2,
                "filter_ratio": 0.75,
                "super_batches": 1,
                "criterion": "learnability",
            },
        }
    )


def run(world: Path, root: str, number: int = 0, say: Callable[[str], None] = lambda line: None) -> Manifest:
    return run_round(recipe(world, root), base=world, number=number, say=say)


def published(root: str) -> dict[str, str]:
    """What a reader meets: manifests and curated files, by their hashes."""
    store = Store(root)
    names = [name for folder in store.list("rounds") for name in store.list(folder) if "steps-" not in name]
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A root with a round that nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run(world, str(root))
    return root, published(str(root))


@pytest.fixture(scope="module")
def two_rounds(world: Path, undisturbed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is published after the next round."""
    root = tmp_path_factory.mktemp("two") / "root"
    shutil.copytree(undisturbed[0], root)
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        run(world, str(root), 1)
    return published(str(root))


@pytest.mark.exhaustive
def test_the_stand_in_writes_what_ray_writes(world: Path, undisturbed, tmp_path: Path, ray_local: None) -> None:
    run(world, str(tmp_path / "root"))
    assert published(str(tmp_path / "root")) == undisturbed[1]


@pytest.mark.usefixtures("without_ray")
def test_actors_have_limits_of_restarts(world: Path, tmp_path: Path) -> None:
    """Without them Ray starts an actor again for ever, on a row that kills it."""
    run(world, str(tmp_path / "root"))
    assert 1 <= Blocks.asked["max_restarts"] < 10
    assert 1 <= Blocks.asked["max_task_retries"] < 10
    assert Blocks.asked["memory"] > 2**30


# --- a crash, or an error, at each operation -------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process were gone: nothing catches it."""


class Disturbed:
    """Counts the operations of a store and does something at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, how: str = "before") -> None:
        self.count = 0
        self.at, self.how = at, how
        for name in OPERATIONS:
            patch.setattr(Store, name, self._wrapped(getattr(Store, name)))

    def _wrapped(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            number = self.count
            self.count += 1
            if number != self.at:
                return act(*arguments, **named)
            match self.how:
                case "before":
                    raise Killed
                case "after":
                    act(*arguments, **named)
                    raise Killed
                case "full":
                    raise OSError(28, "No space left on device")
                case "fails":
                    raise StoreError("the store gave no usable answer")
            raise AssertionError(self.how)

        return wrapped


@pytest.fixture(scope="module")
def operations(world: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations a round has."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        counted = Disturbed(patch)
        run(world, str(tmp_path_factory.mktemp("counted") / "root"))
    return counted.count


def disturb_and_run_again(world: Path, root: str, at: int, how: str, expected: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        with pytest.MonkeyPatch.context() as inner:
            Disturbed(inner, at, how)
            with contextlib.suppress(Killed, OSError, StoreError):
                run(world, root)
        assert set(published(root).items()) <= set(expected.items()), (at, how)  # nothing else is ever seen
        run(world, root)
    assert published(root) == expected, (at, how)


HOWS = ("before", "after", "full", "fails")


def test_a_crash_or_an_error_at_some_operations(world: Path, undisturbed, operations: int, tmp_path: Path) -> None:
    assert operations > 50
    chosen = np.random.default_rng(0).permutation(operations)[:4].tolist()
    for at, how in [*itertools.product(chosen, ["after"]), *zip(chosen, itertools.cycle(HOWS), strict=False)]:
        disturb_and_run_again(world, str(tmp_path / f"{at}-{how}"), at, how, undisturbed[1])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", HOWS)
def test_a_crash_or_an_error_at_each_operation(
    world: Path, undisturbed, operations: int, tmp_path: Path, how: str
) -> None:
    for at in range(operations):
        disturb_and_run_again(world, str(tmp_path / f"{at}"), at, how, undisturbed[1])
        shutil.rmtree(tmp_path / f"{at}")


# --- a store that fails ----------------------------------------------------------------------------------------------

MODES = ("503", "403", "409", "drop", "drop-ack", "truncate")


@pytest.fixture
def s3_world(world: Path, faulty_s3_root: tuple[str, FaultProxy]) -> tuple[Path, str, FaultProxy]:
    """The same models, and the pool in the bucket where the root is, behind a proxy that fails on demand."""
    root, proxy = faulty_s3_root
    bucket = root.removeprefix("s3://").partition("/")[0]
    client = boto3.client("s3")
    for path in sorted((world / "pool").iterdir()):
        client.upload_file(str(path), bucket, f"pool/{path.name}")
    client.close()
    proxy.requests.clear()
    return world, root, proxy


def s3_recipe(world: Path, root: str, **pool: Any) -> Recipe:
    made = recipe(world, root)
    section = made.pool.model_copy(update={"path": f"{root.partition('/root')[0]}/pool", **pool})
    return made.model_copy(update={"pool": section})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_store_that_fails_at_a_footer_is_not_blamed_on_the_shard(s3_world, mode: str, method: str) -> None:
    """Not even where bad shards are to be skipped: a round with fewer rows would be committed, and nobody told."""
    world, root, proxy = s3_world
    section = s3_recipe(world, root, on_bad_shard="skip").pool
    whole = take_inventory(section)
    proxy.fail(mode, method=method, key="pool/00001.parquet")
    try:
        found = take_inventory(section)
    except UserError as error:
        refusal = str(error)
        assert mode == "403"
        assert "the store answered 403" in refusal
        assert len(refusal.splitlines()) == 1
    else:
        assert found == whole
        assert mode != "403" or proxy.faults[0].seen == 0
    assert whole.rows == 96


@pytest.mark.usefixtures("without_ray")
def test_a_store_that_fails_while_a_shard_is_read_is_not_blamed_on_the_shard(s3_world, monkeypatch) -> None:
    world, root, proxy = s3_world
    made = s3_recipe(world, root)
    monkeypatch.setattr(access, "DEADLINE_S", 1.0)
    run_round(made, base=world)  # so that models and inventory are there
    proxy.fail("503", method="GET", key="pool/00001.parquet", times=10**6)
    with pytest.raises(StoreError, match="the store gave no usable answer for 1 s"):
        run_round(made, base=world, number=1)


def fail_at_random(s3_world, seed: int, expected: set[str]) -> str:
    """A round, then one more run of it; each of its requests may fail, by the seed."""
    world, root, proxy = s3_world
    rng = np.random.default_rng(seed)
    made = s3_recipe(world, root, on_bad_shard="skip")
    for _ in range(int(rng.integers(1, 4))):
        mode, times = str(rng.choice(MODES)), int(rng.integers(1, 4))
        proxy.fail(mode, method="", skip=int(rng.integers(0, 250)), times=times)
    try:
        run_round(made, base=world, number=0)
        outcome = "same bytes"
    except CurateError as error:
        (line,) = set(str(error).splitlines())
        assert re.search(r"the store (answered|gave no usable)|no usable answer", line), line
        outcome = "told"
    proxy.faults.clear()
    run_round(made, base=world, number=0)
    assert curated(root) == expected
    return outcome


def curated(root: str) -> set[str]:
    """Names of curated files, which are hashes of their content; the manifest names the pool, which lies elsewhere."""
    return {name.rpartition("/")[2] for name in published(root) if "curated-" in name}


@pytest.fixture
def expected_on_s3(s3_world, without_ray: None) -> set[str]:
    world, root, _ = s3_world
    run_round(s3_recipe(world, f"{root}-undisturbed"), base=world)
    return curated(f"{root}-undisturbed")


def test_a_round_whose_store_fails_at_random(s3_world, expected_on_s3: set[str], monkeypatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 10.0)
    world, root, proxy = s3_world
    for seed in range(2):
        fail_at_random((world, f"{root}-{seed}", proxy), seed, expected_on_s3)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_two_hundred_rounds_whose_store_fails_at_random(s3_world, expected_on_s3: set[str], monkeypatch) -> None:
    monkeypatch.setattr(access, "DEADLINE_S", 10.0)
    world, root, proxy = s3_world
    outcomes = Counter(fail_at_random((world, f"{root}-{seed}", proxy), seed, expected_on_s3) for seed in range(200))
    print(outcomes)
    assert min(outcomes["same bytes"], outcomes["told"]) > 20


# --- damage ----------------------------------------------------------------------------------------------------------


def damages(data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """A file, damaged in each way."""
    yield "empty", b""
    yield "cut", data[: len(data) // 2]
    yield "zeros", data[: len(data) // 3] + b"\0" * min(64, len(data)) + data[len(data) // 3 + min(64, len(data)) :]
    for where, places in (("header", range(min(8, len(data)))), ("footer", range(max(0, len(data) - 200), len(data)))):
        yield where, flipped(data, int(rng.choice(places)), rng)
    for _ in range(5):
        yield "bit", flipped(data, int(rng.integers(len(data))), rng)


def flipped(data: bytes, place: int, rng: np.random.Generator) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]


def files_of(root: Path) -> list[Path]:
    """All that a round left, but models, whose own tests damage them."""
    return [path for path in sorted(root.rglob("*")) if path.is_file() and "models" not in path.parts]


def damage_and_finish(
    world: Path, whole: Path, root: Path, name: Path, data: bytes, expected: dict[str, str], number: int
) -> str:
    """Damage a file of a finished round; what becomes of it when that round is finished again, or the next one is run.

    Args:
        world: with pool and models.
        whole: the root with the finished round.
        root: to be made.
        name: of the file within it.
        data: what it holds now.
        expected: what is published in the end.
        number: of the round to run; 0 is the finished one, whose commit and accounts are taken away: it reads all anew.
    """
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    (root / name).write_bytes(data)
    if number == 0:
        for account in [root / "rounds/r000000/manifest.json", *root.glob("dedup/*/*/dedup.json")]:
            if account != root / name:
                account.unlink()
    said: list[str] = []
    try:
        run(world, str(root), number, say=said.append)
    except CurateError as error:
        (line,) = str(error).splitlines()
        assert name.name.rsplit("-", 1)[0] in line, (name, line)
        return "named"
    found = published(str(root))
    if number:  # a later round does not read what an earlier one published; readers do
        found[str(name)] = expected.get(str(name), "")
        expected = {str(name): ""} | expected
    assert found == expected, (name, "SILENT")
    return "made again" if any("made again" in line for line in said) else "harmless"


@pytest.mark.usefixtures("without_ray")
def test_some_damage_is_told_or_mended(world: Path, undisturbed, two_rounds, tmp_path: Path) -> None:
    whole, expected = undisturbed
    rng = np.random.default_rng(0)
    cases = [
        (path.relative_to(whole), data)
        for path in files_of(whole)
        for _, data in itertools.islice(damages(path.read_bytes(), rng), 3, None, 4)
    ]
    for i in rng.permutation(len(cases))[:12].tolist():
        number = i % 2 if cases[i][0].name != "manifest.json" else 1
        damage_and_finish(world, whole, tmp_path / "root", *cases[i], [expected, two_rounds][number], number)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("without_ray")
def test_all_damage_is_told_or_mended(world: Path, undisturbed, two_rounds, tmp_path: Path) -> None:
    """Prints a table: file, round that meets it, what became of it, how often."""
    whole, expected = undisturbed
    counts = Counter[tuple[str, int, str]]()
    for number, seed in itertools.product((0, 1), range(4)):
        rng = np.random.default_rng([number, seed])
        for path in files_of(whole):
            name = path.relative_to(whole)
            if number == 0 and name.name == "manifest.json":
                continue
            for _, data in damages(path.read_bytes(), rng):
                after = [expected, two_rounds][number]
                found = damage_and_finish(world, whole, tmp_path / "root", name, data, after, number)
                counts[f"{name.parts[0]}/{re.split('[-.]', name.name)[0]}", number, found] += 1
    for (kind, number, found), times in sorted(counts.items()):
        print(f"{kind:50} round {number} {found:12}{times:6}")
    assert counts.total() >= 1000
