"""From what a recipe names to an open_clip model: name and tag, checkpoint, folder, JSON config, hub repository."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub import constants
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, _find_checkpoint_in_dir, load_checkpoint

from curate.errors import UserError
from curate.messages import one_line
from curate.models.hub import hub_if_it_answers, without_hub
from curate.models.resolution import check_resolution
from curate.models.weights import bare_weights
from curate.models.words import remembering
from curate.recipe import EncoderSection, LearnerSection
from curate.seeds import derive_seed

CONFIG_NAME = "open_clip_config.json"
TEXT_CONFIG_NAME = "config.json"
"""As transformers names the configuration of a text tower of its own."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
"""All that tokenizers of transformers consist of."""
OpenClip = tuple[Any, dict[str, Any], Any]
"""A model, its model configuration and its tokenizer: what open_clip makes of one name."""
NEVER_UNPICKLED = (".safetensors", ".npz", ".npy")
"""How open_clip knows formats that cannot run code; it unpickles files of every other name."""


def create_model(section: EncoderSection, *, role: str, base: Path, seed: int) -> OpenClip:
    """The open_clip model that a recipe names, with its model configuration and its tokenizer.

    Raises:
        UserError: unknown model or tag, weights that are missing, do not fit, an untrusted pickle, a hub that does not
            answer; a learner that cannot be scored at the size that the recipe names.
    """
    name, folder = section.model, None
    with tempfile.TemporaryDirectory() as scratch:
        if from_json := name.endswith(".json"):
            folder = _as_folder(base / name, Path(scratch), role)
        elif name.startswith(LOCAL_DIR_PREFIX):
            folder = Path(name.removeprefix(LOCAL_DIR_PREFIX))
            _check_folder(folder, role, trusted=section.trusted)
        elif not name.startswith(HF_HUB_PREFIX) and name not in open_clip.list_models():
            raise UserError(
                f"{role}.model = {name!r}: not an open_clip model; `python -c 'import open_clip; "
                "print(open_clip.list_models())'` lists them, or give local-dir:FOLDER or a JSON config"
            )
        checkpoint = _checkpoint(section, folder, role)
        tag = None if checkpoint else section.pretrained
        weights_only = not section.trusted
        needs = _hub_repositories(name, tag, folder, complete=not from_json)
        torch.manual_seed(derive_seed(seed, "weights"))
        with hub_if_it_answers() if needs else without_hub() as silent:
            try:
                if folder is None:
                    model = open_clip.create_model(
                        name,
                        tag,
                        # Or open_clip fetches a text tower's own weights where random ones are asked for, and takes
                        # random ones where those that are asked for are missing.
                        pretrained_text=False,
                        require_pretrained=tag is not None or (name.startswith(HF_HUB_PREFIX) and not checkpoint),
                        weights_only=weights_only,
                    )
                    config = open_clip.get_model_config(name)
                    tokenizer = _tokenizer_of(config, Path(scratch))
                else:
                    if from_json:
                        _complete_folder(folder)
                    if not from_json and not checkpoint:
                        checkpoint = _folder_checkpoint(folder)
                    model, config, tokenizer = open_folder(folder, loads=False)
                if checkpoint:
                    bare = bare_weights(checkpoint, model, Path(scratch), weights_only=weights_only)
                    load_checkpoint(model, str(bare), weights_only=weights_only)
            except UserError:
                raise
            except Exception as error:  # a wrong configuration or checkpoint raises whatever open_clip and torch like
                raise _cannot_load(error, section, role, needs, silent) from error
    if isinstance(section, LearnerSection) and section.scoring_resolution is not None:
        check_resolution(model, section.scoring_resolution)
    return model, config, tokenizer


def _folder_checkpoint(folder: Path) -> Path:
    """The file in a folder that open_clip would take the weights from."""
    found = _find_checkpoint_in_dir(folder)
    if found is None:
        raise FileNotFoundError(f"no weights in {folder}")
    return Path(found)


def open_folder(folder: Path, *, device: torch.device | str = "cpu", loads: bool = True) -> OpenClip:
    """The model in an open_clip `local-dir` folder; with `loads` its weights must be there."""
    name = f"{LOCAL_DIR_PREFIX}{folder}"
    config = open_clip.get_model_config(name)
    changed = {}
    if "hf_model_name" in config["text_cfg"] and (folder / TEXT_CONFIG_NAME).is_file():
        # open_clip would ask the hub for the text tower's configuration.
        changed["text_cfg"] = config["text_cfg"] | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    model = open_clip.create_model(
        name,
        device=device,
        load_weights=loads,
        pretrained_text=False,
        require_pretrained=loads,
        **changed,
    )
    return model, config, remembering(open_clip.get_tokenizer(name))


def _tokenizer_of(config: dict[str, Any], scratch: Path) -> Any:
    """The tokenizer that a configuration names."""
    (scratch / CONFIG_NAME).write_text(json.dumps({"model_cfg": config}))
    _complete_folder(scratch)
    return open_clip.get_tokenizer(f"{LOCAL_DIR_PREFIX}{scratch}")


