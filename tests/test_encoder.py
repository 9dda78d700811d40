"""A model is its configuration and its weights, wherever they came from; and each way to get one wrong is one line."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import Normalize, ToTensor

from curate.errors import UserError
from curate.models.create import CONFIG_NAME, create_model
from curate.models.encoder import (
    eval_transform,
    fused_shift,
    load_encoder,
    load_model,
    normalize_pixels,
    store_encoder,
)
from curate.models.spec import WEIGHTS_NAME, EncoderSpec
from curate.recipe import EncoderSection
from curate.storage import Store
from tests.helpers import CPU, tiny_config, tiny_encoder, write_tiny


class Trap:
    """Unpickling it makes a folder: code that a checkpoint ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def tiny(tmp_path: Path) -> EncoderSection:
    return write_tiny(tmp_path)


@pytest.fixture
def weights(tmp_path: Path, tiny: EncoderSection) -> dict[str, torch.Tensor]:
    """Weights that no seed makes."""
    model, _, _ = create_model(tiny, role="learner", base=tmp_path, seed=99)
    return {name: tensor + 0.25 for name, tensor in model.state_dict().items()}


def stored(store: Store, section: EncoderSection, base: Path, *, seed: int = 0) -> EncoderSpec:
    return store_encoder(store, section, role="learner", base=base, seed=seed)


def line(store: Store, base: Path, **section: Any) -> str:
    """The one line that storing this model answers with; nothing may be stored."""
    with pytest.raises(UserError) as caught:
        stored(store, EncoderSection(**section), base)
    (text,) = caught.value.lines
    assert "\n" not in text
    assert store.list("models") == []
    return text


def states(store: Store, spec: EncoderSpec) -> dict[str, torch.Tensor]:
    model, _, _ = load_model(store, spec, CPU)
    return dict(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def pictures(count: int) -> list[Image.Image]:
    """Of sizes that are larger, smaller and other than square."""
    rng = np.random.default_rng(0)
    sizes = [(40, 60), (60, 40), (20, 33), (32, 32), (200, 31)]
    return [
        Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8), mode=None) for i in range(count)
    ]


# --- where a model may come from ---------------------------------------------------------------------------------


def test_a_json_configuration_gives_random_weights_from_the_seed(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path, seed=3)
    assert spec.embed_dim == 16
    assert spec.logit_scale == pytest.approx(10.0)
    assert spec.logit_bias == -10.0
    assert spec.source == "tiny.json"
    assert spec.sha == spec.model
    assert store.list(spec.folder) == [f"{spec.folder}/{CONFIG_NAME}", f"{spec.folder}/{WEIGHTS_NAME}"]
    assert stored(store, tiny, tmp_path, seed=3) == spec
    assert stored(store, tiny, tmp_path, seed=4).model != spec.model


