"""One file per model family, each an `Embedder`; `Embedder.load` finds the family by name or by a folder's config."""

from __future__ import annotations

import sys
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from e5v_search import embedder, media
from e5v_search.config import ModelChoice
from e5v_search.embedder import Picture
from e5v_search.errors import ModelError

if TYPE_CHECKING:
    from e5v_search.backbones.registry import Source


class Embedder(embedder.Embedder):
    """A model that runs here. A family's class loads its own models alone."""

    @abstractmethod
    def __init__(self, source: Source, choice: ModelChoice) -> None: ...

    @classmethod
    def load(
        cls,
        model: str = "auto",
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        tiles: str | int = "auto",
        adapter: str | None = None,
        dim: int | None = None,
    ) -> Self:
        """Load a model: "auto", a known name, a hub id (`owner/name@revision`) or a checkpoint folder.

        device auto/cpu/cuda/cuda:1/mps, dtype auto/float32/float16/bfloat16, quantize None, "4bit" or "8bit"
        (bitsandbytes), "int8" (x86 processors) or "fp8" (GPUs from Hopper on). tiles: of a picture at high resolution, "auto"
        or "full" as many as the model was made for, a number at most so many, "base" none; the whole picture at low
        resolution is always read.
        adapter: a LoRA adapter to merge into the model, a folder or a hub id. dim: the length that vectors are cut to, of
        models that were trained for it.
        Raises UnknownModel, IncompleteCheckpoint, MissingPackage or another ModelError, UsageError.
        """
        return cls.of(ModelChoice(model, device, dtype, quantize, str(tiles), adapter, dim))

    @classmethod
    def of(cls, choice: ModelChoice) -> Self:
        """As `load`."""
        from e5v_search.backbones import checkpoint, known, registry

        if choice.name == "auto":
            free = checkpoint.free_cuda_bytes() if choice.device in ("auto", "cuda") else None
            name, quantize, line = registry.choose(free)
            choice = replace(choice, name=name, quantize=choice.quantize or quantize)
            print(line, file=sys.stderr)
        source = registry.resolve(choice.name)
        family = registry.family(source)
        if not issubclass(family, cls):
            raise ModelError(f"{source.folder} holds a model for {family.__name__}, not for {cls.__name__}")
        known.check(registry.family_name(source), choice)
        return family(source, choice)

    def open(self, picture: Picture) -> Any:
        if isinstance(picture, Image.Image):
            return self.prepare(media.open_picture(picture))
        photo = media.open_photo(picture, enough=self.enough)
        return self.prepare(photo.image, photo.facts.size)
