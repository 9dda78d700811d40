"""Learner and reference: open_clip models, named by what they are and loaded from the root everywhere.

Whatever form a model comes in (open_clip name and tag, checkpoint file, folder, JSON config), it is stored once in
the root as an open_clip `local-dir` folder under the hash of its content. Workers load that, so a cluster needs no
shared disk beside the root, and `open_clip.create_model("local-dir:…/models/<sha>")` opens it anywhere.
"""

import functools
import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
from open_clip.transform import MaybeConvertMode, PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import Compose, Normalize, ToTensor

from curate.errors import UserError
from curate.models.causal import CausalTexts
from curate.models.create import CONFIG_NAME, OpenClip, create_model, open_folder
from curate.models.crop import Crop
from curate.models.hub import without_hub
from curate.models.resolution import set_resolution
from curate.models.spec import WEIGHTS_NAME, EncoderSpec
from curate.recipe import DeviceType, EncoderSection, Precision
from curate.storage import Store

CACHED_FLOATS = 2**17
"""Normalised together on a CPU: half a megabyte, which the second cache of a core holds."""


class Encoder:
    """A loaded model with its own transform and tokenizer; `encode` is the whole interface.

    Args:
        spec: names the model.
        model: of open_clip, of its own size; it is put into evaluation mode, and made one of the pictures of `spec`.
        tokenizer: the model's own.
        device: where the model lies.
        compile_for: pictures of a batch for which `torch.compile` makes the image tower, once: smaller batches are
            filled up with blank ones. Not compiled if None. (Text towers see batches of many shapes, and compute less.)

    Raises:
        UserError: the model cannot embed pictures of the size that `spec` names.
    """

    def __init__(
        self, spec: EncoderSpec, model: Any, tokenizer: Any, device: torch.device, *, compile_for: int | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        if spec.image_size is not None:
            set_resolution(model, spec.image_size)
        # bf16 as weights, and not by autocast, which casts them anew in each batch: an H200 embeds 1.5 times as many
        # pictures a second with ViT-B/16, and cosines to float32 are the same.
        self._dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
        self.model = model.eval().requires_grad_(False).to(self._dtype)
        self.tokenize: Callable[[Sequence[str]], Tensor] = tokenizer
        self.image_size = image_size_of(self.model)
        """Height and width of the pictures that it sees."""
        self.crop, self._shift = split_transform(self.model, exact=spec.exact_pixels)
        # Not the transform's own repr, which tells no fill colour.
        cfg = _preprocess_cfg(self.model)
        way = ("fast",) if self.crop.fast else ()
        self.view = repr((cfg.size, cfg.interpolation, cfg.resize_mode, cfg.fill_color, *way))
        """Encoders with equal views see equal pixels before normalisation."""
        self.wording = hashlib.sha256(pickle.dumps(tokenizer)).hexdigest()[:16]
        """Encoders with equal wordings see equal tokens."""
        self._texts = CausalTexts(self.model)
        self._encode_image = torch.compile(self._image_tower, dynamic=False) if compile_for else self._image_tower
        self._least = compile_for or 0
        self._images = torch.empty(0)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def normalize(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """As `normalize_pixels`, for this model."""
        return normalize_pixels(pixels, self._shift, out)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, texts: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pairs; on a GPU it returns before they are computed.

        Args:
            pixels: uint8 [n, H, W, 3] as `crop` makes them; pinned, they are copied while the batch before computes.
            texts: int64 [u, L] as `tokenize` makes them.
            of: int64 [n], which of the texts each pair has; u = n and each has its own if None.

        Returns:
            zimg and ztxt, float32 [n, D] on the encoder's device; a row may be non-finite or zero, which is the
            caller's to judge.
        """
        length = self._texts.length(texts)  # before they are copied: of a GPU it would have to be waited for
        pixels, texts, *index = self._sent(pixels, texts, *([of] if of is not None else []))
        zimg = self._encode_image(self._prepared(pixels))
        ztxt = self._texts.encode(texts[:, :length])
        # In float32: in bfloat16 a row that was divided by its norm is up to 0.3 % off unit length.
        zimg, ztxt = normalize(zimg[: len(pixels)].float(), dim=-1), normalize(ztxt.float(), dim=-1)
        return zimg, ztxt[index[0]] if index else ztxt

    def _image_tower(self, images: Tensor) -> Tensor:
        found: Tensor = self.model.encode_image(images, normalize=False)
        return found

    def _prepared(self, pixels: Tensor) -> Tensor:
        """Normalised pictures, and below them blank ones, if the tower takes a number of them."""
        n, H, W, _ = pixels.shape
        rows = max(n, self._least)
        if self.device.type == "cpu":
            # One buffer for all batches: of fresh memory the system would have to blank each page. Channels last, as
            # pixels are: oneDNN cuts such pictures into patches in less than half of the time.
            if self._images.shape[1:] != (3, H, W) or len(self._images) < rows:
                self._images = torch.empty((rows, 3, H, W), memory_format=torch.channels_last)
            images = self._images[:rows]
        else:
            images = torch.empty((rows, 3, H, W), dtype=self._dtype, device=self.device)
        images[n:].zero_()
        self.normalize(pixels, images[:n])
        return images.to(self._dtype)

    def _sent(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors on the device, copied there by a stream of its own while the stream that computes is busy."""
        if self._copies is None:
            return [tensor.to(self.device) for tensor in tensors]
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            sent = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self._copies)
        for tensor in sent:
            tensor.record_stream(computing)  # or its memory might be given away while it is read
        return sent


def load_encoder(store: Store, spec: EncoderSpec, device: torch.device, *, compile_for: int | None = None) -> Encoder:
    """Load a model from the root to embed with; raises as `load_model` and `Encoder`."""
    model, _, tokenizer = load_model(store, spec, device)
    return Encoder(spec, model, tokenizer, device, compile_for=compile_for)


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
            return open_folder(folder, device=device)


def fetch_model(store: Store, spec: EncoderSpec, folder: Path) -> Path:
    """Copy a model out of the root, as a folder that open_clip's `local-dir:` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in store.list(spec.folder):
        store.fetch(name, folder / Path(name).name)
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


def _hub_text_tower(model: Any) -> Any | None:
    """The text tower if it is one of transformers', else None."""
    text = getattr(model, "text", None)
    return text if isinstance(text, open_clip.hf_model.HFTextEncoder) else None


def is_two_towers(model: Any) -> bool:
    """Whether a model's forward pass returns both embeddings, the scale and, if it has one, the bias."""
    return isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP) and not model.output_dict


