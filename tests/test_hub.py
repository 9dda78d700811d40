"""Models whose parts come from the hub: each kind of tokenizer and tower, offline, through a root and back."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from benchmarks.registry import make_hub, outcome, shallow, shallow_timm, snapshot
from curate.errors import UserError
from curate.jobs.cli import app
from curate.jobs.drawn_pool import draw_pool
from curate.models import hub as the_hub
from curate.models.create import create_model
from curate.models.encoder import load_encoder, store_encoder
from curate.models.hub import hub_if_it_answers, without_hub
from curate.recipe import EncoderSection
from curate.storage import Store
from tests.helpers import CPU, tiny_config, tiny_encoder
from tests.stand_in import without_ray

__all__ = ["without_ray"]

README = Path(__file__).parents[1] / "README.md"
TINY_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TINY_TEXT = {"context_length": 16, "vocab_size": 512, "width": 16, "heads": 2, "layers": 1}
SIGLIP_TEXT = TINY_TEXT | {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    # tokenizers
    "T5": {"text_cfg": SIGLIP_TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}},
    "mT5": {"text_cfg": SIGLIP_TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP-i18n-256"}},
    "Gemma": {"text_cfg": SIGLIP_TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2"}},
    "BERT": {
        "text_cfg": TINY_TEXT
        | {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}, "pool_type": "last"}
    },
    "XLM-V": {"text_cfg": TINY_TEXT | {"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2}},
    # text towers of transformers, each with its own tokenizer
    "RoBERTa": {"text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}},
    "XLM-RoBERTa": {"text_cfg": {"hf_model_name": "xlm-roberta-base", "hf_tokenizer_name": "xlm-roberta-base"}},
    "mT5 tower": {"text_cfg": {"hf_model_name": "google/mt5-base", "hf_tokenizer_name": "google/mt5-base"}},
    "NLLB": {
        "text_cfg": {
            "hf_model_name": "facebook/nllb-200-distilled-600M",
            "hf_tokenizer_name": "facebook/nllb-200-distilled-600M",
            "hf_proj_type": "linear",
            "hf_pooler_type": "cls_pooler",
        }
    },
    # image towers, and CoCa
    "ResNet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "timm": {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 160, "timm_proj": "linear"}},
    "CoCa": {
        "custom_text": True,
        "init_logit_bias": None,
        "vision_cfg": TINY_VISION | {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": tiny_config()["text_cfg"] | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A download cache with all tokenizers and text towers that open_clip's registry names."""
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(cache: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub does not answer, and these files were downloaded when it did."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(the_hub, "_why_silent", lambda: "no network in tests")
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_tokenizer_and_tower(tmp_path: Path, hub: str, family: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps(tiny_config(**FAMILIES[family])))
    assert outcome(EncoderSection(model="model.json"), tmp_path) == "D = 16"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", open_clip.list_models())
def test_each_model_of_the_registry(tmp_path: Path, hub: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config(name)
    monkeypatch.setattr(timm, "create_model", shallow_timm)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, shallow(config))
    assert outcome(EncoderSection(model=name), tmp_path) == f"D = {config['embed_dim']}"


def test_a_tokenizer_that_changed_in_the_root_is_refused(tmp_path: Path, hub: str, store: Store) -> None:
    (tmp_path / "model.json").write_text(json.dumps(tiny_config(**FAMILIES["T5"])))
    section = EncoderSection(model="model.json")
    spec = store_encoder(store, section, role="reference", base=tmp_path, seed=0)
    assert store_encoder(store, section, role="reference", base=tmp_path, seed=0) == spec  # nothing of it is by chance
    load_encoder(store, spec, CPU)
    path = store.local_path(f"{spec.folder}/tokenizer.json")
    path.write_text(path.read_text().replace('"a"', '"e"', 1))
    with pytest.raises(UserError, match="expected the configuration and tokenizer that its folder names"):
        load_encoder(store, spec, CPU)


def test_a_tokenizer_in_a_folder(tmp_path: Path, hub: str) -> None:
    own = snapshot(Path(hub), "bert-base-uncased")
    (tmp_path / "model.json").write_text(
        json.dumps(tiny_config(text_cfg=FAMILIES["BERT"]["text_cfg"] | {"hf_tokenizer_name": str(own)}))
    )
    assert outcome(EncoderSection(model="model.json"), tmp_path) == "D = 16"


def test_a_text_tower_without_pretrained_weights_has_random_ones_of_the_seed(tmp_path: Path, hub: str) -> None:
    (tmp_path / "model.json").write_text(json.dumps(tiny_config(**FAMILIES["RoBERTa"])))

    def made(seed: int) -> torch.Tensor:
        model, _, _ = create_model(EncoderSection(model="model.json"), role="learner", base=tmp_path, seed=seed)
        return model.text.transformer.embeddings.word_embeddings.weight

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


# --- without the hub -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "missing"),
    [
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K"]),
        ({"model": "ViT-B-16-SigLIP", "pretrained": "webli"}, ["timm/ViT-B-16-SigLIP"]),
        ({"model": "roberta-ViT-B-32"}, ["roberta-base"]),
        ({"model": "hf-hub:somebody/model"}, ["somebody/model"]),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(
    tmp_path: Path, section: dict[str, str], missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        create_model(EncoderSection(**section), role="reference", base=tmp_path, seed=0)
    assert time.monotonic() - began < 30, "it was asked again and again"
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"reference.model = {section['model']!r}")
    assert all(name in line for name in [*missing, "does not answer", "refused", "local-dir:FOLDER"])
    assert not constants.HF_HUB_OFFLINE


def test_nobody_asks_a_hub_that_does_not_answer(hub: str) -> None:
    with hub_if_it_answers() as silent:
        assert silent == "no network in tests"
        assert constants.is_offline_mode()
        with without_hub():
            assert constants.is_offline_mode()
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()


def test_the_hub_is_asked_for_nothing_that_is_here(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(the_hub, "_why_silent", asked)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", tiny_config())
    folder = store.local_path(tiny_encoder(store, tmp_path).folder)
    for name in ("ViT-B-32", f"local-dir:{folder}", "tiny.json"):
        create_model(EncoderSection(model=name), role="learner", base=tmp_path, seed=0)


# --- the README's recipe ---------------------------------------------------------------------------------------------

CURATE = """
import sys, open_clip
open_clip.add_model_config(sys.argv.pop(1))
from curate.jobs.cli import app, silence_open_clip
silence_open_clip()
for command in sys.argv.pop(1).split(";"):
    app(command.split(), standalone_mode=False)
"""


def siglip_twin() -> dict[str, Any]:
    """ViT-B-16-SigLIP, as small as can be: what differs is how deep and how wide."""
    config = shallow(open_clip.get_model_config("ViT-B-16-SigLIP"))
    config["embed_dim"] = 64
    config["vision_cfg"] |= {"timm_model_name": "test_vit", "image_size": 160}
    config["text_cfg"] |= {"width": 64, "heads": 2}
    return config


@pytest.mark.parametrize(
    "apart", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["here", "in its own process, on Ray"]
)
def test_the_readmes_recipe_as_it_stands(
    tmp_path: Path, cache: str, s3_root: str, request: pytest.FixtureRequest, apart: bool
) -> None:
    """Character for character; the batch alone is smaller, by the command line."""
    recipe = README.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]
    assert 'model = "ViT-B-16-SigLIP"' in recipe
    (tmp_path / "recipe.toml").write_text(recipe)
    twin = tmp_path / "twin" / "ViT-B-16-SigLIP.json"
    twin.parent.mkdir()
    twin.write_text(json.dumps(siglip_twin()))
    publish_weights(Path(cache), twin)

    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    draw_pool(tmp_path / "pool", rows=400, shards=2, image_size=32, seed=0)
    for path in (tmp_path / "pool").iterdir():
        client.upload_file(str(path), "bucket", f"pool/{path.name}")
    client.close()

    small = "--set selection.sub_batch_size=16"
    commands = f"check recipe.toml {small};round recipe.toml {small}"
    said = run(commands, twin, cache, tmp_path) if apart else run_here(commands, twin, tmp_path, request)
    assert "2 super-batches of 160 at most" in said
    assert "round 0: 2 sub-batches of 16" in said
    assert "reference: ViT-B-16-SigLIP/webli" in said


def publish_weights(cache: Path, twin: Path) -> None:
    """What the tag webli stands for, in the repository where the tokenizer is, too."""
    torch.manual_seed(0)
    config = json.loads(twin.read_text())
    del config["custom_text"]
    model = open_clip.CustomTextCLIP(**config)
    folder = snapshot(cache, "timm/ViT-B-16-SigLIP")
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def run_here(commands: str, twin: Path, folder: Path, request: pytest.FixtureRequest) -> str:
    """In this process, without Ray."""
    patch, capsys = (request.getfixturevalue(name) for name in ("monkeypatch", "capsys"))
    request.getfixturevalue("hub")
    request.getfixturevalue("without_ray")
    patch.setitem(open_clip.factory._MODEL_CONFIGS, twin.stem, json.loads(twin.read_text()))
    patch.chdir(folder)
    for command in commands.split(";"):
        app(command.split(), standalone_mode=False)
    return str(capsys.readouterr().out)


def run(commands: str, twin: Path, cache: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CURATE, str(twin), commands],
        cwd=folder,
        env=dict(os.environ) | {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
