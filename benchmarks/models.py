"""Models of any size with seeded random weights: speed does not depend on what they hold."""

from pathlib import Path

import torch

from e5v_search.backbones import registry
from e5v_search.backbones.config import LlavaNextConfig, TextConfig, VisionConfig
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import load_tokenizer
from e5v_search.training.export import export
from e5v_search.training.initialise import initialise

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def _config(vision: VisionConfig, text: TextConfig) -> LlavaNextConfig:
    image_id = load_tokenizer(registry.BUNDLED / registry.TINY).token_to_id("<image>")
    return LlavaNextConfig(vision, text, PINPOINTS, image_id)


SIZES = {
    # LLaMA-3 8B and CLIP ViT-L/14-336, as in E5-V
    "8b": _config(
        VisionConfig(1024, 4096, 24, 16, 336, 14),
        TextConfig("llama", 128320, 4096, 14336, 32, 32, 8, rope_theta=5e5, max_position_embeddings=8192),
    ),
    # 82 million weights, and 20 million more in the output layer that only the published loop has
    "100m": _config(
        VisionConfig(384, 1536, 7, 6, 336, 14),
        TextConfig("llama", 32000, 640, 1728, 10, 10, max_position_embeddings=4096),
    ),
}


def write(size: str, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint folder with the tokenizer of e5v-tiny, which says less with a token than LLaMA 3's."""
    model = LlavaNext(SIZES[size])
    initialise(model, torch.Generator().manual_seed(0))
    export(model, load_tokenizer(registry.BUNDLED / registry.TINY), folder, dtype)