def test_storing_twice_changes_nothing(tmp_path: Path, store: Store, tiny: EncoderSection):
    def files() -> dict[str, tuple[bytes, int]]:
        found = [path for path in Path(store.url).rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    spec = stored(store, tiny, tmp_path)
    before = files()
    assert len(before) == 2
    assert stored(store, tiny, tmp_path) == spec
    assert files() == before


def test_the_configuration_is_stored_last(tmp_path: Path, store: Store, tiny: EncoderSection, monkeypatch):
    """A folder that has one is taken for complete."""
    names: list[str] = []
    put = Store.put_file
    monkeypatch.setattr(Store, "put_file", lambda self, path, name: names.append(name) or put(self, path, name))
    spec = stored(store, tiny, tmp_path)
    assert names[-1] == f"{spec.folder}/{CONFIG_NAME}"
    assert len(names) == 2


def test_a_folder_left_half_written_is_completed(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path)
    folder = store.local_path(spec.folder)
    (folder / CONFIG_NAME).unlink()
    (folder / WEIGHTS_NAME).write_bytes(b"half")
    assert stored(store, tiny, tmp_path) == spec
    load_model(store, spec, CPU)


def test_the_name_depends_on_weights_and_configuration(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path)
    # The same weights under a configuration that embeds differently: another window of the text.
    config = tiny_config()
    config["text_cfg"]["pad_id"] = 1
    (tmp_path / "other.json").write_text(json.dumps(config))
    other = stored(store, EncoderSection(model="other.json"), tmp_path)
    assert other.weights_sha256 == spec.weights_sha256
    assert other.model != spec.model
    unbiased = tiny_encoder(store, tmp_path / "unbiased", init_logit_bias=None)
    assert unbiased.logit_bias == 0.0
    assert unbiased.model != spec.model


def test_precision_names_other_embeddings_of_the_same_model(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path)
    half = stored(store, tiny.model_copy(update={"precision": "bf16"}), tmp_path)
    assert half.model == spec.model
    assert half.sha == f"{spec.sha}-bf16"


def test_a_name_that_open_clip_knows(tmp_path: Path, store: Store, tiny: EncoderSection, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny_config())
    known = stored(store, EncoderSection(model="ViT-tiny"), tmp_path)
    assert known.weights_sha256 == stored(store, tiny, tmp_path).weights_sha256
    assert known.source == "ViT-tiny"


def test_weights_from_a_safetensors_file(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    section = tiny.model_copy(update={"pretrained": str(tmp_path / "w.safetensors")})
    spec = stored(store, section, tmp_path)
    assert same(states(store, spec), weights)
    assert spec.logit_bias == -9.75
    assert spec.source == f"tiny.json/{tmp_path}/w.safetensors"
    assert stored(store, section, tmp_path, seed=7) == spec  # the seed has no say where there are weights


def test_weights_of_a_name_that_open_clip_knows(tmp_path: Path, store: Store, weights, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny_config())
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    spec = stored(store, EncoderSection(model="ViT-tiny", pretrained=str(tmp_path / "w.safetensors")), tmp_path)
    assert same(states(store, spec), weights)


def test_open_clips_own_training_checkpoint_if_trusted(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    distributed = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "name": Path("x"), "state_dict": distributed}, tmp_path / "epoch_3.pt")
    asked = {"model": tiny.model, "pretrained": str(tmp_path / "epoch_3.pt")}
    text = line(store, tmp_path, **asked)
    assert "epoch_3.pt" in text
    assert ".safetensors" in text
    assert "learner.trusted = true" in text
    spec = stored(store, EncoderSection(**asked, trusted=True), tmp_path)
    assert same(states(store, spec), weights)


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


LAYOUTS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "at the top": lambda w: w,
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled, then distributed": lambda w: prefixed(w, "module._orig_mod."),
    "distributed, then compiled": lambda w: prefixed(w, "_orig_mod.module."),
    "distributed twice": lambda w: prefixed(w, "module.module."),
    "a compiled tower": lambda w: {name.replace("visual.", "visual._orig_mod."): t for name, t in w.items()},
}
KEPT_BELOW: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "state_dict": lambda w: {"epoch": 5, "state_dict": w, "optimizer": {"state": {0: torch.ones(1)}}},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "loss": 0.25},
    "model": lambda w: {"model": w, "epoch": 5},
    "model, state_dict": lambda w: {"model": {"state_dict": w}, "state_dict": None},
    "state_dict beside the model's name": lambda w: {"state_dict": w, "model": "ViT-tiny"},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kept", [None, *KEPT_BELOW.values()], ids=["alone", *KEPT_BELOW])
def test_checkpoints_of_other_trainers(
    tmp_path: Path, tiny: EncoderSection, weights, layout: Callable[..., Any], kept: Callable[..., Any] | None
):
    path = tmp_path / "best.pt"
    torch.save(layout(weights) if kept is None else kept(layout(weights)), path)
    for_file = tiny.model_copy(update={"pretrained": str(path), "trusted": True})
    model, _, _ = create_model(for_file, role="learner", base=tmp_path, seed=0)
    assert same(model.state_dict(), weights)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_safetensors_of_other_trainers(tmp_path: Path, tiny: EncoderSection, weights, layout: Callable[..., Any]):
    folder = saved_folder(tmp_path / "saved", layout(weights), {})
    path = folder / WEIGHTS_NAME
    for section in (
        tiny.model_copy(update={"pretrained": str(path)}),
        EncoderSection(model=f"local-dir:{folder}"),
    ):
        model, _, _ = create_model(section, role="learner", base=tmp_path, seed=0)
        assert same(model.state_dict(), weights)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: {"epoch": 5, "net": w}, ["expected the weights at the top or below one of", "the keys epoch, net"]),
        (lambda w: {"model": w, "state_dict": w}, ["found several of these in the keys model, state_dict"]),
        (lambda w: {"epoch": 5, **w}, ["none in the keys epoch, "]),
        (lambda w: {"state_dict": {}}, ["none in the keys state_dict"]),
        (lambda w: [w], ["none in a list"]),
        (lambda w: {"model": w | prefixed(w, "module.")}, ["expected each weight of the model once"]),
        (lambda w: {"model": prefixed(w, "net.")}, ["logit_scale among them", "the keys net."]),
        (lambda w: {"model": {n: t for n, t in w.items() if n != "visual.proj"}}, ["visual.proj"]),
        (lambda w: {"model": w | {"extra": torch.ones(1)}}, ["extra"]),
        (
            lambda w: {"model": w | {"visual.positional_embedding": torch.zeros(17, 32)}},
            ["size mismatch: expected visual.positional_embedding [5, 32], found [17, 32]"],
        ),
        (
            lambda w: {"model": w | {"positional_embedding": torch.zeros(77, 16)}},
            ["size mismatch: expected positional_embedding [24, 16], found [77, 16]"],
        ),
    ],
)
def test_a_checkpoint_that_is_not_exactly_the_models(
    tmp_path: Path, store: Store, tiny: EncoderSection, weights, spoil: Callable[..., Any], words: list[str]
):
    torch.save(spoil(weights), tmp_path / "best.pt")
    text = line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / "best.pt"), trusted=True)
    for word in (*words, "best.pt", "weights must fit the model"):
        assert word in text


