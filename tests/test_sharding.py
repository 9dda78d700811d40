"""Weights sharded over the ranks learn what whole ones learn, take their share of memory, and are stored whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from curate.jobs.checkpoint import Progress, checkpoints, load_checkpoint, restore, save_checkpoint
from curate.jobs.memory import stated_ranks, trainer_memory
from curate.jobs.optimize import Trainee, take_step
from curate.jobs.ranks import Ranks
from curate.jobs.sharding import blocks_of, compile_model, encoding, is_sharded, scalars_of, whole_on_cpu
from curate.models.spec import EncoderSpec
from curate.recipe import TrainSection
from curate.storage import Store
from tests.test_train_step import ALONE, LOSSES, batch_of, on_ranks, trainee_of

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(240)

# As many blocks in one tower as make a run, in the other one alone, which is then the root's.
VISION = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
B = 12
PROGRESS = Progress(
    data="pool",
    start=EncoderSpec(
        model="m", source="s", weights_sha256="w", embed_dim=16, logit_scale=1.0, logit_bias=0.0, precision="fp32"
    ),
    step=3,
    next_batch=3,
    learner=0,
    learner_step=0,
    batch_losses={},
)


def share(ranks: Ranks, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of another batch for each step."""
    n = B // ranks.world_size
    pixels, texts = batch_of(B)
    mine = slice(n * ranks.rank, n * ranks.rank + n)
    return pixels.roll(step, 1)[mine], texts.roll(step, 1)[mine]


def unlike(trainee: Trainee, other: Trainee) -> dict[str, float]:
    """Largest difference of each weight."""
    ours, theirs = (whole_on_cpu(each.model.state_dict(), keep=True) for each in (trainee, other))
    assert ours.keys() == theirs.keys()
    for weights in (ours, theirs):
        for name, weight in weights.items():
            # A key's bias moves all logits of a query alike: its gradient is rounding alone, which AdamW makes large.
            if name.endswith("in_proj_bias"):
                weights[name] = torch.cat([weight.chunk(3)[0], weight.chunk(3)[2]])
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}


