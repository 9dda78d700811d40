"""Which models of open_clip's registry can be curated with, each made with random weights and without network.

    python -m benchmarks.registry > docs/models.md

What a model needs of the hub (tokenizer, text tower's configuration, weights) is made here, in the forms that the hub
has it in, with small vocabularies and few layers: a twin differs from its model in depth alone, and in the width of a
text tower of transformers. Each twin is stored in a root, loaded from there as a worker
would, and embeds pictures with captions.
"""

import argparse
import contextlib
import copy
import json
import logging
import string
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import sentencepiece
import timm
import torch
import transformers
from huggingface_hub import constants
from PIL import Image

from curate.errors import CurateError
from curate.models.create import create_model
from curate.models.encoder import load_encoder, store_model
from curate.recipe import EncoderSection
from curate.storage import Store

CAPTIONS = ["a red circle", "two blue squares on a table, seen from above"]
LETTERS = string.ascii_letters + string.digits + ".,"
REVISION = "0" * 40
TOKENIZERS = {
    "timm/ViT-": "T5, unigram",
    "timm/ViT-B-16-SigLIP-i18n": "mT5, unigram",
    "timm/ViT-SigLIP2": "Gemma, BPE",
    "bert": "BERT, WordPiece",
    "roberta": "RoBERTa, BPE of bytes",
    "xlm": "XLM-RoBERTa, unigram",
    "mt5": "mT5, SentencePiece",
    "nllb": "NLLB, BPE",
}
NARROW: dict[str, dict[str, Any]] = {
    "roberta": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "xlm-roberta": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "mt5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2},
    "m2m_100": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of the registry; all if none is given")
    names = parser.parse_args().models or open_clip.list_models()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        # Constants of the library, which has read the environment by now.
        constants.HF_HUB_CACHE = make_hub(Path(scratch) / "hub")
        constants.HF_HUB_OFFLINE = True
        register_twins(Path(scratch) / "twins", names)
        timm.create_model = shallow_timm
        for number, name in enumerate(names):
            with tempfile.TemporaryDirectory(dir=scratch) as root:
                rows.append((name, *kinds(name), outcome(EncoderSection(model=name), Path(root))))
            print(f"{number + 1} of {len(names)}", *rows[-1], sep=" | ", file=sys.stderr)
    good = sum(row[-1].startswith("D = ") for row in rows)
    print("# Models\n")
    print(f"{good} of the {len(rows)} models in open_clip {open_clip.__version__}'s registry, by `{command()}`:")
    print("each with random weights and few layers, stored, loaded and embedding. The last column says D, or what is")
    print("missing.\n")
    print("| model | image tower | text tower | tokenizer | embedded |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def command() -> str:
    """How this was called."""
    return " ".join(["python -m benchmarks.registry", *sys.argv[1:]])


def kinds(name: str) -> tuple[str, str, str]:
    """Image tower, text tower and tokenizer of a model."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        image = f"timm {vision['timm_model_name']}"
    else:
        image = "ResNet" if isinstance(vision["layers"], list) else "ViT"
    tower = text.get("hf_model_name") or ("CoCa" if "multimodal_cfg" in config else "transformer")
    return image, tower, tokenizer_family(text.get("hf_tokenizer_name"))


def tokenizer_family(repository: str | None) -> str:
    """In words; CLIP's own comes with open_clip."""
    if repository is None:
        return "CLIP's BPE"
    if "SigLIP2" in repository:
        return TOKENIZERS["timm/ViT-SigLIP2"]
    found = [family for start, family in TOKENIZERS.items() if start in repository]
    return found[-1]


def outcome(section: EncoderSection, base: Path) -> str:
    """D of the embeddings that a model makes once it went through a root, else the line that says what is wrong."""
    store = Store(str(base / "root"))
    try:
        model, config, tokenizer = create_model(section, role="reference", base=base, seed=0)
        if "multimodal_cfg" in config:  # open_clip leaves some of CoCa's weights as the memory happens to be
            generator = torch.Generator().manual_seed(0)
            for weight in model.parameters():
                weight.data.normal_(std=0.02, generator=generator)
        spec = store_model(store, model, config, tokenizer, source=section.source)
        del model  # some are large
        encoder = load_encoder(store, spec, torch.device("cpu"))
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)) for _ in CAPTIONS]
        pixels = torch.from_numpy(np.stack([encoder.crop(picture) for picture in pictures]))
        texts = encoder.tokenize(CAPTIONS)
        found = encoder.encode(pixels, texts)
    except CurateError as error:
        return " ".join(str(error).split())
    assert torch.equal(texts, tokenizer(CAPTIONS)), f"{section.model}: its tokenizer came out of the root another one"
    assert not torch.equal(texts[0], texts[1]), f"{section.model}: two captions, one text"
    for z in found:
        norms = torch.linalg.vector_norm(z, dim=1)
        assert torch.allclose(norms, torch.ones(len(CAPTIONS)), atol=1e-3), (section.model, norms)
        assert not torch.equal(z[0], z[1]), f"{section.model}: two pairs, one embedding"
    return f"D = {found[0].shape[1]}"