def test_a_folder_of_open_clip(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    folder = tmp_path / "saved"
    folder.mkdir()
    config = {"model_cfg": tiny_config(), "preprocess_cfg": {"mean": [0.5] * 3, "interpolation": "bilinear"}}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / WEIGHTS_NAME)
    spec = stored(store, EncoderSection(model=f"local-dir:{folder}"), tmp_path)
    assert same(states(store, spec), weights)
    shutil.rmtree(folder)
    model = load_encoder(store, spec, CPU).model  # the root needs nothing beside itself
    assert model.visual.preprocess_cfg["mean"] == [0.5] * 3
    assert model.visual.preprocess_cfg["interpolation"] == "bilinear"
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    plain = stored(store, tiny.model_copy(update={"pretrained": str(tmp_path / "w.safetensors")}), tmp_path)
    assert plain.weights_sha256 == spec.weights_sha256
    assert plain.model != spec.model  # the same weights see other pixels


def test_a_folder_with_a_pickle_if_trusted(tmp_path: Path, store: Store, weights):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": tiny_config()}))
    torch.save({"state_dict": weights, "made_in": Path("x")}, folder / "open_clip_pytorch_model.bin")
    text = line(store, tmp_path, model=f"local-dir:{folder}")
    assert "open_clip_pytorch_model.bin" in text
    assert "learner.trusted = true" in text
    spec = stored(store, EncoderSection(model=f"local-dir:{folder}", trusted=True), tmp_path)
    assert same(states(store, spec), weights)


# --- what is stored ----------------------------------------------------------------------------------------------


def test_open_clip_itself_opens_what_is_stored(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    section = tiny.model_copy(update={"pretrained": str(tmp_path / "w.safetensors")})
    made, _, tokenizer = create_model(section, role="learner", base=tmp_path, seed=0)
    spec = stored(store, section, tmp_path)
    name = f"local-dir:{store.url}/{spec.folder}"
    model = open_clip.create_model(name).eval()
    pixels, texts = torch.rand(3, 3, 32, 32), tokenizer(["a", "b c", ""])
    assert texts.shape == (3, 24)
    assert open_clip.get_tokenizer(name)(["a", "b c", ""]).equal(texts)
    with torch.no_grad():
        for ours, theirs in zip(made.eval()(pixels, texts), model(pixels, texts), strict=True):
            assert ours.equal(theirs)


def test_weights_that_changed_in_the_root_are_refused(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path)
    path = store.local_path(f"{spec.folder}/{WEIGHTS_NAME}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{spec.folder}/{WEIGHTS_NAME}: expected .*, found .*restore it"):
        load_encoder(store, spec, CPU)
    path.unlink()
    with pytest.raises(UserError, match=f"{spec.folder}/{WEIGHTS_NAME}: expected sha256 .*, found none"):
        load_encoder(store, spec, CPU)
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=f"{spec.folder}/{WEIGHTS_NAME}: expected sha256 .*, found none"):
        load_encoder(store, spec, CPU)


def test_a_configuration_that_changed_in_the_root_is_refused(tmp_path: Path, store: Store, tiny: EncoderSection):
    spec = stored(store, tiny, tmp_path)
    path = store.local_path(f"{spec.folder}/{CONFIG_NAME}")
    path.write_text(path.read_text().replace("bicubic", "bilinear"))
    with pytest.raises(UserError, match=f"{spec.folder}/{CONFIG_NAME}: .*changed"):
        load_encoder(store, spec, CPU)