def image_size_of(model: Any) -> tuple[int, int]:
    """Height and width of the pictures that a model's image tower takes."""
    height, width = open_clip.utils.to_2tuple(model.visual.image_size)
    return height, width


def eval_transform(model: Any) -> Compose:
    """open_clip's own transform for inference: the pixels that scores and plain training see."""
    return image_transform_v2(_preprocess_cfg(model), is_train=False)


def split_transform(model: Any, *, exact: bool = True) -> tuple[Crop, Normalize]:
    """open_clip's transform, cut before its last two steps: the crop, and the normalisation that is left.

    8-bit pixels are a quarter of the floats to hold and to send, and `normalize_pixels` of a whole batch gives the
    same floats.

    Args:
        model: open_clip's.
        exact: as `Crop.exact`.
    """
    *crop, to_rgb, to_tensor, shift = eval_transform(model).transforms
    assert isinstance(to_rgb, MaybeConvertMode), to_rgb  # our pictures are RGB
    assert isinstance(to_tensor, ToTensor), to_tensor
    assert isinstance(shift, Normalize), shift
    return Crop(Compose(crop), exact), shift


def normalize_pixels(pixels: Tensor, shift: Normalize, out: Tensor | None = None) -> Tensor:
    """Pixels as open_clip's transform ends with them, with no buffer but the one that is returned.

    Args:
        pixels: uint8 [n, H, W, 3] on any device.
        shift: the transform's own last step.
        out: [n, 3, H, W] on that device, of any float type; a new float32 one if None. On a CPU soonest filled with the
            channels last in memory.

    Returns:
        `out`. On a CPU the floats are open_clip's own, (p / 255 - mean) / std; on a GPU one kernel makes
        p * (1 / 255 std) - mean / std of them, which is less than 1e-6 away.
    """
    planes = pixels.permute(0, 3, 1, 2)
    if out is None:
        out = torch.empty(planes.shape, device=pixels.device)
    if pixels.device.type != "cpu":
        return fused_shift(planes, shift, out)
    mean, std = (torch.tensor(list(of)) for of in (shift.mean, shift.std))
    if out.is_contiguous(memory_format=torch.channels_last):  # lines of pixels: vectors of three would be none
        width = pixels.shape[2]
        planes, floats = pixels.flatten(2), out.permute(0, 2, 3, 1).flatten(2)
        mean, std = mean.repeat(width), std.repeat(width)
    else:
        floats, mean, std = out, mean.view(3, 1, 1), std.view(3, 1, 1)
    # A few pictures at a time: what stays in a core's cache is read and written four times for the price of one.
    step = max(1, CACHED_FLOATS // max(1, planes[:1].numel()))
    for start in range(0, len(planes), step):
        floats[start : start + step].copy_(planes[start : start + step]).div_(255).sub_(mean).div_(std)
    return out


def fused_shift(planes: Tensor, shift: Normalize, out: Tensor) -> Tensor:
    """Write (p / 255 - mean) / std of uint8 [n, 3, H, W] into `out`, as one multiplication and addition each."""
    factor, offset = _line(tuple(shift.mean), tuple(shift.std), planes.device)
    return torch.addcmul(offset, planes, factor, out=out)


@functools.cache  # a copy of a few numbers to a GPU waits for all that it has to do before
def _line(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    m, s = (torch.tensor(of, dtype=torch.float64).view(3, 1, 1) for of in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


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
    if tuple(open_clip.utils.to_2tuple(cfg.size)) != image_size_of(model):
        own = model.visual.image_size
        raise UserError(
            f"the model's transform makes pictures of {cfg.size}, its image tower takes {own}; make them equal"
        )
    always = {name: getattr(cfg, name) for name in ("mean", "std", "interpolation", "resize_mode")}
    usual = asdict(PreprocessCfg())
    others = {name: value for name, value in asdict(cfg).items() if name != "size" and value != usual[name]}
    return {"model_cfg": config, "preprocess_cfg": always | others}


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
