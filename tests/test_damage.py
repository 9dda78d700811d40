"""Every file that a round leaves, damaged in every way: told by its name, or mended; never silent."""

import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from curate.errors import CurateError, UserError
from curate.jobs.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from curate.models.spec import EncoderSpec
from curate.pipelines.round import run_round
from curate.storage import Store
from tests.small_round import published, recipe, world
from tests.stand_in import without_ray

__all__ = ["without_ray", "world"]


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, str]]]:
    """A root after each of two rounds, and what is published then."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        without_ray.__wrapped__(patch)
        for number in range(2):
            run_round(recipe(world, str(root)), base=world, number=number)
            found.append((root.with_name(f"after-{number}"), published(str(root))))
            shutil.copytree(root, found[-1][0])
    return found


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
        run_round(recipe(world, str(root)), base=world, number=number, say=said.append)
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
def test_some_damage_is_told_or_mended(world: Path, undisturbed, tmp_path: Path) -> None:
    whole = undisturbed[0][0]
    rng = np.random.default_rng(0)
    cases = [
        (path.relative_to(whole), data)
        for path in files_of(whole)
        for _, data in itertools.islice(damages(path.read_bytes(), rng), 3, None, 4)
    ]
    for i in rng.permutation(len(cases))[:12].tolist():
        number = i % 2 if cases[i][0].name != "manifest.json" else 1
        damage_and_finish(world, whole, tmp_path / "root", *cases[i], undisturbed[number][1], number)


@pytest.mark.usefixtures("without_ray")
def test_a_curated_file_that_is_damaged_before_the_commit(world: Path, undisturbed, tmp_path: Path) -> None:
    whole, expected = undisturbed[0]
    (path,) = whole.glob("rounds/*/curated-*")
    data = flipped(path.read_bytes(), path.stat().st_size // 2, np.random.default_rng(0))
    found = damage_and_finish(world, whole, tmp_path / "root", path.relative_to(whole), data, expected, 0)
    assert found == "made again"


def test_each_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    store, model = Store(str(tmp_path)), torch.nn.Linear(8, 8)
    spec = EncoderSpec(model="m", source="s", weights_sha256="w", embed_dim=8, logit_scale=10.0, logit_bias=0.0)
    progress = Progress(
        data="rounds", start=spec, step=1, next_batch=1, learner=0, learner_step=0, batch_losses={0: 1.5}
    )
    save_checkpoint(store, progress, model, torch.optim.AdamW(model.parameters()))
    (name,) = checkpoints(store)
    assert load_checkpoint(store, name)[0] == progress
    whole = (tmp_path / name).read_bytes()
    for place in range(8, len(whole), 3):
        (tmp_path / name).write_bytes(flipped(whole, place, np.random.default_rng(place)))
        with pytest.raises(UserError, match=f"{name}: expected a checkpoint, found something else"):
            load_checkpoint(store, name)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("without_ray")
def test_all_damage_is_told_or_mended(world: Path, undisturbed, tmp_path: Path) -> None:
    """Prints a table: file, round that meets it, what became of it, how often."""
    whole = undisturbed[0][0]
    counts = Counter[tuple[str, int, str]]()
    for number, seed in itertools.product((0, 1), range(4)):
        rng = np.random.default_rng([number, seed])
        for path in files_of(whole):
            name = path.relative_to(whole)
            if number == 0 and name.name == "manifest.json":
                continue
            for _, data in damages(path.read_bytes(), rng):
                after = undisturbed[number][1]
                found = damage_and_finish(world, whole, tmp_path / "root", name, data, after, number)
                counts[f"{name.parts[0]}/{re.split('[-.]', name.name)[0]}", number, found] += 1
    for (kind, number, found), times in sorted(counts.items()):
        print(f"{kind:50} round {number} {found:12}{times:6}")
    assert counts.total() >= 1000
