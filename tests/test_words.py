"""Tokens of captions whose words are remembered: to the last one those of open_clip's own tokenizer."""

import functools
import pickle
import random
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from curate.models import words
from curate.models.encoder import Encoder
from curate.models.words import WordTokenizer, remembering

DATA = Path(__file__).parents[2] / "shared/data"
# What cleaning, the pattern and byte pairs tell apart; put side by side in every order.
ODD = [
    *("&", "&amp;", "&amp;lt;", "lt", ";", "<start_of_text>", "<end_of_text>", "<", "'s", "'", "s", "'LL", "_"),
    *(" ", "\t", "\n", "\r", "\x1b[36m", "\x7f", "\xa0"),
    *("Ａ", "ﬁ", "“", "â€™", "Ã©", "é", "e\u0301", "İ", "ß", "猫", "🙂", "9", "dog", "A"),
]


@functools.cache
def tokenizer(clean: str = "lower", reduction_mask: str = "") -> SimpleTokenizer:
    return SimpleTokenizer(clean=clean, reduction_mask=reduction_mask)


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.one_of(st.text(), st.lists(st.sampled_from(ODD)).map("".join), st.text("ab '&<>;_\t#x")), max_size=4
    ),
    clean=st.sampled_from(["lower", "canonicalize", "whitespace"]),
)
@example(texts=["It's 20&nbsp;% off  &amp;amp; more", "word " * 200], clean="lower")
def test_each_text_has_open_clip_s_tokens(texts: list[str], clean: str) -> None:
    kept = remembering(tokenizer(clean))
    for _ in range(2):  # the second time from memory
        assert kept(texts).tolist() == tokenizer(clean)(texts).tolist()


def test_long_texts_end_or_are_reduced_as_open_clip_has_it() -> None:
    texts = ["a dog", "dog " * 74, "dog " * 75, "dog " * 76, "dog " * 300, ""]
    for kept in (tokenizer(), tokenizer(reduction_mask="simple")):
        for length in (None, 3, 77, 80):
            random.seed(0)  # by which "simple" cuts
            found = remembering(kept)(texts, length)
            random.seed(0)
            assert found.equal(kept(texts, length))
    assert remembering(tokenizer())("a dog").equal(tokenizer()("a dog"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_real_captions_have_open_clip_s_tokens() -> None:
    captions = [
        caption
        for folder in ("openstax-dev", "openstax-physics-ml", "emoji-en")
        for caption in pq.read_table(DATA / folder, columns=["caption"])["caption"].to_pylist()[::4]
        if caption
    ]
    assert len(captions) > 4_000
    kept = remembering(tokenizer())
    assert kept(captions).equal(tokenizer()(captions))
    assert kept(captions, 20).equal(tokenizer()(captions, 20))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 10)
    kept = WordTokenizer(tokenizer())
    texts = [f"<start_of_text> dog{chr(97 + i)} cat{chr(97 + i)}" for i in range(26)]
    assert kept(texts).equal(tokenizer()(texts))
    assert len(kept._known) <= 14
    assert len(kept._one_word.cache) <= 16


def test_a_tokenizer_goes_to_other_processes_and_others_stay_as_they_are() -> None:
    kept = remembering(tokenizer())
    assert pickle.loads(pickle.dumps(kept))("a red ring").equal(tokenizer()("a red ring"))

    class Other(SimpleTokenizer):
        def encode(self, text: str) -> list[Any]:
            return []

    other = Other.__new__(Other)
    assert remembering(other) is other


def test_a_model_in_the_root_tokenizes_from_memory(encoder: Encoder) -> None:
    assert isinstance(encoder.tokenize, WordTokenizer)
    found = encoder.tokenize(["a red ring"])
    assert found.equal(open_clip.get_tokenizer("ViT-B-32")(["a red ring"], found.shape[1]))
