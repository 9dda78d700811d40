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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import PIL.Image
import safetensors.torch
import torch
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, load_checkpoint
from open_clip.push_to_hf_hub import save_config_for_hf
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor

from curate.errors import UserError
from curate.messages import one_line
from curate.recipe import EncoderSection
from curate.seeds import derive_seed
from curate.spec import EncoderSpec
from curate.storage import Store

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
OpenClip = tuple[Any, dict[str, Any], Any]
"""A model, its model configuration and its tokenizer: what open_clip makes of one name."""
NEVER_UNPICKLED = (".safetensors", ".npz", ".npy")
"""How open_clip knows formats that cannot run code; it unpickles files of every other name."""


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
        self._crop = Compose(crop)
        self.view = repr(self._crop)
        """Encoders with equal views see equal pixels before normalisation."""

    def crop(self, image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
        """The pixels that the model sees of a picture, [H, W, 3]."""
        return np.asarray(self._crop(image))

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
        if not config.is_file() or _identity(config, found) != spec.model:
            raise UserError(
                f"{spec.folder}/{CONFIG_NAME}: expected the configuration that its folder names, found another; "
                "it was changed after it was stored: restore it from a copy of the root"
            )
        name = f"{LOCAL_DIR_PREFIX}{folder}"
        model = open_clip.create_model(name, device=device)
        return model, open_clip.get_model_config(name), open_clip.get_tokenizer(name)


def fetch_model(store: Store, spec: EncoderSpec, folder: Path) -> Path:
    """Copy a model out of the root, as a folder that open_clip's `local-dir:` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in store.list(spec.folder):
        with store.open_input(name) as source, (folder / Path(name).name).open("wb") as target:
            shutil.copyfileobj(source, target, 2**24)
    return folder


def store_encoder(store: Store, section: EncoderSection, *, role: str, base: Path, seed: int) -> EncoderSpec:
    """Make the model that a recipe names and store it in the root, unless it is there already.

    Args:
        store: the root.
        section: the recipe's `[reference]` or `[learner]`.
        role: `reference` or `learner`, for messages.
        base: the recipe's folder, where JSON configs lie; other paths start at the working directory.
        seed: of random weights, where the recipe names no pretrained ones.

    Raises:
        UserError: unknown model or tag, weights that do not fit or are not finite, an untrusted pickle.
    """
    model, config, tokenizer = create_model(section, role=role, base=base, seed=seed)
    return store_model(store, model, config, tokenizer, source=section.source, precision=section.precision)


def store_model(
    store: Store,
    model: torch.nn.Module,
    config: dict[str, Any],
    tokenizer: Any,
    *,
    source: str,
    precision: str = "fp32",
) -> EncoderSpec:
    """Write an open_clip model as `models/<sha>/`; its name is its content, so doing it twice changes nothing.

    Raises:
        UserError: a weight is not finite: nothing that such a model embeds can be used.
    """
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken:
        raise UserError(f"{source}: the weights {broken} are not all finite; take a checkpoint from before they broke")
    with store.local_scratch() as scratch:
        folder = scratch / "model"
        folder.mkdir()
        save_config_for_hf(model, folder / CONFIG_NAME, model_config=config)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)
        if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
            tokenizer.save_pretrained(folder)
        weights = _sha256(folder / WEIGHTS_NAME)
        spec = EncoderSpec(
            model=_identity(folder / CONFIG_NAME, weights),
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


def create_model(section: EncoderSection, *, role: str, base: Path, seed: int) -> OpenClip:
    """The open_clip model that a recipe names, with its model configuration and its tokenizer.

    Raises:
        UserError: as `store_encoder`.
    """
    name = section.model
    pretrained = section.pretrained
    with tempfile.TemporaryDirectory() as scratch:
        if name.endswith(".json"):
            name = LOCAL_DIR_PREFIX + _as_folder(base / name, Path(scratch), role)
        elif name.startswith(LOCAL_DIR_PREFIX):
            _check_folder(Path(name.removeprefix(LOCAL_DIR_PREFIX)), role, trusted=section.trusted)
        elif not name.startswith(HF_HUB_PREFIX) and name not in open_clip.list_models():
            raise UserError(
                f"{role}.model = {name!r}: not an open_clip model; `python -c 'import open_clip; "
                "print(open_clip.list_models())'` lists them, or give local-dir:FOLDER or a JSON config"
            )
        checkpoint = _checkpoint(section, name, role)
        torch.manual_seed(derive_seed(seed, "weights"))
        try:
            config = open_clip.get_model_config(name)
            model = open_clip.create_model(name, None if checkpoint else pretrained, weights_only=not section.trusted)
            if checkpoint:
                load_checkpoint(model, str(checkpoint), weights_only=not section.trusted)
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # a wrong configuration or checkpoint raises whatever open_clip and torch like
            reason = one_line(error, 300)
            raise UserError(
                f"{role}.model = {section.model!r}, pretrained = {pretrained!r}: cannot be loaded ({reason}); "
                "weights must fit the model and be complete"
            ) from error
    return model, config, tokenizer


def eval_transform(model: Any) -> Compose:
    """open_clip's own transform for inference: the pixels that scores and plain training see."""
    cfg = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    return open_clip.transform.image_transform_v2(cfg, is_train=False)


def _checkpoint(section: EncoderSection, name: str, role: str) -> Path | None:
    """The checkpoint file that `pretrained` names, or None where it is a tag or nothing."""
    tag = section.pretrained
    if tag is None:
        return None
    if not name.startswith((LOCAL_DIR_PREFIX, HF_HUB_PREFIX)) and tag in open_clip.list_pretrained_tags_by_model(name):
        return None
    path = Path(tag)
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"{role}.pretrained = {tag!r}: neither a file ({path}) nor a tag of {section.model} (tags: {tags})"
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


def _as_folder(path: Path, scratch: Path, role: str) -> str:
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
    return str(scratch)


def _identity(config: Path, weights_sha256: str) -> str:
    """Name of a model: hash of its configuration file and of the hash of its weights."""
    return hashlib.sha256(config.read_bytes() + weights_sha256.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