def stored(store: Store, trainee: Trainee, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of it, on every rank."""
    save_checkpoint(store, PROGRESS, trainee.model, trainee.optimizer, first=ranks.first)
    if ranks.world_size > 1:
        dist.barrier()
    return load_checkpoint(store, checkpoints(store)[-1])[1]


def same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(tensor.equal(others[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, [*((loss, 10**6, False) for loss in LOSSES), ("sigmoid", 3, False), ("softmax", 3, True)]),
        (3, [("sigmoid", 3, True)]),
    ],
)
def test_sharded_weights_learn_what_whole_ones_do(
    tmp_path: Path, count: int, cases: list[tuple[str, int, bool]]
) -> None:
    def compare(ranks: Ranks) -> None:
        for number, (loss, micro_batch, again) in enumerate(cases):
            folder = tmp_path / str(number)
            how: dict[str, Any] = {"micro_batch": micro_batch, "vision_cfg": VISION}
            whole = trainee_of(folder / "whole", loss, ranks, **how)
            sharded = trainee_of(folder / "sharded", loss, ranks, shard=True, **how)
            assert is_sharded(sharded.model)
            if again:
                sharded.model.set_grad_checkpointing()
            for step in range(4):
                expected = take_step(whole, *share(ranks, step), rate=1e-3)
                assert take_step(sharded, *share(ranks, step), rate=1e-3) == pytest.approx(expected, rel=1e-5)
            assert max(unlike(sharded, whole).values()) < 1e-6
            dist.barrier()

    on_ranks(count, compare)


def test_a_gradient_is_clipped_as_a_whole(tmp_path: Path) -> None:
    def compare(ranks: Ranks) -> None:
        gradients = []
        for shard in (False, True):
            trainee = trainee_of(tmp_path / str(shard), "sigmoid", ranks, shard=shard, vision_cfg=VISION)
            trainee = replace(trainee, grad_clip=0.5)
            assert take_step(trainee, *share(ranks, 0), rate=0.0)[1] > 0.5
            found = {name: weight.grad for name, weight in trainee.model.named_parameters()}
            gradients.append(whole_on_cpu(found, keep=True))
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradient, gradients[0][name], atol=1e-7, rtol=1e-5)
        norm = torch.stack([gradient.norm() for gradient in gradients[1].values()]).norm()
        assert norm.item() == pytest.approx(0.5, rel=1e-4)
        dist.barrier()

    on_ranks(2, compare)


@pytest.mark.parametrize("count", [2, 3])
def test_checkpoints_are_whole_and_go_either_way(tmp_path: Path, count: int) -> None:
    def compare(ranks: Ranks) -> None:
        store = Store(str(tmp_path / "store"))
        kinds = [
            trainee_of(tmp_path / f"{shard}", "sigmoid", ranks, shard=shard, vision_cfg=VISION) for shard in (0, 1)
        ]
        whole, sharded = kinds
        for step in range(3):
            take_step(sharded, *share(ranks, step), rate=1e-3)
        tensors = stored(store, sharded, ranks)
        moments = [name for name in tensors if name.startswith("optimizer.") and not name.endswith(".step")]
        assert len(moments) == 2 * len(list(sharded.model.parameters()))
        restore(tensors, whole.model, whole.optimizer)  # whole ones go on from sharded ones
        assert same(stored(store, whole, ranks), tensors)
        for each in kinds:
            take_step(each, *share(ranks, 3), rate=1e-3)
        assert max(unlike(sharded, whole).values()) < 1e-6
        tensors = stored(store, whole, ranks)
        restore(tensors, sharded.model, sharded.optimizer)  # and sharded ones from whole ones
        assert same(stored(store, sharded, ranks), tensors)
        for state in sharded.optimizer.state.values():  # each rank has its part, not a view of all
            for part in (each.to_local() for each in state.values() if isinstance(each, DTensor)):
                assert part.untyped_storage().nbytes() == part.nbytes
        for each in kinds:
            take_step(each, *share(ranks, 4), rate=1e-3)
        assert max(unlike(sharded, whole).values()) < 1e-6
        dist.barrier()

    on_ranks(count, compare)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_make_up_the_whole(tmp_path: Path, count: int) -> None:
    whole = trainee_of(tmp_path / "whole", "sigmoid", vision_cfg=VISION).model
    sizes = {name: weight.numel() for name, weight in whole.named_parameters()}

    def compare(ranks: Ranks) -> None:
        trainee = trainee_of(tmp_path / "sharded", "sigmoid", ranks, shard=True, vision_cfg=VISION)
        take_step(trainee, *share(ranks, 0), rate=1e-3)
        with encoding(trainee.model), torch.no_grad():
            trainee.model.encode_text(share(ranks, 0)[1])
        scalars = {id(scalar) for scalar in scalars_of(trainee.model)}
        held = 0
        for name, weight in trainee.model.named_parameters():
            state = trainee.optimizer.state[weight]
            kept = [weight, weight.grad, state["exp_avg"], state["exp_avg_sq"]]
            if id(weight) in scalars:
                assert not any(isinstance(tensor, DTensor) for tensor in kept)
                continue
            own = {tensor.to_local().numel() for tensor in kept}  # sharded, even the root's after an evaluation
            assert len(own) == 1
            rows = -(-weight.shape[0] // count)
            assert own.pop() <= rows * (weight.numel() // weight.shape[0]), name
            mine = torch.tensor(weight.to_local().numel())
            held += int(mine)
            assert int(ranks.sum(mine)) == sizes[name], name
        # The vocabulary is nearly all of a tiny model, and is divided evenly.
        assert held == pytest.approx(sum(sizes.values()) / count, rel=0.01)
        dist.barrier()

    on_ranks(count, compare)


def test_sharded_towers_embed_as_whole_ones(tmp_path: Path) -> None:
    def compare(ranks: Ranks) -> None:
        pixels, texts = share(ranks, 0)
        embedded = []
        for shard in (False, True):
            trainee = trainee_of(tmp_path / str(shard), "sigmoid", ranks, shard=shard, vision_cfg=VISION)
            for _ in range(2):  # before the first step, whose gradient wants what was gathered, and after it
                with encoding(trainee.model), torch.no_grad():
                    images = trainee.normalize(pixels)
                    embedded += [trainee.model.encode_image(images), trainee.model.encode_text(texts, normalize=True)]
                take_step(trainee, pixels, texts, rate=1e-3)
            hooks = trainee.model.logit_bias._backward_hooks
            assert not hooks, "they would pile up"
        half = len(embedded) // 2
        for ours, theirs in zip(embedded[half:], embedded[:half], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        dist.barrier()

    on_ranks(2, compare)


def test_one_rank_holds_all(tmp_path: Path) -> None:
    trainee = trainee_of(tmp_path, "sigmoid", ALONE, shard=True)
    assert not is_sharded(trainee.model)


def test_what_is_gathered_at_once(tmp_path: Path) -> None:
    model = trainee_of(tmp_path, "sigmoid", vision_cfg=VISION).model
    assert list(blocks_of(model)) == list(model.visual.transformer.resblocks)


def test_the_stated_memory_is_divided(tmp_path: Path) -> None:
    model = trainee_of(tmp_path, "sigmoid", vision_cfg=VISION).model
    how: dict[str, Any] = {"batch": 16, "embed_dim": 16, "device_type": "cpu"}
    whole, sharded = (
        trainer_memory(model, rows=4, settings=TrainSection(fully_shard=shard), **how) for shard in (False, True)
    )
    weights = sum(weight.nbytes for weight in model.parameters())
    assert (whole.weights, whole.gathered) == (5 * weights, 0)  # with what is sent of the gradient
    assert sharded.weights == weights
    block = sum(weight.nbytes for weight in model.visual.transformer.resblocks[0].parameters())
    assert sharded.gathered == 2 * (weights - 3 * block) + 4 * block
    assert f"as one of 4 and {sharded.gathered / 1e9:.2f} GB gathered" in str(sharded)
    alone = trainer_memory(model, rows=16, settings=TrainSection(fully_shard=True), **how)
    assert (alone.weights, alone.gathered) == (4 * weights, 0)
    assert [stated_ranks(b, TrainSection(fully_shard=True)) for b in (16, 12, 7, 11)] == [8, 6, 7, 1]


@pytest.mark.exhaustive  # the compiler takes its time
@pytest.mark.filterwarnings("ignore")  # and says what it thinks of the model
def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    def compare(ranks: Ranks) -> None:
        how: dict[str, Any] = {"micro_batch": 3, "vision_cfg": VISION}
        whole = trainee_of(tmp_path / "whole", "sigmoid", ranks, **how)
        sharded = replace(trainee_of(tmp_path / "sharded", "sigmoid", ranks, shard=True, **how), compiled=True)
        compile_model(sharded.model)
        for step in range(3):
            expected = take_step(whole, *share(ranks, step), rate=1e-3)
            assert take_step(sharded, *share(ranks, step), rate=1e-3) == pytest.approx(expected, rel=1e-4)
        assert max(unlike(sharded, whole).values()) < 1e-5
        dist.barrier()

    on_ranks(2, compare)
