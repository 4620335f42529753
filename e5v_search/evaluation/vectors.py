"""Inputs to vectors, through the cache: each different input is embedded once, and only if no run has done it before."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.embedder import Embedder, embed_each
from e5v_search.errors import MediaError, ModelError
from e5v_search.evaluation.cache import VectorFile
from e5v_search.evaluation.records import Source
from e5v_search.parallel import ahead, windows
from e5v_search.prompts import load_prompts

# inputs embedded before they are put away: what a kill may cost
_TEXTS, _PICTURES, _COMPOSED = 256, 64, 32

Blocks = Iterator[tuple[list[int], np.ndarray]]


class Vectors:
    """Embeddings by `embedder`, kept in the folder `cache`; `on_progress(done, total)` counts inputs of the matrix under way.

    Raises ModelError when the model gives something that is no number, which is never kept.
    """

    def __init__(self, embedder: Embedder, cache: Path, on_progress: Callable[[int, int], None] = lambda done, total: None):
        self.embedder, self.cache, self._on_progress = embedder, cache, on_progress
        self.embedded = 0  # inputs that were not in the cache

    def texts(self, texts: Sequence[str], prompts: str) -> np.ndarray:
        """-> (n, dim), rows of length 1. TextTooLong names the text."""

        def make(todo: list[int]) -> Blocks:
            for some in windows(todo, _TEXTS):
                yield some, self._texts([texts[i] for i in some], prompts)

        keys = [_key(text) for text in texts]
        return self._stacked(keys, self._made("text", prompts, keys, make))

    def pictures(self, sources: Sequence[Source], prompts: str) -> tuple[np.ndarray, dict[int, str]]:
        """-> (n, dim), rows of length 1, and which of them are zero because the picture cannot be used, with the reason."""
        bad: dict[int, str] = {}

        def known(i: int) -> bytes | None:
            try:
                return _key(sources[i].content())
            except MediaError as error:
                bad[i] = str(error)
                return None

        def prepared(i: int) -> Any:
            try:
                return self.embedder.open(sources[i].picture())
            except MediaError as error:
                bad[i] = str(error)

        def make(todo: list[int]) -> Blocks:
            for some in windows(zip(todo, ahead(prepared, todo), strict=True), _PICTURES):
                if good := [(i, ready) for i, ready in some if i not in bad]:
                    yield [i for i, _ in good], self.embedder.embed_prepared([ready for _, ready in good], prompts)

        keys = list(ahead(known, range(len(sources))))
        vectors = self._made("image", prompts, keys, make)
        for i, key in enumerate(keys):  # copies of a picture that could not be opened
            if key is not None and key not in vectors:
                bad.setdefault(i, "a copy of a picture that cannot be used")
        return self._stacked(keys, vectors), bad

    def composed(self, pairs: Sequence[tuple[Source, str]], prompts: str, *, normalise: bool = True) -> np.ndarray:
        """-> (n, dim), rows of length 1 unless not normalised."""

        def make(todo: list[int]) -> Blocks:
            # changes to one picture side by side: the model then looks at it once
            for some in windows(sorted(todo, key=lambda i: pairs[i][0].name), _COMPOSED):
                pictures = {pairs[i][0].name: pairs[i][0].picture() for i in some}
                inputs = [(pictures[pairs[i][0].name], pairs[i][1]) for i in some]
                yield some, self.embedder.embed_composed(inputs, prompts, normalise=normalise)

        contents = {source.name: source for source, _ in pairs}
        known = dict(zip(contents, ahead(lambda source: source.content(), contents.values()), strict=True))
        keys = [_key(known[source.name], text) for source, text in pairs]
        return self._stacked(keys, self._made("composed", prompts, keys, make, "" if normalise else "raw"))

    def _texts(self, texts: Sequence[str], prompts: str) -> np.ndarray:
        vectors = embed_each(texts, lambda some: self.embedder.embed_texts(some, prompts))
        for text, vector in zip(texts, vectors, strict=True):
            if isinstance(vector, Exception):
                raise type(vector)(f"{text[:60]!r}…: {vector}") from vector
        return np.stack([vector for vector in vectors if not isinstance(vector, Exception)])

    def _made(
        self,
        kind: str,
        prompts: str,
        keys: Sequence[bytes | None],
        make: Callable[[list[int]], Blocks],
        form: str = "",
    ) -> dict[bytes, np.ndarray]:
        """Vectors by key, those that could be had; `make` gives those of the inputs that are in no file yet, in blocks."""
        content = load_prompts(prompts).content(kind)  # and not its name: a user's file may change under it
        made_by = f"{self.embedder.made_by.with_prompts(content)} {kind} {form}"
        first = {key: i for i, key in reversed(list(enumerate(keys))) if key is not None}
        with VectorFile(self.cache, made_by, self.embedder.dim) as file:
            vectors = file.get(list(first))
            todo = sorted(i for key, i in first.items() if key not in vectors)
            done = len(first) - len(todo)
            for some, x in make(todo):
                if not np.isfinite(x).all():
                    raise ModelError(f"{self.embedder.name} gave values that are no numbers; try another --dtype")
                own = [key for i in some if (key := keys[i]) is not None]
                file.put(own, x)
                vectors |= zip(own, x, strict=True)
                self.embedded += len(some)
                done += len(some)
                self._on_progress(done, len(first))
        return vectors

    def _stacked(self, keys: Sequence[bytes | None], vectors: dict[bytes, np.ndarray]) -> np.ndarray:
        x = np.zeros((len(keys), self.embedder.dim), np.float32)
        for i, key in enumerate(keys):
            if key is not None and key in vectors:
                x[i] = vectors[key]
        return x


def _key(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
