"""One file per model family, each an `Embedder`; `Embedder.load` finds the family by name or by a folder's config."""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Self

from e5v_search import embedder
from e5v_search.errors import ModelError

if TYPE_CHECKING:
    from e5v_search.backbones.registry import Source


class Embedder(embedder.Embedder):
    """A model that runs here. A family's class loads its own models alone."""

    @abstractmethod
    def __init__(self, source: Source, name: str, device: str, dtype: str, quantize: str | None) -> None: ...

    @classmethod
    def load(cls, model: str = "auto", *, device: str = "auto", dtype: str = "auto", quantize: str | None = None) -> Self:
        """Load a model: "auto", a known name, a hub id (`owner/name@revision`) or a checkpoint folder.

        device auto/cpu/cuda/cuda:1/mps, dtype auto/float32/float16/bfloat16, quantize None/"4bit"/"8bit" (bitsandbytes).
        Raises UnknownModel, IncompleteCheckpoint, MissingPackage or another ModelError.
        """
        from e5v_search.backbones import checkpoint, registry

        if model == "auto":
            free = checkpoint.free_cuda_bytes() if device in ("auto", "cuda") else None
            model, chosen, line = registry.choose(free)
            quantize = quantize or chosen
            print(line, file=sys.stderr)
        source = registry.resolve(model)
        family = registry.family(source.folder)
        if not issubclass(family, cls):
            raise ModelError(f"{source.folder} holds a model for {family.__name__}, not for {cls.__name__}")
        return family(source, model, device, dtype, quantize)
