"""Checkpoints of the trainer: one safetensors file each, written atomically, enough to go on exactly.

    trainer/checkpoint-000000500.safetensors     model.<name>, optimizer.<name>.<state>; metadata: where it stands

The tensors of a training are whole, however many ranks there are and whether or not they shard the weights, so that any
number of them may go on from a checkpoint, either way.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from curate.errors import UserError
from curate.jobs.sharding import laid_out, whole_on_cpu
from curate.messages import one_line
from curate.models.spec import EncoderSpec
from curate.recipe import Recipe
from curate.storage import Store

FOLDER = "trainer"
KEPT = 2
"""Checkpoints that stay: the newest, and the one before it in case that is damaged."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands: all of a checkpoint that is not a tensor."""

    data: str
    """`rounds` or `pool`, as the recipe says."""
    start: EncoderSpec
    """The model that it started from: tells architecture, tokenizer and precision."""
    step: int
    next_batch: int
    """First batch that was not trained on; with `pool`, of the uniform ones."""
    repeats: int = 0
    """Times that the newest round has been trained on again."""
    learner: int
    """Number of the newest learner that was published, or is due."""
    learner_step: int
    """The step at which it was."""
    due: bool = False
    """Whether this very model is to be published as learner number `learner`, which is done before going on."""
    batch_losses: dict[int, float]
    """Since the last learner before this, by number of the batch."""


def save_checkpoint(
    store: Store,
    progress: Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    first: bool = True,
) -> None:
    """Write a checkpoint, then remove those that are older than the one before it.

    Args:
        store: the root.
        progress: where training stands.
        model: all ranks call this if it is sharded.
        optimizer: of its weights.
        first: whether this rank writes it.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors = whole_on_cpu(tensors, keep=first)
    if not first:
        return
    with store.local_scratch() as scratch:
        path = scratch / "checkpoint"
        record = json.dumps(asdict(progress) | {"start": progress.start.to_json()}, sort_keys=True)
        safetensors.torch.save_file(tensors, path, {"progress": record, "sha256": _sha256(record, tensors)})
        store.put_file(path, f"{FOLDER}/checkpoint-{progress.step:09d}.safetensors")
    for name in checkpoints(store)[:-KEPT]:
        store.delete(name)


def _sha256(progress: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of all that a checkpoint says: one flipped bit of a moment would be another learner, silently."""
    digest = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoints(store: Store) -> list[str]:
    """Names of the checkpoints of a root, the newest last."""
    return [name for name in store.list(FOLDER) if re.fullmatch(rf"{FOLDER}/checkpoint-\d+\.safetensors", name)]


def load_checkpoint(store: Store, name: str) -> tuple[Progress, dict[str, torch.Tensor]]:
    """A checkpoint's progress and tensors.

    Raises:
        UserError: not a checkpoint of ours, or damaged.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = store.local_path(name) or Path(scratch) / "checkpoint"
        if store.local_path(name) is None:
            store.fetch(name, path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                record = json.loads(metadata["progress"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 not a dict
            if _sha256(metadata["progress"], tensors) != metadata["sha256"]:
                raise ValueError("its content has another sha256 than when it was written")
            losses = {int(number): loss for number, loss in record["batch_losses"].items()}
            progress = Progress(**record | {"start": EncoderSpec(**record["start"]), "batch_losses": losses})
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{name}: expected a checkpoint, found something else ({one_line(error)}); delete it, and the one "
                "before it is taken"
            ) from error
    return progress, tensors


def check_kind(progress: Progress, recipe: Recipe, checkpoint: str) -> None:
    """Check that a checkpoint is of the training that the recipe asks for.

    Raises:
        UserError: it was trained on the other kind of batches.
    """
    if progress.data != recipe.train.data:
        raise UserError(
            f"train.data = {recipe.train.data!r}: {checkpoint} was trained with {progress.data!r}; choose another "
            'root, and give its model as learner.model = "local-dir:FOLDER" (curate train --save-to FOLDER)'
        )


def restore(tensors: dict[str, torch.Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into a model of the same architecture, sharded or not, and its optimiser."""
    own = model.state_dict()
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict({name: laid_out(value, own.get(name)) for name, value in weights.items()})
    # Torch knows where each state belongs: a fused AdamW has its step count on the parameter's device, others do not.
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, part = key.removeprefix("optimizer.").rpartition(".")
            state.setdefault(numbers[name], {})[part] = laid_out(value, own[name])
    groups = optimizer.state_dict()["param_groups"]  # the recipe's
    optimizer.load_state_dict({"state": state, "param_groups": groups})