def register_twins(folder: Path, names: list[str]) -> None:
    """Put shallow twins into open_clip's registry, under the names of their models."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(shallow(open_clip.get_model_config(name))))
    open_clip.add_model_config(folder)


def shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration with one layer wherever the configuration says how many."""
    twin = copy.deepcopy(dict(config))
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if "layers" in twin.get(part, {}):
            layers = twin[part]["layers"]
            twin[part]["layers"] = [1] * len(layers) if isinstance(layers, list) else 1
    return twin


create_timm: Any = timm.create_model


def shallow_timm(name: str, **how: Any) -> Any:
    """A model of timm with one block a stage where its kind can be told how many."""
    for depth in ({"depth": 1}, {"depths": (1, 1, 1, 1)}):
        with contextlib.suppress(TypeError):
            return create_timm(name, **how, **depth)
    return create_timm(name, **how)


# --- what the hub would hold -----------------------------------------------------------------------------------------


def make_hub(cache: Path) -> str:
    """Make a download cache of the hub that holds what the registry's models need of it; returns its path."""
    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    texts = [config["text_cfg"] for config in configs]
    for repository in sorted({text["hf_tokenizer_name"] for text in texts if "hf_tokenizer_name" in text}):
        write_tokenizer(repository, snapshot(cache, repository))
    for repository in sorted({text["hf_model_name"] for text in texts if "hf_model_name" in text}):
        write_text_config(repository, snapshot(cache, repository))
    return str(cache)


def snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in a download cache."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(REVISION)
    folder = home / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_tokenizer(repository: str, folder: Path) -> None:
    """A small tokenizer of the repository's family, in the files that such a repository has."""
    unigram = [(piece, -float(i)) for i, piece in enumerate(["▁", *LETTERS])]
    match tokenizer_family(repository):
        case "T5, unigram" | "mT5, unigram":
            vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram]
            made = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
        case "Gemma, BPE":
            specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
            made = transformers.GemmaTokenizer(vocab=numbered([*specials, "▁", *LETTERS]), merges=[])
        case "BERT, WordPiece":
            specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            pieces = [*specials, *LETTERS.lower(), *(f"##{letter}" for letter in LETTERS.lower())]
            made = transformers.BertTokenizer(vocab=numbered(list(dict.fromkeys(pieces))))
        case "RoBERTa, BPE of bytes":
            made = transformers.RobertaTokenizer(
                vocab=numbered(["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]), merges=[]
            )
        case "XLM-RoBERTa, unigram":
            vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigram]
            made = transformers.XLMRobertaTokenizer(vocab=vocab)
        case "NLLB, BPE":
            made = transformers.NllbTokenizer(
                vocab=numbered(["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS]), merges=[]
            )
        case "mT5, SentencePiece":  # no tokenizer.json there
            corpus = [" ".join(LETTERS[i:] + LETTERS[:i]) for i in range(len(LETTERS))]
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(corpus),
                model_prefix=str(folder / "spiece"),
                vocab_size=len(LETTERS) + 4,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                minloglevel=2,
            )
            (folder / "spiece.vocab").unlink()
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
            return
    made.save_pretrained(folder)


def numbered(pieces: list[str]) -> dict[str, int]:
    """A vocabulary."""
    return {piece: number for number, piece in enumerate(pieces)}


def write_text_config(repository: str, folder: Path) -> None:
    """The configuration of a narrow text tower of the repository's kind."""
    kind = next(kind for kind in ("xlm-roberta", "roberta", "mt5", "m2m_100", "nllb") if kind in repository)
    kind = {"nllb": "m2m_100"}.get(kind, kind)
    config = transformers.AutoConfig.for_model(kind, vocab_size=256, **NARROW[kind])
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
