"""Flexi-JEST: a learner scored, and trained in part, on smaller pictures, is open_clip's own model of that size."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.transforms.v2 import functional

import curate.jobs.train
from curate.errors import UserError
from curate.jobs.approximate import Approximate, approximate_rows, downscaled
from curate.jobs.check import check_recipe
from curate.jobs.memory import trainer_memory
from curate.jobs.optimize import Trainee
from curate.jobs.ranks import Ranks
from curate.jobs.sharding import compile_model, whole_tensor
from curate.jobs.train import train
from curate.models.create import CONFIG_NAME, create_model
from curate.models.encoder import load_encoder, load_model
from curate.models.learners import newest_learner, record_learner
from curate.models.resolution import TwoResolutions, check_resolution, resampled, set_resolution
from curate.models.spec import WEIGHTS_NAME, EncoderSpec
from curate.recipe import LearnerSection, Recipe, TrainSection
from curate.recipe_file import load_recipe
from curate.rounds.plan import Plan, pin_plan
from curate.storage import Store
from tests.helpers import CPU, commit_rounds, drawn_pool, tiny_config, tiny_encoder, write_tiny
from tests.test_train_ranks import finish, start
from tests.test_train_step import LOSSES, batch_of, gradients, literal, on_ranks, trainee_of

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(240)

SIZE = 16
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def timm_vision(name: str, **changes: Any) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "image_size": 160} | changes


TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "open_clip": (VISION, SIZE),
    "averaged": (VISION | {"pool_type": "avg", "attentional_pool": True}, 24),
    "timm": (timm_vision("test_vit"), 80),
    "timm with registers": (timm_vision("test_vit2"), 64),
    "timm as SigLIP": (timm_vision("test_vit3", timm_pool="map", timm_proj="linear"), 96),
}


def model_of(vision: dict[str, Any], seed: int = 0, **how: Any) -> Any:
    """A model with random weights."""
    torch.manual_seed(seed)
    open_clip.factory._MODEL_CONFIGS["approximate"] = tiny_config(vision_cfg=vision)
    try:
        return open_clip.create_model("approximate", load_weights=False, **how).eval()
    finally:
        del open_clip.factory._MODEL_CONFIGS["approximate"]


def open_clips(model: Any, vision: dict[str, Any], size: int, folder: Path) -> Any:
    """What open_clip makes of a model's weights with `force_image_size`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": tiny_config(vision_cfg=vision), "preprocess_cfg": {}}))
    safetensors.torch.save_file(model.state_dict(), folder / WEIGHTS_NAME)
    return open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", TOWERS)
def test_a_model_of_smaller_pictures_is_open_clips(tower: str, tmp_path: Path) -> None:
    vision, size = TOWERS[tower]
    model = model_of(vision)
    theirs = open_clips(model, vision, size, tmp_path)
    images = torch.randn(3, 3, size, size)
    own = copy.deepcopy(model)
    set_resolution(model, size)
    assert model.visual.image_size == theirs.visual.image_size == (size, size)
    assert model.visual.preprocess_cfg == theirs.visual.preprocess_cfg
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), atol=1e-6, rtol=1e-6)
    assert own.visual.image_size == (vision["image_size"],) * 2


