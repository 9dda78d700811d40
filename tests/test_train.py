"""The trainer learns from exactly the batches that it should, always the same way, and publishes what it learned."""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import curate.jobs.train
import curate.rounds.stream
from curate.errors import CommitConflictError, InputChangedError, ShardDamagedError, StreamStalledError, UserError
from curate.jobs.checkpoint import checkpoints, restore
from curate.jobs.optimize import learning_rate
from curate.jobs.train import Trained, train
from curate.models.encoder import load_model
from curate.models.learners import LearnerCheckpoint, newest_learner, read_learner, record_learner
from curate.pool.inventory import take_inventory
from curate.pool.shards import Pool
from curate.reader.curated import Batch, CuratedReader
from curate.reader.uniform import uniform_batches
from curate.recipe import PoolSection, Recipe, TrainSection
from curate.rounds.manifest import manifest_name
from curate.rounds.stream import end_stream
from curate.storage import Store
from tests.helpers import CPU, commit_round, damage_page, drawn_pool, write_tiny

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(120)

LATE_S = 0.02


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return drawn_pool(tmp_path_factory.mktemp("train") / "pool", rows=160, shards=2)


def recipe(
    tmp_path: Path, pool: Pool, *, loss: str = "sigmoid", b: int = 16, root: str = "root", **train: Any
) -> Recipe:
    """A recipe that trains a tiny learner."""
    write_tiny(tmp_path)
    return Recipe.model_validate(
        {
            "root": str(tmp_path / root),
            "pool": {"path": str(Path(pool.shards[0].path).parent)},
            "learner": {"model": "tiny.json"},
            "selection": {"sub_batch_size": b, "n_chunks": 4, "loss": loss},
            "train": {"learning_rate": 3e-3, "warmup_steps": 2, "log_every": 1} | train,
        }
    )


def trained(recipe: Recipe, tmp_path: Path) -> Trained:
    return train(recipe, base=tmp_path)


def refusal(recipe: Recipe, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        trained(recipe, tmp_path)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    store = Store(recipe.root)
    return dict(load_model(store, newest_learner(store).encoder, CPU)[0].state_dict())


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


# --- uniform batches of the pool ---------------------------------------------------------------------------------


# Who knows nothing pays ln 16 = 2.77 by the softmax and, with the best bias, 16 H(1/16) = 3.74 by the sigmoid loss. A
# model this small gets beyond the latter only by luck.
@pytest.mark.parametrize(("loss", "most"), [("softmax", 1.5), ("sigmoid", 3.85)])
def test_training_lowers_the_loss_and_publishes(tmp_path: Path, loss: str, most: float):
    few = drawn_pool(tmp_path / "pool", rows=16)
    made = recipe(tmp_path, few, loss=loss, data="pool", steps=50, warmup_steps=5)
    done = trained(made, tmp_path)
    assert done.steps == len(done.losses) == 50
    assert done.losses[0] > {"softmax": 2.5, "sigmoid": 5}[loss]
    assert mean(done.losses[-5:]) < most
    newest = newest_learner(Store(made.root))
    assert newest == done.learner
    assert (newest.number, newest.step, newest.next_batch) == (0, 50, 0)
    assert newest.encoder.source == "tiny.json"


def test_twice_the_same_weights(tmp_path: Path, pool: Pool):
    runs = [trained(recipe(tmp_path, pool, data="pool", steps=8, root=root), tmp_path) for root in ("a", "b")]
    assert runs[0].losses == runs[1].losses
    assert runs[0].learner == runs[1].learner  # and so are its weights, by their hash
    other = trained(recipe(tmp_path, pool, data="pool", steps=8, root="c", workers=2), tmp_path)
    assert other.learner == runs[0].learner
    changed = recipe(tmp_path, pool, data="pool", steps=8, root="d").model_copy(update={"seed": 1})
    assert trained(changed, tmp_path).losses != runs[0].losses


@pytest.mark.parametrize("how", [{"micro_batch": 5}, {"micro_batch": 7, "grad_checkpointing": True, "workers": 1}])
def test_micro_batches_are_the_same_training(tmp_path: Path, pool: Pool, how: dict[str, Any]):
    whole = trained(recipe(tmp_path, pool, data="pool", steps=8, root="whole"), tmp_path)
    parts = trained(recipe(tmp_path, pool, data="pool", steps=8, root="parts", **how), tmp_path)
    assert parts.losses[0] == pytest.approx(whole.losses[0], abs=1e-5)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-3)
    assert parts.learner.step == 8