def _complete_folder(folder: Path) -> None:
    """Put beside a configuration what it names of the hub: tokenizer, and the text tower's configuration."""
    text = open_clip.get_model_config(f"{LOCAL_DIR_PREFIX}{folder}")["text_cfg"]
    for name, files in (
        (text.get("hf_tokenizer_name"), (*TOKENIZER_FILES, TEXT_CONFIG_NAME)),
        (text.get("hf_model_name"), (TEXT_CONFIG_NAME,)),
    ):
        if not name:
            continue
        # By transformers itself a repository that was downloaded is not found without the hub if it has no config.json.
        found = name if Path(name).is_dir() else huggingface_hub.snapshot_download(name, allow_patterns=list(files))
        for path in Path(found).iterdir():
            if path.is_file() and any(path.match(pattern) for pattern in files):
                shutil.copyfile(path, folder / path.name)


def _hub_repositories(name: str, tag: str | None, folder: Path | None, *, complete: bool) -> list[str]:
    """What of the hub a model is made from.

    Args:
        name: of the model.
        tag: of pretrained weights.
        folder: that it lies in, if it does.
        complete: whether the folder holds more than a configuration.
    """
    if name.startswith(HF_HUB_PREFIX):
        return [name.removeprefix(HF_HUB_PREFIX)]
    config = open_clip.get_model_config(name if folder is None else f"{LOCAL_DIR_PREFIX}{folder}")
    text = config.get("text_cfg", {})
    found = []
    if tag is not None and folder is None:
        found.append(str(open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or "").rpartition("/")[0])
    if folder is None or not complete:
        found.append(text.get("hf_tokenizer_name"))
    if folder is None or not (folder / TEXT_CONFIG_NAME).is_file():
        found.append(text.get("hf_model_name"))
    return list(dict.fromkeys(repository for repository in found if repository and not Path(repository).exists()))


def _cannot_load(
    error: Exception, section: EncoderSection, role: str, needs: Sequence[str], silent: str | None
) -> UserError:
    """What went wrong when a model was made, and the way out."""
    where = f"{role}.model = {section.model!r}, pretrained = {section.pretrained!r}"
    reason = one_line(error, 300)
    if isinstance(error, ImportError):
        return UserError(f"{where}: a package is missing ({reason}); pip install {error.name or 'what it names'}")
    if silent:
        return UserError(
            f"{where}: needs {' and '.join(needs)} of the Hugging Face hub, which does not answer ({silent}), and "
            f"{constants.HF_HUB_CACHE} does not hold all of it; where the hub answers, pip install huggingface_hub, hf "
            f"download {needs[0]}, and copy that folder here; or give local-dir:FOLDER"
        )
    return UserError(
        f"{where}: cannot be loaded ({reason}); weights must fit the model and be complete, and a folder must hold them"
    )


def _checkpoint(section: EncoderSection, folder: Path | None, role: str) -> Path | None:
    """The checkpoint file that `pretrained` names, or None where it is a tag or nothing."""
    tag, name = section.pretrained, section.model
    if tag is None:
        return None
    tags = [] if folder or name.startswith(HF_HUB_PREFIX) else open_clip.list_pretrained_tags_by_model(name)
    if tag in tags:
        return None
    path = Path(tag)
    if not path.is_file():
        raise UserError(
            f"{role}.pretrained = {tag!r}: neither a file ({path}) nor a tag of {name} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    _refuse_pickle(path, role, trusted=section.trusted)
    return path


def _refuse_pickle(path: Path, role: str, *, trusted: bool) -> None:
    if path.suffix not in NEVER_UNPICKLED and not trusted:
        raise UserError(
            f"{path}: a checkpoint of this kind is unpickled, which can run code; convert it to .safetensors, "
            f"or set {role}.trusted = true if you made it yourself"
        )


def _check_folder(folder: Path, role: str, *, trusted: bool) -> None:
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{role}.model: expected {CONFIG_NAME} in {folder}, found none; save it with open_clip's save_for_hf"
        )
    config = _read_json(folder / CONFIG_NAME, role)
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise UserError(
            f"{role}.model: {folder / CONFIG_NAME} lacks model_cfg; save the model with open_clip's save_for_hf"
        )
    _check_config(config["model_cfg"], folder / CONFIG_NAME, role)
    if not list(folder.glob("*.safetensors")):
        for path in [*folder.glob("*.bin"), *folder.glob("*.pth")]:  # the others that open_clip looks for
            _refuse_pickle(path, role, trusted=trusted)


def _as_folder(path: Path, scratch: Path, role: str) -> Path:
    """An open_clip model config as the local-dir folder that open_clip loads without a registry."""
    config = _read_json(path, role, encoding="utf-8-sig")  # editors of Windows begin a file with a mark
    _check_config(config, path, role)
    (scratch / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return scratch


def _read_json(path: Path, role: str, *, encoding: str = "utf-8") -> Any:
    try:
        return json.loads(path.read_text(encoding=encoding))
    except OSError as error:
        raise UserError(
            f"{role}.model: expected an open_clip JSON config at {path}, found none ({error.strerror})"
        ) from None
    except ValueError as error:
        raise UserError(f"{role}.model: {path} is not valid JSON ({one_line(error)}); mend it") from None


def _check_config(config: Any, path: Path, role: str) -> None:
    missing = {"embed_dim", "vision_cfg", "text_cfg"}.difference(config if isinstance(config, dict) else ())
    if missing:
        raise UserError(
            f"{role}.model: {path} lacks {', '.join(sorted(missing))}; copy one of open_clip's model_configs"
        )
