"""Weights of other trainers: below which key they lie, and what torch's wrappers have put before their names.

open_clip opens a plain state dict, one below `state_dict`, and names that all begin with `module.`. Whatever else holds
the weights of the very model is rewritten so that it does; anything that is not exactly those is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from curate.errors import UserError

BELOW = ("state_dict", "model_state_dict", "model")
"""Keys under which trainers keep a model's weights, beside epoch, optimiser and the like."""
WRAPPERS = ("module", "_orig_mod")
"""Parts of names that DistributedDataParallel, averaging and torch.compile add."""
SCALARS = ("logit_scale", "logit_bias")
"""Of these open_clip itself takes a number for a row of one, and the other way round."""
LISTED = 12


def bare_weights(path: Path, model: torch.nn.Module, scratch: Path, *, weights_only: bool) -> Path:
    """A file with the weights as open_clip's `load_checkpoint` opens them: this one, or a copy of its weights alone.

    Args:
        path: a checkpoint whose unpickling, if it has any, is settled: `.npz` and `.npy` are not looked at.
        model: that the weights are for.
        scratch: folder for the copy.
        weights_only: as torch.load takes it.

    Raises:
        UserError: no weights at the top nor below one of `BELOW`, several of them, or a weight of another shape.
        Exception: whatever safetensors and torch raise for files that are not theirs.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if path.suffix in (".npz", ".npy"):
        return path
    if path.name.endswith(".safetensors"):  # as open_clip knows them
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
            bare = _bare_names(names, own, path)
            _check_shapes({bare[name]: tuple(file.get_slice(name).get_shape()) for name in names}, own, path)
            if all(name == bare[name] for name in names):
                return path
            weights: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in names}
    else:
        found = torch.load(path, map_location="cpu", weights_only=weights_only)
        if isinstance(found, torch.jit.ScriptModule):  # as OpenAI published theirs; open_clip knows what to take of it
            return path
        weights = _only_weights(found, path)
        bare = _bare_names(list(weights), own, path)
        _check_shapes({bare[name]: tuple(tensor.shape) for name, tensor in weights.items()}, own, path)
    copy = scratch / "weights.pt"
    torch.save({bare[name]: tensor for name, tensor in weights.items()}, copy)
    return copy


def _only_weights(found: Any, path: Path) -> Mapping[str, Tensor]:
    """The one state dict of a checkpoint."""
    candidates = list(_state_dicts(found))
    if len(candidates) == 1:
        return candidates[0]
    holds = _listed(list(found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
    raise UserError(
        f"{path}: expected the weights at the top or below one of {', '.join(BELOW)}, found "
        f"{'several of these in' if candidates else 'none in'} {holds}; weights must fit the model and be complete: "
        "save the model's state_dict() alone, as .safetensors"
    )


def _state_dicts(found: Any) -> Iterator[Mapping[str, Tensor]]:
    if not isinstance(found, Mapping) or not found:
        return
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        yield found
        return
    for key in BELOW:
        yield from _state_dicts(found.get(key))


def _bare_names(names: Sequence[str], own: Mapping[str, object], path: Path) -> dict[str, str]:
    """Each name without what wrappers added, wherever in it, unless the model itself has such names."""
    added = set(WRAPPERS).difference(part for name in own for part in name.split("."))
    bare = {name: ".".join(part for part in name.split(".") if part not in added) for name in names}
    if len(set(bare.values())) < len(bare) or "logit_scale" not in bare.values():
        raise UserError(
            f"{path}: expected each weight of the model once, logit_scale among them, found {_listed(names)}; weights "
            "must fit the model and be complete: save the model's state_dict() alone, as .safetensors"
        )
    return bare


def _check_shapes(found: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """That no weight has another shape: open_clip stretches position embeddings, and what it makes is another model."""
    for name, shape in found.items():
        wanted = own.get(name, own.get(f"text.{name}"))  # a text tower of its own, or not
        if wanted is not None and shape != wanted and name not in SCALARS:
            raise UserError(
                f"{path}: size mismatch: expected {name} {list(wanted)}, found {list(shape)}; weights must fit the "
                "model: give the configuration that they were trained with"
            )


def _listed(names: Sequence[Any]) -> str:
    shown = [name if isinstance(name, str) and name.isprintable() else repr(name)[:80] for name in names[:LISTED]]
    return f"the keys {', '.join(shown)}{', …' if len(names) > LISTED else ''}" if names else "no key"