def test_the_published_weights_are_the_trained_ones(tmp_path: Path, pool: Pool, monkeypatch):
    models = []
    load = curate.jobs.train.load_model
    monkeypatch.setattr(curate.jobs.train, "load_model", lambda *args: models.append(load(*args)) or models[-1])
    made = recipe(tmp_path, pool, data="pool", steps=3)
    trained(made, tmp_path)
    found = weights(made)
    assert all(found[name].equal(tensor) for name, tensor in models[0][0].state_dict().items())


def test_precision_is_kept(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, data="pool", steps=1)
    half = made.model_copy(update={"learner": made.learner.model_copy(update={"precision": "bf16"})})
    assert trained(half, tmp_path).learner.encoder.precision == "bf16"


def test_the_sigmoid_loss_wants_a_bias(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, data="pool", steps=2)
    write_tiny(tmp_path, init_logit_bias=None)
    line = refusal(made, tmp_path)
    assert "init_logit_bias" in line
    assert 'selection.loss = "softmax"' in line
    assert newest_learner(Store(made.root)) is None
    unbiased = made.model_copy(update={"selection": made.selection.model_copy(update={"loss": "softmax"})})
    assert trained(unbiased, tmp_path).steps == 2


def test_a_loss_that_is_not_finite_any_more(tmp_path: Path, pool: Pool):
    line = refusal(recipe(tmp_path, pool, data="pool", steps=30, learning_rate=1e30), tmp_path)
    assert "the loss is" in line
    assert "train.learning_rate" in line
    assert newest_learner(Store(str(tmp_path / "root"))) is None


# --- committed rounds --------------------------------------------------------------------------------------------


def sub_batches(first: int, count: int, b: int = 8) -> list[list[tuple[int, int]]]:
    return [[(0, b * i + j) for j in range(b)] for i in range(first, first + count)]


def expected(first: int, count: int) -> list[tuple[int, str]]:
    """Number and digest of the uids of each batch that is to be trained on."""
    uids = [[f"{s:05d}{row:04d}" for s, row in batch] for batch in sub_batches(first, count)]
    return [(first + i, hashlib.sha256("\n".join(batch).encode()).hexdigest()) for i, batch in enumerate(uids)]


def log(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.root) / "trainer/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def seen(recipe: Recipe) -> list[tuple[int, str]]:
    """Number and digest of the uids of each batch that was trained on, by the log."""
    lines = [line for line in log(recipe) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["batch"], line["uids_sha256"]) for line in lines]


def learners(recipe: Recipe) -> list[LearnerCheckpoint]:
    newest = newest_learner(Store(recipe.root))
    return [read_learner(Store(recipe.root), number) for number in range(newest.number + 1)]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_committed_batch_once(tmp_path: Path, pool: Pool, workers: int):
    made = recipe(tmp_path, pool, b=8, workers=workers)
    store = Store(made.root)
    commit_round(store, pool, sub_batches(0, 3), number=0)
    commit_round(store, pool, sub_batches(3, 2), number=1)
    first = trained(made, tmp_path)
    assert seen(made) == expected(0, 5)
    # One learner at the end of each round, each with the losses of its own batches.
    assert [(one.number, one.step, one.next_batch) for one in learners(made)] == [(0, 0, 0), (1, 3, 3), (2, 5, 5)]
    assert [list(one.batch_losses) for one in learners(made)] == [[], [0, 1, 2], [3, 4]]
    assert first.learner == learners(made)[-1]
    assert [loss for one in learners(made) for loss in one.batch_losses.values()] == first.losses

    # Again, with nothing new: nothing happens.
    again = trained(made, tmp_path)
    assert (again.steps, again.learner) == (0, first.learner)
    assert len(learners(made)) == 3

    commit_round(store, pool, sub_batches(5, 2), number=2)
    before = weights(made)
    second = trained(made, tmp_path)
    assert seen(made) == expected(0, 7)
    assert (second.learner.number, second.learner.step, second.learner.next_batch) == (3, 7, 7)
    assert any(not tensor.equal(before[name]) for name, tensor in weights(made).items())


