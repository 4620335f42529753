"""One file per model family, each an `Embedder`; `Embedder.load` finds the family by name or by a folder's config."""

from __future__ import annotations

from e5v_search import embedder


class Embedder(embedder.Embedder):
    """A model that runs here."""

    @staticmethod
    def load(model: str = "auto", *, device: str = "auto", dtype: str = "auto", quantize: str | None = None) -> Embedder:
        """Load a model: "auto", a known name, a hub id (`owner/name@revision`) or a checkpoint folder.

        device auto/cpu/cuda/cuda:1/mps, dtype auto/float32/float16/bfloat16, quantize None/"4bit"/"8bit" (bitsandbytes).
        Raises UnknownModel, IncompleteCheckpoint, MissingPackage or another ModelError.
        """
        from e5v_search.backbones.llava_next import LlavaNextEmbedder

        return LlavaNextEmbedder.load(model, device=device, dtype=dtype, quantize=quantize)
