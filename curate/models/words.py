"""open_clip's tokens of captions, sooner.

Its byte-pair tokenizer goes through each word of each caption letter by letter, and asks `ftfy` to mend texts in which
there is nothing to mend: 55 µs a caption, beside 460 for decoding and cropping its picture. Captions share most words.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from torch import Tensor

MOST_WORDS = 2**16
"""That are remembered, some 20 MB of them; then all are forgotten."""


class WordTokenizer(SimpleTokenizer):  # type: ignore[misc]
    """The same tokens as another tokenizer's; each word is taken apart once.

    Args:
        tokenizer: open_clip's; it is not changed.
    """

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        # All that it has, without reading the vocabulary once more.
        self.__dict__.update(tokenizer.__dict__)
        self._lowers = tokenizer.clean_fn is get_clean_fn("lower")
        self._one_word = copy.copy(tokenizer)
        self._one_word.clean_fn = str  # a word is found in a text that is clean
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, list[int]] = {}
        # open_clip's own, by word as well, which grows for ever; it begins with the words that are never taken apart.
        self._one_word.cache = {word: word for word in map(self.decoder.__getitem__, self.all_special_ids)}

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """As open_clip's, without a tensor for each text: int64 [n, L]."""
        if self.reduction_fn is not None:
            reduced: Tensor = super().__call__(texts, context_length)
            return reduced
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        found = np.zeros((len(texts), length), np.int64)
        for row, text in zip(found, texts, strict=True):
            tokens = [self.sot_token_id, *self.encode(text)][: length - 1]
            row[: len(tokens) + 1] = [*tokens, self.eot_token_id]
        return torch.from_numpy(found)

    def encode(self, text: str) -> list[int]:
        """As open_clip's."""
        if len(self._known) > MOST_WORDS:
            self._forget()
        # The pattern knows no context: a word that it finds in a text is one that it finds alone.
        tokens: list[int] = []
        for word in self.pat.findall(self._clean(text)):
            known = self._known.get(word)
            if known is None:
                known = self._known[word] = self._one_word.encode(word)
            tokens += known
        return tokens

    def _clean(self, text: str) -> str:
        """What open_clip's cleaning makes of a text."""
        # Of printable ASCII `ftfy` mends HTML's entities alone, which begin so.
        if self._lowers and text.isascii() and text.isprintable() and "&" not in text:
            return " ".join(text.split()).lower()
        cleaned: str = self.clean_fn(text)
        return cleaned


def remembering(tokenizer: Any) -> Any:
    """A `WordTokenizer` of a tokenizer, if it is of the kind that there is one of; else that tokenizer."""
    return WordTokenizer(tokenizer) if type(tokenizer) is SimpleTokenizer else tokenizer