def test_a_model_travels_over_s3(tmp_path: Path, s3_root: str):
    store = Store(s3_root)
    spec = tiny_encoder(store, tmp_path)
    local = Store(str(tmp_path / "local"))
    assert tiny_encoder(local, tmp_path) == spec
    assert same(states(store, spec), states(local, spec))


# --- what it embeds ----------------------------------------------------------------------------------------------


def saved_folder(folder: Path, weights: dict[str, torch.Tensor], preprocess: dict[str, Any]) -> Path:
    """A folder as open_clip's `local-dir:` takes it."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": tiny_config(), "preprocess_cfg": preprocess}))
    safetensors.torch.save_file(weights, folder / WEIGHTS_NAME)
    return folder


MODES = st.sampled_from(["shortest", "longest", "squash"])
CHANNELS = st.lists(st.floats(1 / 128, 1, width=32), min_size=3, max_size=3)
PREPROCESS = st.fixed_dictionaries(
    {},
    optional={
        "mean": CHANNELS,
        "std": CHANNELS,
        "interpolation": st.sampled_from(["bicubic", "bilinear"]),
        "resize_mode": MODES,
        "fill_color": st.integers(0, 255),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(preprocess=PREPROCESS)
@example(preprocess={"resize_mode": "longest", "fill_color": 127})
def test_a_stored_model_sees_what_its_source_sees(tmp_path: Path, store: Store, weights, preprocess):
    name = f"local-dir:{saved_folder(tmp_path / 'saved', weights, preprocess)}"
    encoder = load_encoder(store, stored(store, EncoderSection(model=name), tmp_path), CPU)
    _, theirs = open_clip.create_model_from_pretrained(name)
    for picture in [Image.new("RGB", (90, 50), "red"), *pictures(2)]:
        pixels = torch.tensor(encoder.crop(picture))[None]
        assert encoder.normalize(pixels)[0].equal(theirs(picture))


def test_views_differ_wherever_pixels_do(tmp_path: Path, store: Store, weights):
    views = set()
    for number, fill in enumerate((0, 127, 255)):
        folder = saved_folder(tmp_path / str(number), weights, {"resize_mode": "longest", "fill_color": fill})
        views.add(load_encoder(store, stored(store, EncoderSection(model=f"local-dir:{folder}"), tmp_path), CPU).view)
    assert len(views) == 3


@pytest.mark.parametrize("preprocess", [{}, {"resize_mode": "squash", "interpolation": "bilinear", "std": [0.3] * 3}])
def test_pixels_and_embeddings_are_those_of_open_clips_own_transform(tmp_path: Path, store: Store, weights, preprocess):
    folder = saved_folder(tmp_path / "saved", weights, preprocess)
    spec = stored(store, EncoderSection(model=f"local-dir:{folder}"), tmp_path)
    encoder = load_encoder(store, spec, CPU)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{store.url}/{spec.folder}")
    assert repr(eval_transform(encoder.model)) == repr(transform)
    captions = [f"a picture of {i}" for i in range(7)]
    theirs = torch.stack([transform(picture) for picture in pictures(7)])
    cropped = torch.from_numpy(np.stack([encoder.crop(picture) for picture in pictures(7)]))
    assert cropped.shape == (7, 32, 32, 3)
    assert cropped.dtype == torch.uint8

    seen = []
    encoder.model.visual.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    zimg, ztxt = encoder.encode(cropped, encoder.tokenize(captions))
    assert seen[0].equal(theirs)
    with torch.no_grad():
        expected = model.eval().encode_image(theirs), model.encode_text(open_clip.tokenize(captions, 24))
    for ours, raw in zip((zimg, ztxt), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, torch.nn.functional.normalize(raw, dim=-1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(7))


def test_normalised_pixels_are_open_clips_own_on_a_cpu_and_an_ulp_or_two_off_in_one_kernel() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 40, 1)[..., None].expand(3, 40, 256, 3)
    shift = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    theirs = torch.stack([shift(ToTensor()(Image.fromarray(image.numpy()))) for image in pixels])
    assert normalize_pixels(pixels, shift).equal(theirs)
    last = torch.empty(theirs.shape, memory_format=torch.channels_last)
    assert normalize_pixels(pixels, shift, last).equal(theirs)
    fused = fused_shift(pixels.permute(0, 3, 1, 2), shift, torch.empty_like(theirs))
    assert (fused - theirs).abs().max() < 1e-6
    half = fused_shift(pixels.permute(0, 3, 1, 2), shift, torch.empty(theirs.shape, dtype=torch.bfloat16))
    torch.testing.assert_close(half.float(), theirs, atol=0, rtol=2**-8)


def test_equal_captions_may_be_encoded_once(tmp_path: Path, store: Store) -> None:
    encoder = load_encoder(store, tiny_encoder(store, tmp_path), CPU)
    pixels = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8)
    texts = encoder.tokenize(["a red ring", "a blue star above a green circle"])
    of = torch.tensor([0, 1, 1, 0, 1])
    for once, each in zip(encoder.encode(pixels, texts, of), encoder.encode(pixels, texts[of]), strict=True):
        torch.testing.assert_close(once, each, atol=1e-6, rtol=1e-5)


def test_a_row_embeds_the_same_whatever_stands_beside_it(tmp_path: Path, store: Store):
    encoder = load_encoder(store, tiny_encoder(store, tmp_path), CPU)
    pixels = torch.from_numpy(np.stack([encoder.crop(picture) for picture in pictures(6)]))
    texts = encoder.tokenize(["one", "two", "three", "four", "five", "six"])
    whole = encoder.encode(pixels, texts)
    alone = encoder.encode(pixels[2:3], texts[2:3])
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[2:3], b)


def test_bf16_is_close_to_fp32_but_not_it(tmp_path: Path, store: Store, tiny: EncoderSection):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    found = {}
    for precision in ("fp32", "bf16"):
        spec = stored(store, tiny.model_copy(update={"precision": precision}), tmp_path)
        encoder = load_encoder(store, spec, CPU)
        found[precision] = encoder.encode(pixels, encoder.tokenize(["a"] * 4))[0]
    assert not found["bf16"].equal(found["fp32"])
    torch.testing.assert_close(found["bf16"].norm(dim=1), torch.ones(4))
    assert (found["bf16"] * found["fp32"]).sum(1).min() > 0.999


# --- mistakes: one line each -------------------------------------------------------------------------------------


def test_an_unknown_name(tmp_path: Path, store: Store):
    text = line(store, tmp_path, model="ViT-B-99")
    assert "learner.model = 'ViT-B-99'" in text
    assert "list_models" in text


def test_an_unknown_tag_names_the_tags_there_are(tmp_path: Path, store: Store):
    text = line(store, tmp_path, model="ViT-B-32", pretrained="laion9b")
    assert "learner.pretrained = 'laion9b'" in text
    assert "laion2b_s34b_b79k" in text


def test_a_file_that_is_not_there(tmp_path: Path, store: Store, tiny: EncoderSection):
    text = line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / "gone.safetensors"))
    assert "learner.pretrained" in text
    assert "gone.safetensors" in text


def test_a_configuration_that_is_not_there(tmp_path: Path, store: Store):
    assert f"expected an open_clip JSON config at {tmp_path}/gone.json" in line(store, tmp_path, model="gone.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"embed_dim": 8}', "lacks text_cfg, vision_cfg"),
        ("[1, 2]", "lacks"),
        ("null", "lacks"),
        (json.dumps(tiny_config(vision_cfg={"image_size": 32, "layerz": 1})), "layerz"),
        (json.dumps(tiny_config(vision_cfg=3)), "cannot be loaded"),
        (json.dumps(tiny_config(embed_dim="wide")), "cannot be loaded"),
        (json.dumps(tiny_config(text_cfg={"width": 32, "heads": 3, "layers": 1})), "cannot be loaded"),
    ],
)
def test_a_configuration_that_is_broken(tmp_path: Path, store: Store, text: str, expected: str):
    (tmp_path / "broken.json").write_text(text)
    found = line(store, tmp_path, model="broken.json")
    assert "learner.model" in found
    assert expected in found


def test_a_configuration_that_begins_with_a_mark(tmp_path: Path, store: Store, tiny: EncoderSection):
    """As editors of Windows save it."""
    plain = stored(store, tiny, tmp_path)
    (tmp_path / "marked.json").write_text(json.dumps(tiny_config()), encoding="utf-8-sig")
    assert stored(store, EncoderSection(model="marked.json"), tmp_path).model == plain.model


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbf{}", "is not valid JSON (Unexpected UTF-8 BOM"),  # open_clip opens none with it
        (b"{", "is not valid JSON"),
        (b"{}", "lacks model_cfg"),
        (b"[]", "lacks model_cfg"),
        (b'{"model_cfg": {"embed_dim": 8}}', "lacks text_cfg, vision_cfg"),
    ],
)
def test_a_folder_whose_configuration_is_broken(tmp_path: Path, store: Store, weights, data: bytes, expected: str):
    folder = saved_folder(tmp_path / "saved", weights, {})
    (folder / CONFIG_NAME).write_bytes(data)
    found = line(store, tmp_path, model=f"local-dir:{folder}")
    assert f"learner.model: {folder / CONFIG_NAME} " in found
    assert expected in found


def test_bytes_that_are_no_text(tmp_path: Path, store: Store):
    (tmp_path / "broken.json").write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in line(store, tmp_path, model="broken.json")


@pytest.mark.parametrize("beside", [None, "epoch_5.pt", "model-00001-of-00002.bin.index.json"])
def test_a_folder_without_weights(tmp_path: Path, store: Store, weights, beside: str | None):
    folder = saved_folder(tmp_path / "saved", weights, {})
    (folder / WEIGHTS_NAME).unlink()
    if beside:
        (folder / beside).write_bytes(b"x" * 1000)
    section = EncoderSection(model=f"local-dir:{folder}")
    with pytest.raises(UserError, match="a folder must hold them") as caught:
        stored(store, section, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    # A checkpoint gives them.
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    whole = section.model_copy(update={"pretrained": str(tmp_path / "weights.safetensors")})
    assert stored(store, whole, tmp_path).weights_sha256


def test_a_folder_without_a_configuration(tmp_path: Path, store: Store):
    assert f"expected {CONFIG_NAME} in {tmp_path}" in line(store, tmp_path, model=f"local-dir:{tmp_path}")
    assert "nowhere" in line(store, tmp_path, model=f"local-dir:{tmp_path}/nowhere")


def test_weights_of_another_shape(tmp_path: Path, store: Store, weights):
    write_tiny(tmp_path, "wide.json", embed_dim=24)
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    text = line(store, tmp_path, model="wide.json", pretrained=str(tmp_path / "w.safetensors"))
    assert "size mismatch" in text
    assert "must fit the model" in text


def test_weights_that_lack_one(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    del weights["visual.proj"]
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    assert "visual.proj" in line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_safetensors_file_cut_off(tmp_path: Path, store: Store, tiny: EncoderSection, weights, keep: float):
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    text = line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / "w.safetensors"))
    assert "must fit the model and be complete" in text


@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickle_that_is_no_checkpoint(tmp_path: Path, store: Store, tiny: EncoderSection, trusted: bool):
    for name, data in (("empty.pt", b""), ("noise.pt", b"\x80\x04noise"), ("list.pt", pickle.dumps([1, 2]))):
        (tmp_path / name).write_bytes(data)
        text = line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / name), trusted=trusted)
        assert ("must fit the model" if trusted else "trusted = true") in text


@pytest.mark.parametrize(
    "name", ["w.pt", "w.PT", "w.pth", "w.bin", "w.ckpt", "w.model", "w", "w.pkl", "w.safetensors", "w.npz", "w.npy"]
)
def test_a_checkpoint_with_a_trap_is_not_run(tmp_path: Path, store: Store, tiny: EncoderSection, name: str):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / name))
    assert not (tmp_path / "trapped").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "trapped").exists()  # so the trap works


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth"])
@pytest.mark.parametrize("beside", [None, "zzz.safetensors"])
def test_a_folder_with_a_trap_is_not_run(tmp_path: Path, store: Store, weights, name: str, beside: str | None):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": tiny_config()}))
    torch.save({"state_dict": weights, "extra": Trap(tmp_path / "trapped")}, folder / name)
    if beside:  # of a name that open_clip prefers less than the pickle's
        safetensors.torch.save_file(weights, folder / beside)
    line(store, tmp_path, model=f"local-dir:{folder}")
    assert not (tmp_path / "trapped").exists()


def test_weights_that_are_not_finite(tmp_path: Path, store: Store, tiny: EncoderSection, weights):
    weights["ln_final.bias"][3] = torch.inf
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    text = line(store, tmp_path, model=tiny.model, pretrained=str(tmp_path / "w.safetensors"))
    assert "w.safetensors: the weights ln_final.bias are not all finite" in text
