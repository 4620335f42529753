"""Models that can be explained in words of their own, and models that cannot."""

from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from e5v_search.backbones import Embedder, registry
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.backbones.vocabulary import Vocabulary
from e5v_search.embedder import Word
from e5v_search.errors import ModelError, TextTooLong


class LanguageModel(Embedder):
    """A model whose embeddings are states of a language model: prompts go in through its `encoder`, and its vocabulary
    says what comes out."""

    folder: Path
    encoder: PromptEncoder

    @cached_property
    def vocabulary(self) -> Vocabulary:
        if self.made_by.dim is not None:
            raise ModelError("cut vectors have no words: explain with a model that was loaded without --dim")
        return Vocabulary.read(self.folder)

    def nearest_words(self, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        return self.vocabulary.nearest(x, k)

    def shared_words(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        return self.vocabulary.shared(a, x, k)

    def fitting(self, length: int, index: int) -> int:
        """`length`, of the tokens of an input, if they are not too many; else TextTooLong."""
        if length > self.encoder.max_tokens:
            raise TextTooLong(
                f"input {index + 1} has {length} tokens with its prompt; "
                f"{self.name} takes {self.encoder.max_tokens} at most: shorten it"
            )
        return length


class Wordless(Embedder):
    """A model without a vocabulary of which its embeddings could speak."""

    def nearest_words(self, x: np.ndarray, k: int = 10) -> NoReturn:
        self._no_words()

    def shared_words(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> NoReturn:
        self._no_words()

    def _no_words(self) -> NoReturn:
        raise ModelError(
            f"{self.name} has no vocabulary to explain with; explanations need a language model, such as {registry.TINY}"
        )
