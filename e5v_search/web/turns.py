"""Whose turn it is: one call of the model at a time, and no more people in a queue than it can serve."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from e5v_search.embedder import Embedder, Picture, Word
from e5v_search.errors import ServiceBusy


class Turnstile:
    """Lets `limit` in at a time, of one client at most `share`. For one thread, as an event loop is."""

    def __init__(self, limit: int, share: int) -> None:
        self.limit, self.share = limit, share
        self._inside: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._inside.total()

    @contextmanager
    def enter(self, who: str) -> Iterator[None]:
        """Raises ServiceBusy."""
        if len(self) >= self.limit or self._inside[who] >= self.share:
            raise ServiceBusy(f"{len(self)} requests are waiting already; ask again in a moment")
        self._inside[who] += 1
        try:
            yield
        finally:
            self._inside[who] -= 1
            if not self._inside[who]:
                del self._inside[who]


class Turns:
    """A lock that those who are waited for by a person get before all others."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._held = False
        self._urgent = 0

    @contextmanager
    def take(self, urgent: bool) -> Iterator[None]:
        with self._free:
            self._urgent += urgent
            self._free.wait_for(lambda: not self._held and (urgent or not self._urgent))
            self._held = True
            self._urgent -= urgent
        try:
            yield
        finally:
            with self._free:
                self._held = False
                self._free.notify_all()


class InTurn(Embedder):
    """A model that several threads share, called by one at a time."""

    def __init__(self, embedder: Embedder, turns: Turns, urgent: bool) -> None:
        self.name, self.dim, self.made_by = embedder.name, embedder.dim, embedder.made_by
        self.quantize, self.tiles, self.adapter = embedder.quantize, embedder.tiles, embedder.adapter
        self._embedder, self._turns, self._urgent = embedder, turns, urgent

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        with self._turns.take(self._urgent):
            return self._embedder.embed_texts(texts, prompts)

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        with self._turns.take(self._urgent):
            return self._embedder.embed_images(images, prompts)

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        with self._turns.take(self._urgent):
            return self._embedder.embed_composed(pairs, prompts, normalise=normalise)

    # what needs no device waits for nobody

    def open(self, picture: Picture) -> Any:
        return self._embedder.open(picture)

    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        return self._embedder.enough(size)

    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> Any:
        return self._embedder.prepare(image, size)

    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
        with self._turns.take(self._urgent):
            return self._embedder.embed_prepared(prepared, prompts)

    def embed_views(self, prepared: Sequence[Any], views: Sequence[str]) -> np.ndarray:
        with self._turns.take(self._urgent):
            return self._embedder.embed_views(prepared, views)

    def nearest_words(self, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        with self._turns.take(self._urgent):
            return self._embedder.nearest_words(x, k)

    def shared_words(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        with self._turns.take(self._urgent):
            return self._embedder.shared_words(a, x, k)