def test_steps_are_those_of_all_runs_together(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, steps=4)
    commit_round(Store(made.root), pool, sub_batches(0, 3), number=0)
    assert trained(made, tmp_path).steps == 3
    commit_round(Store(made.root), pool, sub_batches(3, 3), number=1)
    last = trained(made, tmp_path)
    assert (last.steps, last.learner.next_batch) == (1, 4)
    assert trained(made, tmp_path).steps == 0
    assert seen(made) == expected(0, 4)


def test_all_steps_are_taken_before_any_wait(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, steps=2, follow="wait", max_wait_s=0.2)
    commit_round(Store(made.root), pool, sub_batches(0, 2), number=0)
    assert [trained(made, tmp_path).finished for _ in range(2)] == [True, True]


def test_a_round_that_comes_while_a_learner_is_published(tmp_path: Path, pool: Pool, monkeypatch):
    made = recipe(tmp_path, pool, b=8, follow="wait", max_wait_s=5)
    store = Store(made.root)
    commit_round(store, pool, sub_batches(0, 2), number=0)
    record = curate.jobs.train.record_learner

    def slow(*args: Any, **how: Any) -> Any:
        if how["number"] == 1:
            commit_round(store, pool, sub_batches(2, 2), number=1)
            commit_round(store, pool, sub_batches(4, 2), number=2)
            end_stream(store)
        return record(*args, **how)

    monkeypatch.setattr(curate.jobs.train, "record_learner", slow)
    trained(made, tmp_path)
    assert seen(made) == expected(0, 6)


def test_learners_every_so_many_steps(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, publish_every=2)
    commit_round(Store(made.root), pool, sub_batches(0, 3), number=0)
    commit_round(Store(made.root), pool, sub_batches(3, 2), number=1)
    trained(made, tmp_path)
    # One more where the batches end: the next round may be waiting for it.
    assert [one.step for one in learners(made)] == [0, 2, 4, 5]
    assert [list(one.batch_losses) for one in learners(made)] == [[], [0, 1], [2, 3], [4]]


def test_rounds_are_trained_on_the_same_way_twice(tmp_path: Path, pool: Pool):
    found = []
    for root, workers in (("a", 0), ("b", 0), ("c", 2)):
        made = recipe(tmp_path, pool, b=8, root=root, workers=workers)
        commit_round(Store(made.root), pool, sub_batches(0, 4), number=0)
        found.append(trained(made, tmp_path).learner.encoder.weights_sha256)
    assert len(set(found)) == 1


def test_no_rounds_at_all(tmp_path: Path, pool: Pool):
    assert "expected a committed round, found none" in refusal(recipe(tmp_path, pool), tmp_path)


# --- following ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate.rounds.stream, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(curate.rounds.stream, "LONGEST_WAIT_S", 0.1)


class Curation(threading.Thread):
    """Commits each further round as soon as a learner of this number is published, then ends the stream."""

    def __init__(self, recipe: Recipe, pool: Pool, wanted: list[int]) -> None:
        super().__init__(daemon=True)
        self.recipe, self.pool, self.wanted = recipe, pool, wanted
        self.start()

    def run(self) -> None:
        store = Store(self.recipe.root)
        for number, learner in enumerate(self.wanted):
            while (newest := newest_learner(store)) is None or newest.number < learner:
                time.sleep(0.01)
            commit_round(store, self.pool, sub_batches(2 * number, 2), number=number)
        end_stream(store)


def test_a_trainer_waits_for_rounds_until_the_stream_is_ended(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, follow="wait", max_wait_s=60)
    curation = Curation(made, pool, [0, 1, 2])
    assert trained(made, tmp_path).steps == 6
    curation.join()
    assert seen(made) == expected(0, 6)
    assert [one.step for one in learners(made)] == [0, 2, 4, 6]
    assert trained(made, tmp_path).steps == 0  # the end is still the end


def test_a_wait_has_a_bound(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, follow="wait", max_wait_s=0.2)
    commit_round(Store(made.root), pool, sub_batches(0, 2), number=0)
    with pytest.raises(StreamStalledError, match=r"round 1 did not come within 0\.2 s"):
        trained(made, tmp_path)
    assert [one.step for one in learners(made)] == [0, 2]  # what was learned is not lost


