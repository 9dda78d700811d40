"""open_clip's own trainer on committed rounds: each of its batches is a sub-batch, and its loss is ours."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from curate import CuratedReader
from curate.errors import UserError
from curate.jobs.open_clip_trainer import RoundLoader, train
from curate.jobs.train import train as train_ours
from curate.models.encoder import fetch_model
from curate.models.learners import newest_learner, read_learner
from curate.recipe import TrainSection
from curate.rounds.manifest import read_manifest
from curate.storage import Store
from tests.test_export import root
from tests.test_wanted import recipe

__all__ = ["root"]

HOUSE = Path(__file__).parents[1]
TAG = "train/contrastive_loss"


def losses_of(logs: Path, name: str) -> list[float]:
    """What open_clip's trainer logged, step by step, as float32."""
    found = EventAccumulator(str(logs / name / "tensorboard"))
    found.Reload()
    return [event.value for event in found.Scalars(TAG)]


@pytest.fixture(scope="module")
def model(root: Path) -> str:
    """The root's first learner, by a name that open_clip knows."""
    folder = root.parent / "model"
    if not folder.exists():
        fetch_model(Store(str(root)), read_learner(Store(str(root)), 0).encoder, folder)
    return f"local-dir:{folder}"


def arguments(model: str, logs: Path, name: str, *more: str) -> list[str]:
    said = {"--model": model, "--precision": "fp32", "--lr": "1e-12", "--logs": str(logs), "--name": name}
    fixed = {"--report-to": "tensorboard", "--log-every-n-steps": "1", "--workers": "0", "--warmup": "0"}
    return [*(part for pair in (said | fixed).items() for part in pair), *more]


def copied(root: Path, to: Path) -> Path:
    """A root that a trainer may publish to."""
    subprocess.run(["cp", "-r", str(root), str(to)], check=True)
    return to


@pytest.mark.parametrize(
    ("ranks", "loss", "parts"),
    [
        (2, "softmax", 1),
        pytest.param(1, "sigmoid", 1, marks=pytest.mark.exhaustive),
        pytest.param(1, "softmax", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_its_losses_are_those_of_our_trainer(
    root: Path, model: str, tmp_path: Path, ranks: int, loss: str, parts: int
) -> None:
    made = copied(root, tmp_path / "root")
    ours = copied(root, tmp_path / "ours")
    theirs = ["--accum-freq", str(parts)] + (["--siglip"] if loss == "sigmoid" else ["--gather-with-grad"])
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *(
            "-m",
            "tests.open_clip_on_cpu",
            "open-clip",
            str(made),
            "--",
            *arguments(model, tmp_path / "logs", "run", *theirs),
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=HOUSE)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = recipe(root.parent, ours)
    # So slowly that the weights stay: each loss tells whether its batch is the sub-batch, and no other one.
    slow = TrainSection(learning_rate=1e-12, warmup_steps=0, log_every=1)
    selection = whole.selection.model_copy(update={"loss": loss})
    train_ours(whole.model_copy(update={"train": slow, "selection": selection}), base=root.parent, say=print)
    lines = [json.loads(line) for line in (ours / "trainer/log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if "loss" in line]
    assert len(expected) == 4
    assert losses_of(tmp_path / "logs", "run") == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    newest = newest_learner(Store(str(made)))
    assert newest is not None
    assert (newest.number, newest.next_batch) == (2, 4)
    assert done.stdout.count("learner 1 published after batch 2") == 1  # by the first rank alone


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (2, 2)])
def test_each_batch_is_one_sub_batch(root: Path, ranks: int, parts: int) -> None:
    def pixels(images: Any) -> torch.Tensor:
        import numpy as np

        return torch.from_numpy(np.array(images.convert("RGB"))).float()

    def lengths(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[len(caption)] for caption in captions])

    whole = list(CuratedReader(str(root), preprocess=pixels, tokenize=lengths))
    first = read_manifest(Store(str(root)), 0)
    assert first is not None
    loaders = []
    for rank in range(ranks):
        reader = CuratedReader(str(root), rank=rank, world_size=ranks, preprocess=pixels, tokenize=lengths)
        loaders.append(RoundLoader(reader, first[0], parts))
    assert loaders[0].num_batches == 2 * parts
    for epoch in range(2):
        found = [list(loader) for loader in loaders]
        assert all(len(batches) == 2 * parts for batches in found)
        for number in range(2):
            images = [batches[number * parts + part][0] for batches in found for part in range(parts)]
            assert torch.equal(torch.cat(images), whole[2 * epoch + number].images)
        assert all(loader.next_batch == 2 * (epoch + 1) for loader in loaders)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--batch-size", "64"], r"open-clip: expected no --batch-size, which follows from .* \(4\), found one"),
        (["--batch-size=7"], "open-clip: expected no --batch-size, which follows from"),
        (["--train-data", "x.tar"], "open-clip: expected no --train-data, which follows from"),
        (["--accum-freq", "3"], "open-clip: 4 pairs per batch do not divide over 3 parts, ranks × --accum-freq"),
    ],
)
def test_arguments_that_would_take_batches_apart(root: Path, model: str, more: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        train(str(root), ["--model", model, *more], say=print)


def test_mistakes_are_one_line(root: Path, tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match="expected --epochs N, the rounds to come in all, with --follow"):
        train(str(root), ["--model", model], follow=True, say=print)
    with pytest.raises(UserError, match=r"expected round 0, found none; run: curate round RECIPE"):
        train(str(tmp_path), ["--model", model], say=print)


@pytest.mark.filterwarnings("ignore:Device cuda was not", "ignore::pytest.PytestUnraisableExceptionWarning")  # theirs
def test_it_stops_where_the_stream_ends(root: Path, model: str, tmp_path: Path) -> None:
    made = copied(root, tmp_path / "root")
    from curate.rounds.stream import end_stream

    end_stream(Store(str(made)))
    said: list[str] = []
    level = logging.getLogger().level
    try:
        more = arguments(model, tmp_path / "logs", "run", "--epochs", "5")
        train(str(made), more, follow=True, publish=False, say=said.append)
    finally:
        logging.getLogger().setLevel(level)
        logging.getLogger().handlers[:] = [h for h in logging.getLogger().handlers if "pytest" in type(h).__module__]
    assert said == ["the stream of rounds has ended"]
    assert len(losses_of(tmp_path / "logs", "run")) == 4
