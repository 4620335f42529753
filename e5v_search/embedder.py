"""What the rest of the program asks of a model. Knows no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

Picture = str | bytes | Path | Image.Image


@dataclass(frozen=True)
class Fingerprint:
    """What made an embedding: vectors with different fingerprints do not share a space.

    float32, float16 and bfloat16 are one class (`weights="float"`), so that a collection made on a GPU can be asked
    on a laptop; quantised weights are another.
    """

    model: str
    revision: str
    prompts: str = "retrieval"
    backend: str = "pil"
    tiles: str = "auto"
    weights: str = "float"

    def __str__(self) -> str:
        return f"{self.model}@{self.revision[:12]}/{self.prompts}/{self.backend}/{self.tiles}/{self.weights}"

    def with_prompts(self, prompts: str) -> "Fingerprint":
        return replace(self, prompts=prompts)


class Embedder(Protocol):
    """One model. Embeddings are float32 arrays (n, dim) whose rows have length 1."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray: ...
    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray: ...
    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray: ...

    def prepare(self, image: Image.Image) -> Any:
        """The part of an image's work that needs no device: called from many threads, ahead of the model.

        Takes an upright RGB picture; gives a value of the embedder's own with an attribute `nbytes`.
        """

    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray: ...