def test_the_newest_round_again_while_none_comes(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, follow="repeat", max_repeats=2, max_wait_s=60)
    # Round 1 comes after round 0 was trained on three times; round 2 is the last one and trained on once.
    curation = Curation(made, pool, [0, 3])
    trained(made, tmp_path)
    curation.join()
    numbers = [number for number, _ in seen(made)]
    assert numbers[:6] == [0, 1, 0, 1, 0, 1]
    assert numbers[6:8] == [2, 3]
    assert set(numbers[8:]) <= {2, 3}  # again, if the end came a little later than the round
    digests = dict(expected(0, 4))
    assert seen(made) == [(number, digests[number]) for number in numbers]


# --- interrupted -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for what no `except` of ours catches."""


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, call: int, *, after: bool) -> None:
    """Let the trainer die at the `call`-th call of one of its functions, before or after it has done its work."""
    real = getattr(curate.jobs.train, where)
    calls = iter(range(1, 1000))

    def dying(*args: Any, **how: Any) -> Any:
        number = next(calls)
        if number == call and not after:
            raise Killed
        result = real(*args, **how)
        if number == call:
            raise Killed
        return result

    monkeypatch.setattr(curate.jobs.train, where, dying)


# Of 7 steps in rounds of 4 and 3, checkpoints after 2, 4, 6 and 7, learners after 4 and 7.
@pytest.mark.parametrize(
    ("where", "call", "after"),
    [
        ("learning_rate", 1, False),  # before the first step
        ("learning_rate", 4, False),  # between checkpoints
        ("save_checkpoint", 2, True),  # at the end of a round, before it is known to be the end
        ("save_checkpoint", 3, False),
        ("save_checkpoint", 3, True),  # a learner is due
        ("store_model", 1, True),
        ("record_learner", 1, True),
        ("record_learner", 2, False),
    ],
)
def test_killed_anywhere_and_started_again_equals_undisturbed(
    tmp_path: Path, undisturbed: tuple[Recipe, Trained], pool: Pool, where: str, call: int, after: bool
):
    made = undisturbed[0].model_copy(update={"root": str(tmp_path / "killed")})
    commit_two_rounds(made, pool)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, where, call, after=after)
        with pytest.raises(Killed):
            train(made, base=Path(undisturbed[0].root).parent)
    train(made, base=Path(undisturbed[0].root).parent)
    clean, again = (
        [{k: v for k, v in line.items() if k not in ("rows_per_s", "data_s")} for line in log(recipe)]
        for recipe in (undisturbed[0], made)
    )
    assert again == clean
    assert learners(made) == learners(undisturbed[0])  # weights by their hash, and every loss
    assert len(checkpoints(Store(made.root))) == 2


def commit_two_rounds(made: Recipe, pool: Pool) -> None:
    commit_round(Store(made.root), pool, sub_batches(0, 4), number=0)
    commit_round(Store(made.root), pool, sub_batches(4, 3), number=1)


class LateReader(CuratedReader):
    """One that each batch is waited for."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(LATE_S)
            yield batch


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> tuple[Recipe, Trained]:
    folder = tmp_path_factory.mktemp("undisturbed")
    made = recipe(folder, pool, b=8, checkpoint_every=2, steps=9)
    held_out = {"path": str(Path(pool.shards[0].path)), "every": 3}
    made = Recipe.model_validate(made.model_dump() | {"evaluate": held_out})
    commit_two_rounds(made, pool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curate.jobs.train.CuratedReader", LateReader)
        return made, train(made, base=folder)


def test_what_is_logged(undisturbed: tuple[Recipe, Trained]):
    made, done = undisturbed
    lines = log(made)
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == done.losses
    assert [(line["round"], line["sub_batch"]) for line in steps] == [(0, i) for i in range(4)] + [
        (1, i) for i in range(3)
    ]
    assert [line["learning_rate"] for line in steps] == [learning_rate(step, made.train) for step in range(1, 8)]
    assert all(line["data_s"] >= LATE_S for line in steps)
    measured = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert all(0 <= line["image_to_text_r1"] <= line["image_to_text_r5"] <= 1 for line in measured)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(Path(made.root) / "trainer")).Reload()
    scalars = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in board.Scalars("loss")]
    assert scalars == list(enumerate(done.losses, 1))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_fused_optimisers_state_goes_where_its_weights_are():
    """On a device of its own kind, which need not be there: a step count left on the CPU would stop a fused AdamW."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}

    elsewhere = torch.nn.Linear(2, 3, device="meta")
    other = torch.optim.AdamW(elsewhere.parameters(), lr=0.25)
    for group in other.param_groups:
        group["fused"] = True
    restore(tensors, elsewhere, other)
    assert {part.device.type for state in other.state.values() for part in state.values()} == {"meta"}
    assert [group["lr"] for group in other.param_groups] == [0.25]  # the recipe's, not the checkpoint's

    again = torch.nn.Linear(2, 3)
    other = torch.optim.AdamW(again.parameters(), fused=True)
    restore(tensors, again, other)
    for name, parameter in again.named_parameters():
        for key, value in other.state[parameter].items():
            assert value.equal(tensors[f"optimizer.{name}.{key}"]), (name, key)


