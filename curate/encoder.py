"""Learner and reference: open_clip models, named by what they are and loaded from the root everywhere.

Whatever form a model comes in (open_clip name and tag, checkpoint file, folder, JSON config), it is stored once in
the root as an open_clip `local-dir` folder under the hash of its content. Workers load that, so a cluster needs no
shared disk beside the root, and `open_clip.create_model("local-dir:…/models/<sha>")` opens it anywhere.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import open_clip
import PIL.Image
import safetensors.torch
import torch
from huggingface_hub import constants
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, _find_checkpoint_in_dir, load_checkpoint
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor

from curate.errors import UserError
from curate.hub import hub_if_it_answers, without_hub
from curate.messages import one_line
from curate.recipe import DeviceType, EncoderSection, Precision
from curate.seeds import derive_seed
from curate.spec import WEIGHTS_NAME, EncoderSpec
from curate.storage import Store
from curate.weights import bare_weights

CONFIG_NAME = "open_clip_config.json"
TEXT_CONFIG_NAME = "config.json"
"""As transformers names the configuration of a text tower of its own."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
"""All that tokenizers of transformers consist of."""
OpenClip = tuple[Any, dict[str, Any], Any]
"""A model, its model configuration and its tokenizer: what open_clip makes of one name."""
NEVER_UNPICKLED = (".safetensors", ".npz", ".npy")
"""How open_clip knows formats that cannot run code; it unpickles files of every other name."""


