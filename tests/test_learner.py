"""A learner is published once, whole and under the next number, and the next round loads exactly it."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from curate import publish_learner
from curate.errors import CommitConflictError, UserError
from curate.models.encoder import eval_transform, load_encoder
from curate.models.learners import LearnerCheckpoint, learner_name, newest_learner, read_learner
from curate.models.publish import first_learner
from curate.storage import Store
from tests.helpers import CPU, tiny_config, tiny_encoder, write_tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models under names of open_clip's own."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny_config())
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-wide", tiny_config(embed_dim=24))


def users_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return open_clip.create_model("ViT-tiny")


def refusal(*args: Any) -> str:
    with pytest.raises(UserError) as caught:
        publish_learner(*args, step=1, next_batch=1)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_what_the_next_round_loads_is_the_users_model(root: str):
    model = users_model()
    published = publish_learner(root, model, "ViT-tiny", step=30, next_batch=12)
    store = Store(root)
    newest = newest_learner(store)
    assert newest == published == read_learner(store, 0)
    assert (newest.number, newest.step, newest.next_batch) == (0, 30, 12)
    assert newest.encoder.source == "ViT-tiny"
    assert newest.encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    encoder = load_encoder(store, newest.encoder, CPU)
    ours, theirs = encoder.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    picture = Image.effect_mandelbrot((50, 40), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    assert eval_transform(encoder.model)(picture).equal(eval_transform(model)(picture))
    texts = ["a", "two words"]
    assert encoder.tokenize(texts).equal(open_clip.get_tokenizer("ViT-tiny")(texts))


def test_a_model_on_another_device_or_in_training_mode(store: Store):
    model = users_model().train()
    (model.text_projection * 1).sum().backward()  # gradients do not travel
    assert publish_learner(store.url, model, "ViT-tiny", step=1, next_batch=1).number == 0
    assert model.training


def test_a_model_made_from_the_learner_before(store: Store, tmp_path: Path):
    first = publish_learner(store.url, users_model(), "ViT-tiny", step=0, next_batch=0)
    name = f"local-dir:{store.url}/{first.encoder.folder}"
    model = open_clip.create_model(name)
    with torch.no_grad():
        model.logit_bias += 1
    second = publish_learner(store.url, model, name, step=1, next_batch=1)
    assert second.number == 1
    assert second.encoder.logit_bias == first.encoder.logit_bias + 1


def test_numbers_go_up(store: Store):
    numbers = [publish_learner(store.url, users_model(i), "ViT-tiny", step=i, next_batch=i).number for i in range(3)]
    assert numbers == [0, 1, 2]
    assert publish_learner(store.url, users_model(7), "ViT-tiny", step=7, next_batch=7, number=12).number == 12
    assert publish_learner(store.url, users_model(8), "ViT-tiny", step=8, next_batch=8).number == 13
    assert newest_learner(store).step == 8
    assert read_learner(store, 1).step == 1
    assert learner_name(12) == "learners/l000012/learner.json"
    with pytest.raises(FileNotFoundError):
        read_learner(store, 3)


def test_identical_twice_is_fine_and_anything_else_a_conflict(root: str):
    store = Store(root)
    publish = {"step": 5, "next_batch": 5, "number": 4}
    first = publish_learner(root, users_model(), "ViT-tiny", **publish)
    before = store.read_bytes(learner_name(4))
    assert publish_learner(root, users_model(), "ViT-tiny", **publish) == first
    for model, change in ((users_model(1), {}), (users_model(), {"step": 6}), (users_model(), {"next_batch": 6})):
        with pytest.raises(CommitConflictError, match=r"l000004/learner\.json"):
            publish_learner(root, model, "ViT-tiny", **publish | change)
    assert store.read_bytes(learner_name(4)) == before


def test_a_race_for_one_number_has_one_winner(store: Store, monkeypatch):
    # Everybody has looked which number is free before anybody takes it.
    barrier = threading.Barrier(4)
    monkeypatch.setattr("curate.models.learners.newest_learner", lambda store: barrier.wait() and None)
    models = [users_model(seed) for seed in range(4)]
    outcomes: dict[int, LearnerCheckpoint | None] = {}

    def publish(i: int) -> None:
        try:
            outcomes[i] = publish_learner(store.url, models[i], "ViT-tiny", step=i, next_batch=i)
        except CommitConflictError:
            outcomes[i] = None

    threads = [threading.Thread(target=publish, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4
    (winner,) = [learner for learner in outcomes.values() if learner]
    assert read_learner(store, 0) == winner


def test_the_first_learner_is_the_recipes_unless_there_is_one(store: Store, tmp_path: Path):
    section = write_tiny(tmp_path)
    first = first_learner(store, section, base=tmp_path, seed=3)
    assert (first.number, first.step, first.next_batch) == (0, 0, 0)
    assert first.encoder == tiny_encoder(store, tmp_path, seed=3)
    assert first_learner(store, section, base=tmp_path, seed=3) == first
    trained = publish_learner(store.url, users_model(), "ViT-tiny", step=9, next_batch=9)
    assert trained.number == 1
    assert first_learner(store, section, base=tmp_path, seed=4) == trained


def test_a_learner_that_was_not_published_is_not_there(store: Store):
    assert newest_learner(store) is None
    publish_learner(store.url, users_model(), "ViT-tiny", step=0, next_batch=0)
    store.put_bytes("learners/l000001/weights", b"x")
    store.put_bytes("learners/l00001x/learner.json", b"x")
    assert newest_learner(store).number == 0


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-none", "local-dir:/nowhere"])
def test_a_name_that_open_clip_does_not_know(store: Store, name: str):
    assert f"model_name = {name!r}" in refusal(store.url, users_model(), name)
    assert newest_learner(store) is None


def test_a_name_that_made_another_model(store: Store):
    line = refusal(store.url, users_model(), "ViT-wide")
    assert "model_name = 'ViT-wide': does not describe this model" in line
    assert newest_learner(store) is None


def test_a_model_in_a_wrapper(store: Store):
    wrapped = torch.nn.Sequential(users_model())
    assert "without wrappers such as DDP" in refusal(store.url, wrapped, "ViT-tiny")
    assert newest_learner(store) is None


def test_weights_that_are_not_finite(store: Store):
    model = users_model()
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.nan
    assert "visual.proj are not all finite" in refusal(store.url, model, "ViT-tiny")
    assert newest_learner(store) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b'{"encoder": {}}', b"\xff"])
def test_a_record_that_is_none(store: Store, data: bytes):
    store.put_bytes(learner_name(2), data)
    with pytest.raises(UserError, match=r"^learners/l000002/learner\.json: expected .* found (damage|something)"):
        newest_learner(store)


def test_losses_of_batches_are_numbers(root: str):
    publish = {"step": 2, "next_batch": 2}
    losses = {np.int64(0): torch.tensor(2.5), 1: 2}
    published = publish_learner(root, users_model(), "ViT-tiny", **publish, batch_losses=losses)
    assert read_learner(Store(root), 0) == published
    assert published.batch_losses == {0: 2.5, 1: 2.0}
    with pytest.raises(UserError, match=r"^batch_losses: batch 3 has the loss nan"):
        publish_learner(root, users_model(), "ViT-tiny", **publish, batch_losses={3: float("nan")})