def test_the_rate_of_each_step():
    def rates(**how: Any) -> list[float]:
        settings = TrainSection(learning_rate=1.0, **how)
        return [round(learning_rate(step, settings), 6) for step in range(1, 11)]

    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    assert rates(warmup_steps=0, steps=4)[:5] == [1, 0.853553, 0.5, 0.146447, 0]
    assert rates(warmup_steps=2, steps=6)[:6] == [0.5, 1, 1, 0.853553, 0.5, 0.146447]


def test_interrupted_on_uniform_batches(tmp_path: Path, pool: Pool, monkeypatch):
    whole = recipe(tmp_path, pool, data="pool", steps=7, checkpoint_every=2, root="whole")
    done = trained(whole, tmp_path)
    cut = whole.model_copy(update={"root": str(tmp_path / "cut")})
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "learning_rate", 6, after=False)
        with pytest.raises(Killed):
            trained(cut, tmp_path)
    rest = trained(cut, tmp_path)
    assert rest.losses == done.losses[4:]
    assert rest.learner == done.learner
    assert trained(cut, tmp_path).steps == 0


# --- what else lies in the root ----------------------------------------------------------------------------------


def test_checkpoints_of_another_kind_of_training(tmp_path: Path, pool: Pool):
    trained(recipe(tmp_path, pool, data="pool", steps=1), tmp_path)
    made = recipe(tmp_path, pool)
    line = refusal(made, tmp_path)
    assert line.startswith("train.data = 'rounds': trainer/checkpoint-000000001.safetensors was trained with 'pool'")


def test_another_trainers_learner(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8)
    commit_two_rounds(made, pool)
    done = trained(made, tmp_path)
    record_learner(Store(made.root), done.learner.encoder, step=9, next_batch=7, number=3)
    commit_round(Store(made.root), pool, sub_batches(7, 1), number=2)
    with pytest.raises(
        CommitConflictError, match=r"l000003/learner\.json: .*another trainer .* or delete trainer/checkpoint-"
    ):
        trained(made, tmp_path)


def test_a_damaged_checkpoint(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, checkpoint_every=1)
    commit_two_rounds(made, pool)
    trained(made, tmp_path)
    name = checkpoints(Store(made.root))[-1]
    path = Path(made.root) / name
    path.write_bytes(path.read_bytes()[:-100])
    line = refusal(made, tmp_path)
    assert line.startswith(f"{name}: expected a checkpoint, found something else")
    path.unlink()  # as the line says
    assert trained(made, tmp_path).steps == 1


def test_rounds_that_end_before_the_checkpoint(tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8)
    commit_two_rounds(made, pool)
    trained(made, tmp_path)
    (Path(made.root) / manifest_name(1)).unlink()
    assert "before batch 7, but the committed rounds hold only 4" in refusal(made, tmp_path)


def test_a_root_on_s3(s3_root: str, tmp_path: Path, pool: Pool):
    made = recipe(tmp_path, pool, b=8, logs=str(tmp_path / "logs")).model_copy(update={"root": s3_root})
    commit_round(Store(s3_root), pool, sub_batches(0, 3), number=0)
    first = trained(made, tmp_path)
    commit_round(Store(s3_root), pool, sub_batches(3, 2), number=1)
    assert trained(made, tmp_path).steps == 2
    assert first.steps == 3
    assert len((tmp_path / "logs/log.jsonl").read_text().splitlines()) == 5