@dataclass(frozen=True)
class Crop:
    """The pixels that a model sees of a picture, [H, W, 3]; goes to other processes, where the model need not."""

    transform: Compose

    def __call__(self, image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
        """Crop one picture."""
        return np.asarray(self.transform(image))


class Encoder:
    """A loaded model with its own transform and tokenizer; `encode` is the whole interface."""

    def __init__(self, spec: EncoderSpec, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.model = model.eval().requires_grad_(False)
        self.tokenize: Callable[[Sequence[str]], Tensor] = tokenizer
        # open_clip's transform, cut before its last two steps: 8-bit pixels are a quarter of the floats to hold and
        # to send, and the same division by 255 and normalisation of a whole batch gives the same floats.
        *crop, to_tensor, self._shift = eval_transform(self.model).transforms
        assert isinstance(to_tensor, ToTensor), to_tensor
        assert isinstance(self._shift, Normalize), self._shift
        self.crop = Crop(Compose(crop))
        # Not the transform's own repr, which tells no fill colour.
        cfg = _preprocess_cfg(self.model)
        self.view = repr((cfg.size, cfg.interpolation, cfg.resize_mode, cfg.fill_color))
        """Encoders with equal views see equal pixels before normalisation."""

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [n, H, W, 3] on any device as open_clip's transform ends with them, float32 [n, 3, H, W]."""
        images: Tensor = self._shift(pixels.permute(0, 3, 1, 2).contiguous().float().div(255))
        return images

    @torch.inference_mode()
    def encode(self, pixels: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pairs.

        Args:
            pixels: uint8 [n, H, W, 3] as `crop` makes them.
            texts: int64 [n, L] as `tokenize` makes them.

        Returns:
            zimg and ztxt, float32 [n, D] on the CPU; a row may be non-finite or zero, which is the caller's to judge.
        """
        bf16 = self.spec.precision == "bf16"
        images = self.normalize(pixels.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            zimg = self.model.encode_image(images, normalize=False)
            ztxt = self.model.encode_text(texts.to(self.device, non_blocking=True), normalize=False)
        # In float32: in bfloat16 a row that was divided by its norm is up to 0.3 % off unit length.
        return normalize(zimg.float(), dim=-1).cpu(), normalize(ztxt.float(), dim=-1).cpu()


def load_encoder(store: Store, spec: EncoderSpec, device: torch.device) -> Encoder:
    """Load a model from the root to embed with; raises as `load_model`."""
    model, _, tokenizer = load_model(store, spec, device)
    return Encoder(spec, model, tokenizer, device)


def load_model(store: Store, spec: EncoderSpec, device: torch.device) -> OpenClip:
    """Load a model from the root to train on.

    Raises:
        UserError: if the stored files are not the ones that the record names.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = store.local_path(spec.folder) or fetch_model(store, spec, Path(scratch))
        weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
        found = _sha256(weights) if weights.is_file() else "none"
        if found != spec.weights_sha256:
            raise UserError(
                f"{spec.folder}/{WEIGHTS_NAME}: expected sha256 {spec.weights_sha256[:12]}, found {found[:12]}; "
                "the file was changed after it was stored: restore it from a copy of the root"
            )
        if not config.is_file() or _identity(folder, found) != spec.model:
            raise UserError(
                f"{spec.folder}/{CONFIG_NAME}: expected the configuration and tokenizer that its folder names, found "
                "others; one was changed after it was stored: restore the folder from a copy of the root"
            )
        with without_hub():  # all that a model needs lies in its folder
            return _open_folder(folder, device=device)


def fetch_model(store: Store, spec: EncoderSpec, folder: Path) -> Path:
    """Copy a model out of the root, as a folder that open_clip's `local-dir:` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in store.list(spec.folder):
        with store.open_input(name) as source, (folder / Path(name).name).open("wb") as target:
            shutil.copyfileobj(source, target, 2**24)
    return folder


def store_encoder(
    store: Store, section: EncoderSection, *, role: str, base: Path, seed: int, device_type: DeviceType = "cpu"
) -> EncoderSpec:
    """Make the model that a recipe names and store it in the root, unless it is there already.

    Args:
        store: the root.
        section: the recipe's `[reference]` or `[learner]`.
        role: `reference` or `learner`, for messages.
        base: the recipe's folder, where JSON configs lie; other paths start at the working directory.
        seed: of random weights, where the recipe names no pretrained ones.
        device_type: what the model will run on.

    Raises:
        UserError: unknown model or tag, weights that are missing, do not fit or are not finite, an untrusted pickle, a
            hub that does not answer.
    """
    model, config, tokenizer = create_model(section, role=role, base=base, seed=seed)
    return store_model(
        store, model, config, tokenizer, source=section.source, precision=section.precision_on(device_type)
    )


def store_model(
    store: Store,
    model: torch.nn.Module,
    config: dict[str, Any],
    tokenizer: Any,
    *,
    source: str,
    precision: Precision = "fp32",
) -> EncoderSpec:
    """Write an open_clip model as `models/<sha>/`; its name is its content, so doing it twice changes nothing.

    Raises:
        UserError: a weight is not finite: nothing that such a model embeds can be used.
    """
    check_storable(model, config, source=source)
    with store.local_scratch() as scratch:
        folder = scratch / "model"
        folder.mkdir()
        (folder / CONFIG_NAME).write_text(json.dumps(_stored_config(model, config), indent=2))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)
        if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
            tokenizer.save_pretrained(folder)
        if (text := _hub_text_tower(model)) is not None:
            text.config.save_pretrained(folder)
        weights = _sha256(folder / WEIGHTS_NAME)
        spec = EncoderSpec(
            model=_identity(folder, weights),
            source=source,
            weights_sha256=weights,
            embed_dim=config["embed_dim"],
            logit_scale=float(tensors["logit_scale"].exp()),
            logit_bias=float(tensors["logit_bias"]) if "logit_bias" in tensors else 0.0,
            precision=precision,
        )
        # The configuration goes last: a folder that has one is complete.
        if not store.exists(f"{spec.folder}/{CONFIG_NAME}"):
            for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                store.put_file(path, f"{spec.folder}/{path.name}")
    return spec


def check_storable(model: torch.nn.Module, config: dict[str, Any], *, source: str) -> None:
    """Check a model as `store_model` does, and write nothing.

    Raises:
        UserError: as `store_model`.
    """
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise UserError(f"{source}: the weights {broken} are not all finite; take a checkpoint from before they broke")
    _stored_config(model, config)


def create_model(section: EncoderSection, *, role: str, base: Path, seed: int) -> OpenClip:
    """The open_clip model that a recipe names, with its model configuration and its tokenizer.

    Raises:
        UserError: as `store_encoder`.
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
                    model, config, tokenizer = _open_folder(folder, loads=False)
                if checkpoint:
                    bare = bare_weights(checkpoint, model, Path(scratch), weights_only=weights_only)
                    load_checkpoint(model, str(bare), weights_only=weights_only)
            except UserError:
                raise
            except Exception as error:  # a wrong configuration or checkpoint raises whatever open_clip and torch like
                raise _cannot_load(error, section, role, needs, silent) from error
    return model, config, tokenizer


def _folder_checkpoint(folder: Path) -> Path:
    """The file in a folder that open_clip would take the weights from."""
    found = _find_checkpoint_in_dir(folder)
    if found is None:
        raise FileNotFoundError(f"no weights in {folder}")
    return Path(found)


def _open_folder(folder: Path, *, device: torch.device | str = "cpu", loads: bool = True) -> OpenClip:
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
    return model, config, open_clip.get_tokenizer(name)


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


def _hub_text_tower(model: Any) -> Any | None:
    """The text tower if it is one of transformers', else None."""
    text = getattr(model, "text", None)
    return text if isinstance(text, open_clip.hf_model.HFTextEncoder) else None


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


def is_two_towers(model: Any) -> bool:
    """Whether a model's forward pass returns both embeddings, the scale and, if it has one, the bias."""
    return isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP) and not model.output_dict


def eval_transform(model: Any) -> Compose:
    """open_clip's own transform for inference: the pixels that scores and plain training see."""
    return image_transform_v2(_preprocess_cfg(model), is_train=False)


def _preprocess_cfg(model: Any) -> PreprocessCfg:
    """What open_clip's transform for a model is made from."""
    return PreprocessCfg(**model.visual.preprocess_cfg)


def _stored_config(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What an open_clip `local-dir` folder says of a model; of its transform all that open_clip would not do by itself.

    As `save_config_for_hf` has it, and what that leaves out: without its fill colour a picture that is padded embeds
    differently. The size is the model's own when it is loaded.

    Raises:
        UserError: the transform has another size than the model.
    """
    cfg = _preprocess_cfg(model)
    own = model.visual.image_size
    if tuple(open_clip.utils.to_2tuple(cfg.size)) != tuple(open_clip.utils.to_2tuple(own)):
        raise UserError(
            f"the model's transform makes pictures of {cfg.size}, its image tower takes {own}; make them equal"
        )
    always = {name: getattr(cfg, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    usual = asdict(PreprocessCfg())
    others = {name: value for name, value in asdict(cfg).items() if name != "size" and value != usual[name]}
    return {"model_cfg": config, "preprocess_cfg": always | others}


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
    if not list(folder.glob("*.safetensors")):
        for path in [*folder.glob("*.bin"), *folder.glob("*.pth")]:  # the others that open_clip looks for
            _refuse_pickle(path, role, trusted=trusted)


def _as_folder(path: Path, scratch: Path, role: str) -> Path:
    """An open_clip model config as the local-dir folder that open_clip loads without a registry."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{role}.model: expected an open_clip JSON config at {path}, found none ({error.strerror})"
        ) from None
    except ValueError as error:
        raise UserError(f"{role}.model: {path} is not valid JSON ({error})") from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"}.difference(config if isinstance(config, dict) else ())
    if missing:
        raise UserError(
            f"{role}.model: {path} lacks {', '.join(sorted(missing))}; copy one of open_clip's model_configs"
        )
    (scratch / CONFIG_NAME).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return scratch


def _identity(folder: Path, weights_sha256: str) -> str:
    """Name of a model: hash of its configuration, of the hash of its weights, and of what else lies in its folder."""
    digest = hashlib.sha256((folder / CONFIG_NAME).read_bytes() + weights_sha256.encode())
    for path in sorted(folder.iterdir()):
        if path.name not in (CONFIG_NAME, WEIGHTS_NAME):  # of a tokenizer of its own, and of a text tower
            digest.update(f"{path.name} {_sha256(path)}".encode())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
