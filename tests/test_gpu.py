"""The whole loop on a CUDA device: `make test-gpu`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curate import CuratedReader
from curate.jobs.contrastive import contrastive_loss
from curate.jobs.drawn_pool import draw_pool
from curate.jobs.ranks import Ranks
from curate.models.encoder import load_encoder
from curate.models.learners import newest_learner
from curate.rounds.manifest import read_manifest
from curate.storage import Store
from tests.helpers import CPU, commit_rounds, drawn_pool, tiny_encoder, write_tiny
from tests.test_train_step import batch_of, gradients, leaves, literal, trainee_of

pytestmark = pytest.mark.gpu

RECIPE = """
root = "root"
[pool]
path = "pool"
[reference]
model = "tiny.json"
[learner]
model = "tiny.json"
[dedup]
threshold = 0.9999
[selection]
sub_batch_size = 32
n_chunks = 4
filter_ratio = 0.75
criterion = "learnability"
[resources]
device = "cuda"
"""


def curate(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "curate.jobs.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_round_a_learner_that_is_stopped_and_goes_on_and_the_next_round(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    draw_pool(tmp_path / "pool", rows=600, shards=2, seed=0, image_size=32, broken_share=0.02, duplicate_share=0.05)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    said = curate(tmp_path, "check", "recipe.toml")
    assert "reference: tiny.json, bf16 on cuda" in said
    assert "measured: 256 rows on this machine's cuda" in said
    curate(tmp_path, "round", "recipe.toml")
    for steps in ("2", "4"):  # the second goes on from the first one's checkpoint, whose AdamW is fused
        curate(tmp_path, "train", "recipe.toml", "--set", f"train.steps={steps}")
    curate(tmp_path, "round", "recipe.toml")
    store = Store(str(tmp_path / "root"))
    learner = newest_learner(store)
    assert learner is not None
    assert (learner.step, learner.encoder.precision) == (4, "bf16")
    for number in (0, 1):
        found = read_manifest(store, number)
        assert found is not None
        assert found[0].lineage["reference"]["precision"] == "bf16"
    assert found[0].quality["learner"] == learner.number


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_are_one_step_on_the_device(tmp_path: Path, loss: str, checkpointing: bool) -> None:
    pixels, texts = (part.pin_memory() for part in batch_of(256))
    ranks = Ranks(rank=0, world_size=1, device=torch.device("cuda"))
    whole, split = (trainee_of(tmp_path, loss, ranks, micro_batch) for micro_batch in (256, 48))
    if checkpointing:
        split.model.set_grad_checkpointing()
    value, expected = gradients(whole, pixels, texts)
    ours, found = gradients(split, pixels, texts)
    assert ours == pytest.approx(value, rel=1e-2)  # in bf16
    for name, grad in found.items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), expected[name].flatten(), dim=0) > 0.99, name


def test_the_tiled_loss_on_the_device() -> None:
    for loss in ("sigmoid", "softmax"):
        ours = [value.detach().cuda().requires_grad_() for value in leaves(2048)]
        theirs = leaves(2048)
        ranks = Ranks(rank=0, world_size=1, device=torch.device("cuda"))
        found, expected = contrastive_loss(*ours, loss=loss, ranks=ranks), literal(loss, *theirs)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)
        found.backward()
        expected.backward()
        torch.testing.assert_close(ours[0].grad.cpu(), theirs[0].grad, atol=1e-5, rtol=1e-4)


def test_batches_in_pinned_memory(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    pool = drawn_pool(tmp_path / "pool", rows=24, image_size=16)
    commit_rounds(store, pool, rounds=1, sub_batches=2, b=8)
    how = {"preprocess": lambda _: torch.zeros(2), "tokenize": lambda texts: torch.zeros(len(texts), 3)}
    for workers in (0, 1):
        for batch in CuratedReader(store.url, workers=workers, pin_memory=True, **how):
            assert batch.images.is_pinned()
            assert batch.texts.is_pinned()


@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.99999), ("bf16", 0.999)])
def test_embeddings_are_those_of_a_cpu(tmp_path: Path, precision: str, cosine: float) -> None:
    store = Store(str(tmp_path / "root"))
    spec = replace(tiny_encoder(store, tmp_path), precision=precision)
    pixels = torch.randint(0, 255, (16, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for device in (CPU, torch.device("cuda")):
        encoder = load_encoder(store, spec if device.type == "cuda" else replace(spec, precision="fp32"), device)
        found.append(encoder.encode(pixels, encoder.tokenize([f"number {i}" for i in range(16)])))
    for ours, theirs in zip(*found, strict=True):
        assert (ours * theirs.cpu()).sum(1).min() > cosine