# --- uniform batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, Counter[str]]:
    """A pool of 60 rows, 12 of them broken, and how often each caption can be used."""
    pool = drawn_pool(tmp_path_factory.mktemp("uniform") / "pool", rows=60, shards=3, broken_share=0.2)
    rows = [row for shard in pool.shards for row in pq.read_table(shard.path).to_pylist()]
    return pool, Counter(row["caption"] for row in rows if not row["broken"])


def captions(pool: Pool, count: int, *, b: int = 8, seed: int = 0, threads: int = 1) -> list[str]:
    """The captions of the first `count` pairs."""
    made = uniform_batches(
        pool, b, seed=seed, preprocess=lambda picture: torch.zeros(1), tokenize=lambda texts: texts, threads=threads
    )
    found: list[str] = []
    for batch in islice(made, -(-count // b)):
        assert batch.images.shape == (b, 1)
        assert len(batch.texts) == b
        found += batch.texts
    return found[:count]


@pytest.mark.parametrize("b", [8, 7, 48])
@pytest.mark.parametrize("stretch", [None, 16])
def test_every_usable_row_once_an_epoch_in_new_orders(broken, monkeypatch, b: int, stretch: int | None):
    if stretch:
        monkeypatch.setattr("curate.reader.uniform.SHUFFLED_ROWS", stretch)
        monkeypatch.setattr("curate.reader.uniform.READ_ROWS", 8)
    pool, usable = broken
    assert usable.total() == 48
    stream = captions(pool, 3 * 48, b=b)
    epochs = [stream[start : start + 48] for start in (0, 48, 96)]
    assert all(Counter(epoch) == usable for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_rows_of_all_shards_are_mixed(broken):
    pool, _ = broken
    shard_of = {row: s.index for s in pool.shards for row in pq.read_table(s.path)["caption"].to_pylist()}
    for start in range(0, 48, 16):
        assert len({shard_of[caption] for caption in captions(pool, 48)[start : start + 16]}) == 3


def test_the_order_is_the_seeds_whatever_the_threads(broken):
    pool, _ = broken
    first = captions(pool, 100)
    assert captions(pool, 100) == captions(pool, 100, threads=3) == first
    assert captions(pool, 100, seed=1) != first


def test_pictures_stay_with_their_captions(broken):
    pool, _ = broken
    rows = [row for shard in pool.shards for row in pq.read_table(shard.path).to_pylist() if not row["broken"]]
    means = {row["caption"]: picture_mean(row["jpg"]) for row in rows}
    made = uniform_batches(pool, 8, seed=0, preprocess=mean_of, tokenize=lambda texts: texts)
    for batch in islice(made, 6):
        assert batch.images.tolist() == [means[caption] for caption in batch.texts]


def mean_of(picture: Any) -> torch.Tensor:
    return torch.tensor(float(sum(picture.tobytes())))


def picture_mean(jpg: bytes) -> float:
    from curate.pool.images import decode_image

    return float(mean_of(decode_image(jpg)))


def test_too_few_rows(broken):
    pool, _ = broken
    with pytest.raises(UserError, match="48 of 60 rows can be used, a batch wants 49"):
        captions(pool, 1, b=49)


@pytest.mark.parametrize("on_bad_shard", ["fail", "skip"])
def test_a_damaged_shard_is_passed_over_where_bad_ones_are(tmp_path: Path, on_bad_shard: str):
    drawn_pool(tmp_path / "pool", rows=60, shards=3)
    damage_page(tmp_path / "pool/00001.parquet", "jpg")
    pool = take_inventory(PoolSection(path=str(tmp_path / "pool"), on_bad_shard=on_bad_shard))
    if on_bad_shard == "fail":
        with pytest.raises(ShardDamagedError, match=r"00001\.parquet: expected 20 readable rows"):
            captions(pool, 40)
    else:
        sound = pa.concat_tables([pq.read_table(tmp_path / f"pool/0000{i}.parquet") for i in (0, 2)])
        assert Counter(captions(pool, 40)) == Counter(sound["caption"].to_pylist())


def test_a_pool_that_changed(tmp_path: Path):
    pool = drawn_pool(tmp_path / "pool", rows=20)
    Path(pool.shards[0].path).unlink()
    with pytest.raises((InputChangedError, FileNotFoundError)):
        captions(pool, 1)
