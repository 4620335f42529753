"""One file per model family, each an `Embedder`; `Embedder.load` finds the family by name or by a folder's config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from e5v_search.embedder import Fingerprint, Picture


class Embedder(ABC):
    """A loaded model. Embeddings are float32 arrays (n, dim) whose rows have length 1.

    `name` is what `load` was asked for, `quantize` how its weights are held: together they load it again.
    """

    name: str
    dim: int
    made_by: Fingerprint
    quantize: str | None

    @property
    def fingerprint(self) -> str:
        """What a collection of this model's vectors is bound to."""
        return str(self.made_by)

    @staticmethod
    def load(model: str = "auto", *, device: str = "auto", dtype: str = "auto", quantize: str | None = None) -> Embedder:
        """Load a model: "auto", a known name, a hub id (`owner/name@revision`) or a checkpoint folder.

        device auto/cpu/cuda/cuda:1/mps, dtype auto/float32/float16/bfloat16, quantize None/"4bit"/"8bit" (bitsandbytes).
        Raises UnknownModel, IncompleteCheckpoint, MissingPackage or another ModelError.
        """
        from e5v_search.backbones.llava_next import LlavaNextEmbedder

        return LlavaNextEmbedder.load(model, device=device, dtype=dtype, quantize=quantize)

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray: ...

    @abstractmethod
    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray: ...

    @abstractmethod
    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray: ...

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any: ...

    @abstractmethod
    def embed_prepared(self, prepared: Sequence[Any], prompts: str = "retrieval") -> np.ndarray: ...
