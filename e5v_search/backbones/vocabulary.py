"""The words of a model's own vocabulary that lie nearest to an embedding: E5-V's figure 1, UniME's figure 5.

An embedding is a last hidden state; the rows that would score the next word against it (lm_head's, or the input table's
where a checkpoint has no others) are turned to length 1, so that a score is a cosine. Any stored vector will do: no
forward pass, and of the weights this one tensor. The mean row stays in: taking it off, tried with e5v-tiny on photos
and sentences, brought up rare pieces of words rather than better words.
"""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from e5v_search.backbones.checkpoint import read_tensor
from e5v_search.backbones.prompt_encoder import load_tokenizer
from e5v_search.embedder import Word
from e5v_search.errors import UsageError

_ROWS = 256  # of the vocabulary, float32 at a time, so few that a processor's cache holds them
_VECTORS = 64
_ROWS_OF_WORDS = ("lm_head.weight", "language_model.embed_tokens.weight", "embed_tokens.weight")


class Vocabulary:
    """Words, each with the tokens that spell it: with a blank before it or without, in lower case or another.

    A token with a blank before it that consists of letters makes its word a whole one; all others are pieces. Special
    and added tokens are left out, and what is no text by itself (a part of a letter's bytes, blanks, control characters).
    """

    def __init__(self, rows: Tensor, tokenizer: Tokenizer) -> None:
        """rows (tokens, dim): row i is that of token i; rows without a token and tokens without a row are left out."""
        texts = dict(_texts(tokenizer, len(rows)))
        spellings: dict[str, list[int]] = {}
        for token, text in texts.items():
            spellings.setdefault(text.strip().casefold(), []).append(token)
        whole = {token for token, text in texts.items() if text[0] == " " and _is_word(text[1:])}
        # the spelling that the tokenizer learned first is the usual one
        usual = {next((t for t in tokens if t in whole), tokens[0]): tokens for tokens in spellings.values()}
        order = sorted(usual, key=lambda token: (token not in whole, token))
        self.rows = rows
        self.texts = [texts[token].strip() for token in order]
        self.whole = len(whole.intersection(order))  # whole words come first
        self._tokens = torch.tensor([token for word in order for token in usual[word]], dtype=torch.long)
        self._starts = np.cumsum([0, *(len(usual[word]) for word in order[:-1])])

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary":
        """Of a checkpoint folder. Raises IncompleteCheckpoint."""
        return cls(read_tensor(folder, *_ROWS_OF_WORDS), load_tokenizer(folder))

    def nearest(self, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        """Embeddings (n, dim) of any length and precision -> the k words nearest to each: whole ones first, then by score."""
        unit = self._unit(x)
        return [
            self._best(scores, k) for i in range(0, len(unit), _VECTORS) for scores in self._cosines(unit[i : i + _VECTORS])
        ]

    def shared(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        """For each embedding of x (n, dim) the words near to it and to a (dim,), by the smaller of the two cosines."""
        [own] = self._cosines(self._unit(a[None]))
        unit = self._unit(x)
        return [
            self._best(np.minimum(own, scores), k)
            for i in range(0, len(unit), _VECTORS)
            for scores in self._cosines(unit[i : i + _VECTORS])
        ]

    def _unit(self, x: np.ndarray) -> Tensor:
        dim = self.rows.shape[1]
        if x.ndim != 2 or x.shape[1] != dim:
            raise UsageError(f"vectors of shape {x.shape} are not this model's: it makes (n, {dim})")
        return torch.nn.functional.normalize(torch.from_numpy(np.asarray(x, np.float32)), dim=1)

    def _cosines(self, unit: Tensor) -> np.ndarray:
        """(n, dim) -> (n, words): of each word its best spelling"""
        blocks = []
        for i in range(0, len(self._tokens), _ROWS):
            rows = self.rows[self._tokens[i : i + _ROWS]].float()
            blocks.append(unit @ rows.T / rows.norm(dim=1).clamp(min=1e-12))
        scores: np.ndarray = np.maximum.reduceat(torch.cat(blocks, dim=1).numpy(), self._starts, axis=1)
        return scores

    def _best(self, scores: np.ndarray, k: int) -> list[Word]:
        order = np.argsort(-scores[: self.whole], kind="stable")[:k]
        if len(order) < k:
            order = np.concatenate((order, self.whole + np.argsort(-scores[self.whole :], kind="stable")))[:k]
        return [Word(self.texts[i], float(scores[i])) for i in order]


def _texts(tokenizer: Tokenizer, rows: int) -> Iterator[tuple[int, str]]:
    """Token ids below `rows` that are text by themselves, with it, a leading blank included."""
    added = tokenizer.get_added_tokens_decoder()
    ids = [token for token in range(min(rows, tokenizer.get_vocab_size())) if token not in added]
    # behind another token: some decoders take the blank off a text's first word
    first = tokenizer.encode("a", add_special_tokens=False).ids
    start = len(tokenizer.decode(first))
    decoded = tokenizer.decode_batch([[*first, token] for token in ids], skip_special_tokens=False)
    for token, text in zip(ids, (text[start:] for text in decoded), strict=True):
        if text.strip() and text.strip().isprintable() and "\ufffd" not in text:
            yield token, text


def _is_word(text: str) -> bool:
    # accents and vowel signs may stand behind a letter by themselves
    return text[:1].isalpha() and all(c.isalpha() or unicodedata.category(c)[0] == "M" for c in text)
