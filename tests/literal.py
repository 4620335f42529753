"""An embedder whose vectors are read off its inputs by eye, for rankings that are worked out by hand.

A text is its numbers: "3 0 4" is (3, 0, 4). A picture of one colour is that colour. A page with a drawn text is looked up in
`pages`. A composed query is twice the numbers before the comma and once those behind it, whatever the picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from e5v_search import media
from e5v_search.embedder import Embedder, Fingerprint, Picture, Word


class Literal(Embedder):
    name, dim, quantize, tiles, adapter = "literal", 3, None, "auto", None
    made_by = Fingerprint("literal", "1")

    def __init__(self, pages: dict[bytes, str] | None = None) -> None:
        self.pages = pages or {}
        self.asked: list[tuple[str, str, Any]] = []  # (kind, prompts, input), one for each input

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        self.asked += [("text", prompts, text) for text in texts]
        return unit(np.array([numbers(text) for text in texts]))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        return self.embed_prepared([self.open(image) for image in images], prompts)

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        self.asked += [("composed", prompts, text) for _, text in pairs]
        parts = [[numbers(part) for part in text.split(", ")] for _, text in pairs]
        raw = np.array([2 * part[0] + part[-1] for part in parts])
        return unit(raw) if normalise else raw.astype(np.float32)

    def open(self, picture: Picture) -> Image.Image:
        return media.open_picture(picture)

    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        return image

    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray:
        self.asked += [("image", prompts, image) for image in prepared]
        return unit(np.array([self._seen(image) for image in prepared]))

    def embed_views(self, prepared: Sequence[Any], views: Sequence[str]) -> np.ndarray:
        return np.stack([self.embed_prepared(prepared, view) for view in views])

    def nearest_words(self, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        return [[] for _ in x]

    def shared_words(self, a: np.ndarray, x: np.ndarray, k: int = 10) -> list[list[Word]]:
        return [[] for _ in x]

    def _seen(self, image: Image.Image) -> np.ndarray:
        if (drawn := self.pages.get(image.tobytes())) is not None:
            return numbers(drawn)
        return np.array(image.getpixel((0, 0)), dtype=np.float64)


def numbers(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.rstrip(".").split()])


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