def test_scores_of_smaller_pictures_are_named_apart(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    own = tiny_encoder(store, tmp_path, vision_cfg=VISION)
    assert own.sha == own.model
    assert "image_size" not in own.to_json()
    assert EncoderSpec(**own.to_json()) == own
    small = replace(own, image_size=SIZE)
    assert small.sha == f"{own.model}-{SIZE}px"
    assert replace(small, precision="bf16", exact_pixels=False).sha == f"{own.model}-bf16-fast-{SIZE}px"
    assert EncoderSpec(**small.to_json()) == small
    theirs = open_clips(load_model(store, own, CPU)[0], VISION, SIZE, tmp_path / "theirs")
    whole, encoder = (load_encoder(store, spec, CPU) for spec in (own, small))
    assert encoder.image_size == (SIZE, SIZE)
    assert encoder.view != whole.view
    pictures, texts = batch_of(6)
    crops = [
        torch.stack([torch.from_numpy(each.crop(picture.numpy())) for picture in pictures]) for each in (whole, encoder)
    ]
    zimg, ztxt = encoder.encode(crops[1], texts)
    with torch.inference_mode():
        expected = theirs.encode_image(encoder.normalize(crops[1]), normalize=True)
    torch.testing.assert_close(zimg, expected, atol=1e-6, rtol=1e-6)
    full = whole.encode(crops[0], texts)
    assert full[1].equal(ztxt)
    assert (full[0] - zimg).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_positions_are_resampled_as_open_clip_does(seed: int, side: int) -> None:
    vision = VISION | {"image_size": 48}
    positions = model_of(vision, seed).visual.positional_embedding
    state = {"visual.positional_embedding": positions}
    resize_pos_embed(state, model_of(vision | {"image_size": 8 * side}))
    theirs, ours = state["visual.positional_embedding"], resampled(positions, side, others=1)
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
    outer = torch.randn(ours.shape)
    for mine, its in zip(*(torch.autograd.grad(z, [positions], outer) for z in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("vision", "size", "words"),
    [
        (VISION, 12, ["expected a multiple of the learner's patches, 8 pixels, below the 32", "found 12", "take 8"]),
        (VISION, 32, ["below the 32 pixels of its pictures, found 32", "take 24"]),
        (VISION, 1000, ["found 1000", "take 24"]),
        (VISION | {"patch_size": 32}, 16, ["found 16; leave it out"]),
        (VISION | {"image_size": [32, 64]}, 16, ["a square grid, found VisionTransformer"]),
        ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, 32, ["vision transformer", "found ModifiedResNet"]),
        (timm_vision("resnet18", timm_pool="avg"), 80, ["vision transformer", "found ResNet; leave it out"]),
        (timm_vision("test_vit"), 88, ["16 pixels, below the 160 pixels of its pictures, found 88", "take 80"]),
    ],
)  # fmt: skip
def test_a_model_that_cannot_see_smaller_pictures(vision: dict[str, Any], size: int, words: list[str]) -> None:
    model = model_of(vision)
    for make in (check_resolution, set_resolution, TwoResolutions):
        with pytest.raises(UserError) as caught:
            make(model, size)
        (line,) = caught.value.lines
        assert line.startswith(f"learner.scoring_resolution = {size}: expected ")
        for word in words:
            assert word in line


def test_a_recipes_learner_is_refused_when_it_is_made(tmp_path: Path) -> None:
    write_tiny(tmp_path, vision_cfg=VISION)
    section = LearnerSection(model="tiny.json", scoring_resolution=12)
    with pytest.raises(UserError, match=r"scoring_resolution = 12: .* take 8"):
        create_model(section, role="learner", base=tmp_path, seed=0)
    create_model(section.model_copy(update={"scoring_resolution": SIZE}), role="learner", base=tmp_path, seed=0)


# --- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.3, 0.95, 0.001])
def test_every_stretch_of_a_batch_has_its_share(share: float) -> None:
    b = 240
    seen = {tuple(approximate_rows(b, share, seed=7, number=number).tolist()) for number in range(40)}
    for rows in seen:
        for n in (1, 2, 5, 60, 240):
            for first in range(0, b, n):
                assert abs(sum(rows[first : first + n]) - share * n) < 1
    assert len(seen) > 1
    assert approximate_rows(b, share, seed=7, number=3).equal(approximate_rows(b, share, seed=7, number=3))


def test_over_many_batches_each_row_has_its_share() -> None:
    drawn = torch.stack([approximate_rows(12, 0.25, seed=1, number=number) for number in range(4000)])
    assert (drawn.float().mean(0) - 0.25).abs().max() < 0.03
    assert not approximate_rows(12, 0.5, seed=1, number=0).equal(~approximate_rows(12, 0.5, seed=1, number=0))


def test_smaller_pictures_are_resized_as_scoring_does() -> None:
    pixels, _ = batch_of(5)
    expected = functional.resize(
        pixels.permute(0, 3, 1, 2).float(), [SIZE, SIZE], functional.InterpolationMode.BICUBIC, antialias=True
    )
    found = downscaled(pixels, SIZE)
    assert found.dtype == torch.uint8
    assert found.shape == (5, SIZE, SIZE, 3)
    assert (found.permute(0, 3, 1, 2) - expected.clamp(0, 255)).abs().max() <= 1.5
    assert downscaled(pixels[:0], SIZE).shape == (0, SIZE, SIZE, 3)


# --- the step --------------------------------------------------------------------------------------------------------

SHARE, SEED = 0.25, 11


def of_two(trainee: Trainee, share: float = SHARE, size: int = SIZE) -> Trainee:
    """The trainee, which sees a share of each batch at a lower resolution."""
    return replace(trainee, approximate=Approximate(model=TwoResolutions(trainee.model, size), share=share, seed=SEED))


def oracle(
    trainee: Trainee, vision: dict[str, Any], pixels: Tensor, texts: Tensor, size: int, share: float = SHARE
) -> tuple[float, dict[str, Tensor]]:
    """Two forward passes, the second by open_clip's own model of that size, and one loss."""
    rows = approximate_rows(len(pixels), share, seed=SEED, number=0)
    model = trainee.model.train()
    small_model = model_of(vision, force_image_size=size).train()
    state = dict(model.named_parameters())
    if "visual.positional_embedding" in state:
        resize_pos_embed(state, small_model)
    else:
        trunk = small_model.visual.trunk
        state["visual.trunk.pos_embed"] = resample_abs_pos_embed(
            state["visual.trunk.pos_embed"],
            trunk.patch_embed.grid_size,
            num_prefix_tokens=0 if trunk.no_embed_class else trunk.num_prefix_tokens,
        )
    whole = model(trainee.normalize(pixels[~rows]), texts[~rows])
    small = torch.func.functional_call(
        small_model, state, (trainee.normalize(downscaled(pixels[rows], size)), texts[rows])
    )
    zimg, ztxt = (torch.empty(len(pixels), whole[0].shape[1]) for _ in range(2))
    for z, side in ((zimg, 0), (ztxt, 1)):
        z[~rows], z[rows] = whole[side], small[side]
    value = literal(trainee.loss, zimg, ztxt, *whole[2:4])
    value.backward()
    return value.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("micro_batch", [10**6, 20, 7, 1])  # of 1: parts without a smaller picture, and of one alone
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_at_two_resolutions_is_two_passes_and_one_loss(tmp_path: Path, loss: str, micro_batch: int) -> None:
    batch = batch_of(48)
    mixed = of_two(trainee_of(tmp_path, loss, micro_batch=micro_batch, vision_cfg=VISION))
    value, found = gradients(mixed, *batch)
    plain = trainee_of(tmp_path, loss, vision_cfg=VISION)
    expected, grads = oracle(plain, VISION, *batch, SIZE)
    assert value == pytest.approx(expected, abs=1e-5)
    alike(found, grads)
    whole, _ = gradients(trainee_of(tmp_path, loss, vision_cfg=VISION), *batch)
    assert abs(whole - value) > 1e-4  # the smaller pictures are really smaller


@pytest.mark.parametrize("tower", [name for name in TOWERS if name != "open_clip"])
def test_a_step_at_two_resolutions_of_other_towers(tmp_path: Path, tower: str) -> None:
    vision, size = TOWERS[tower]
    pixels, texts = batch_of(12, vision["image_size"])
    mixed = of_two(trainee_of(tmp_path, "sigmoid", micro_batch=5, vision_cfg=vision), 0.5, size)
    value, found = gradients(mixed, pixels, texts)
    expected, grads = oracle(trainee_of(tmp_path, "sigmoid", vision_cfg=vision), vision, pixels, texts, size, 0.5)
    assert value == pytest.approx(expected, abs=1e-5)
    alike(found, grads)


def test_parts_at_two_resolutions_drop_the_same_patches_each_time(tmp_path: Path) -> None:
    vision = VISION | {"patch_dropout": 0.5}
    batch = batch_of(24)
    trainee = of_two(trainee_of(tmp_path, "sigmoid", micro_batch=10, vision_cfg=vision))
    first, second = gradients(trainee, *batch), gradients(trainee, *batch)
    assert first[0] == second[0]
    assert all(grad.equal(second[1][name]) for name, grad in first[1].items())


def test_a_copy_of_the_model_is_not_tied_to_it(tmp_path: Path) -> None:
    trainee = of_two(trainee_of(tmp_path, "sigmoid", vision_cfg=VISION))
    names = set(trainee.model.state_dict())
    gradients(trainee, *batch_of(8))
    assert set(trainee.model.state_dict()) == names
    twin = copy.deepcopy(trainee.model).eval()
    images = trainee.normalize(batch_of(2)[0])
    before = twin.encode_image(images)
    with torch.no_grad():
        for weight in trainee.model.parameters():
            weight.zero_()
    assert twin.encode_image(images).equal(before)


@pytest.mark.parametrize(("micro_batch", "again"), [(10**6, False), (5, True), (1, False)])
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_see_the_same_rows_smaller(tmp_path: Path, micro_batch: int, again: bool, shard: bool) -> None:
    pixels, texts = batch_of(32)
    value, expected = gradients(of_two(trainee_of(tmp_path, "sigmoid", vision_cfg=VISION)), pixels, texts)

    def compare(ranks: Ranks) -> None:
        mine = slice(16 * ranks.rank, 16 * ranks.rank + 16)
        trainee = trainee_of(
            tmp_path / "ranks", "sigmoid", ranks, micro_batch=micro_batch, shard=shard, vision_cfg=VISION
        )
        if again:
            trainee.model.set_grad_checkpointing()
        loss, found = gradients(of_two(trainee), pixels[mine], texts[mine])
        assert loss == pytest.approx(value, abs=1e-5)
        alike({name: whole_tensor(grad) for name, grad in found.items()}, expected)

    on_ranks(2, compare)


@pytest.mark.exhaustive  # the compiler takes its time
@pytest.mark.timeout(1200)
def test_a_compiled_model_sees_two_resolutions(tmp_path: Path) -> None:
    pixels, texts = batch_of(32)
    trainee = replace(trainee_of(tmp_path, "sigmoid", micro_batch=16, vision_cfg=VISION), compiled=True)
    compile_model(trainee.model)
    value, found = gradients(of_two(trainee, 0.5), pixels, texts)
    expected, grads = gradients(of_two(trainee_of(tmp_path, "sigmoid", vision_cfg=VISION), 0.5), pixels, texts)
    assert value == pytest.approx(expected, abs=1e-5)
    alike(found, grads)


# --- training --------------------------------------------------------------------------------------------------------

B, SUB_BATCHES, ROUNDS = 12, 5, 2


def recipe(base: Path, root: str, *, size: int | None = SIZE, share: float = 0.5, **how: Any) -> Recipe:
    write_tiny(base, vision_cfg=VISION)
    return Recipe.model_validate(
        {
            "root": str(base / root),
            "pool": {"path": str(base / "pool")},
            "learner": {"model": "tiny.json", "scoring_resolution": size},
            "selection": {"sub_batch_size": B, "n_chunks": 4, "criterion": "learnability"},
            "train": {"warmup_steps": 2, "checkpoint_every": 3, "approximate_share": share} | how,
        }
    )


@pytest.fixture
def committed(tmp_path: Path) -> Callable[[Recipe], Recipe]:
    """Commits the same rounds in the root of a recipe."""
    pool = drawn_pool(tmp_path / "pool", rows=B * SUB_BATCHES)

    def commit(made: Recipe) -> Recipe:
        commit_rounds(Store(made.root), pool, rounds=ROUNDS, sub_batches=SUB_BATCHES, b=B)
        return made

    return commit


def test_without_a_share_training_is_what_it_was(tmp_path: Path, committed: Callable[[Recipe], Recipe]) -> None:
    plain = train(committed(recipe(tmp_path, "plain", size=None, share=0.0)), base=tmp_path)
    sized = train(committed(recipe(tmp_path, "sized", share=0.0)), base=tmp_path)
    mixed = train(committed(recipe(tmp_path, "mixed", share=0.5)), base=tmp_path)
    assert sized.losses == plain.losses
    assert sized.learner == plain.learner  # weights by their hash: a published learner has its own size
    assert mixed.losses != plain.losses
    assert mixed.learner.encoder.image_size is None
    model = load_model(Store(str(tmp_path / "mixed")), mixed.learner.encoder, CPU)[0]
    assert model.visual.positional_embedding.shape == (17, 32)


def test_a_resumed_run_sees_the_same_rows_smaller(
    tmp_path: Path, committed: Callable[[Recipe], Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(committed(recipe(tmp_path, "whole")), base=tmp_path)
    killed = committed(recipe(tmp_path, "killed"))
    real = curate.jobs.train.take_step

    def dying(*batch: Any, number: int, **how: Any) -> tuple[float, float]:
        if number == 7:
            raise KeyboardInterrupt
        return real(*batch, number=number, **how)

    with monkeypatch.context() as patch:
        patch.setattr(curate.jobs.train, "take_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(killed, base=tmp_path)
    rest = train(killed, base=tmp_path)
    assert rest.steps < whole.steps
    assert rest.losses == whole.losses[-rest.steps :]
    assert rest.learner == whole.learner


def test_a_trainer_on_two_ranks_sees_the_same_rows_smaller(
    tmp_path: Path, committed: Callable[[Recipe], Recipe]
) -> None:
    alone = train(committed(recipe(tmp_path, "alone")), base=tmp_path)
    both = committed(recipe(tmp_path, "both", micro_batch=4))
    finish(start(both, tmp_path, ranks=2))
    path = Path(both.root) / "trainer/log.jsonl"
    logged = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in logged] == [10]
    assert logged[0]["loss"] == pytest.approx(alone.losses[9], abs=1e-4)


def test_a_share_wants_a_size(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'root = "root"\npool.path = "pool"\nlearner.model = "tiny.json"\nselection = {sub_batch_size = 32}\n'
    )
    for share in ("1.0", "-0.1"):
        with pytest.raises(UserError, match=r"train.approximate_share"):
            load_recipe(tmp_path / "recipe.toml", [f"train.approximate_share={share}"])
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.toml", ["train.approximate_share=0.5"])
    (line,) = caught.value.lines
    assert "approximate_share needs learner.scoring_resolution" in line
    made = load_recipe(tmp_path / "recipe.toml", ["train.approximate_share=0.5", "learner.scoring_resolution=112"])
    plain = load_recipe(tmp_path / "recipe.toml", [])
    assert "scoring_resolution" not in plain.of_round()["learner"]  # rounds begun earlier keep their fingerprint
    assert made.fingerprint() != plain.fingerprint()
    assert load_recipe(tmp_path / "recipe.toml", ["learner.scoring_resolution=112"]).fingerprint() == made.fingerprint()


# --- rounds ----------------------------------------------------------------------------------------------------------


def of_round(base: Path, size: int | None) -> Recipe:
    made = recipe(base, "root", size=size, share=0.0)
    return made.model_copy(update={"reference": made.learner.model_copy(update={"scoring_resolution": None})})


def test_a_rounds_plan_has_the_learner_on_smaller_pictures(tmp_path: Path) -> None:
    drawn_pool(tmp_path / "pool", rows=200)
    store = Store(str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"scoring_resolution = 12: .* take 8"):
        pin_plan(store, of_round(tmp_path, 12), base=tmp_path, number=0)
    assert newest_learner(store) is None
    made = of_round(tmp_path, SIZE)
    plan = pin_plan(store, made, base=tmp_path, number=0)
    assert plan.learner is not None
    assert plan.learner.image_size == SIZE
    assert plan.reference.image_size is None
    assert Plan.from_bytes(plan.to_bytes(), "plan") == plan
    learner = newest_learner(store)
    assert learner is not None
    assert learner.encoder.image_size is None
    # A learner that the root holds by now is looked at, whatever the recipe calls it.
    record_learner(store, learner.encoder, step=3, next_batch=0)
    other = of_round(tmp_path, 12)
    write_tiny(tmp_path, "other.json", vision_cfg=VISION | {"patch_size": 4})
    other = other.model_copy(update={"learner": other.learner.model_copy(update={"model": "other.json"})})
    with pytest.raises(UserError, match=r"scoring_resolution = 12: .* take 8"):
        pin_plan(store, other, base=tmp_path, number=1)


def test_check_refuses_what_a_round_would(tmp_path: Path) -> None:
    drawn_pool(tmp_path / "pool", rows=200)
    for made, words in (
        (of_round(tmp_path, 12), "scoring_resolution = 12: expected a multiple of the learner's patches"),
        (of_round(tmp_path, 64), "below the 32 pixels of its pictures, found 64; take 24"),
    ):
        with pytest.raises(UserError) as caught:
            list(check_recipe(made, base=tmp_path, measure=False))
        (line,) = caught.value.lines
        assert words in line
    assert list(check_recipe(of_round(tmp_path, SIZE), base=tmp_path, measure=False))


def test_what_smaller_pictures_hold_of_memory() -> None:
    vision = {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
    held = []
    for share, smaller in ((0.0, None), (0.5, 32), (0.75, 32)):
        settings = TrainSection(approximate_share=share)
        how = {"rows": 96, "batch": 96, "embed_dim": 16, "device_type": "cpu"}
        held.append(trainer_memory(model_of(vision), settings=settings, smaller=smaller, **how).activations)
    # 65 tokens of a picture and 17 of a smaller one, beside the texts; attention is of the square.
    assert 0.55 * held[0] < held[1] < 0.75 * held[0]
    assert 0.4 * held[0] < held[2] < 0.6 * held[0]
