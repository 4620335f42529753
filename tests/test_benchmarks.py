"""What the figures in benchmarks/LOG.md rest on."""

import sys
from pathlib import Path

import pytest

from e5v_search.backbones import registry
from e5v_search.backbones.llava_next import LlavaNextEmbedder

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from flops import language, vision
from models import SIZES
from queries import measure

PHOTO = Path(registry.__file__).parent.parent / "samples" / "cat.jpg"


@pytest.mark.parametrize(
    ("tiles", "visual", "prompt", "tera"),
    [(5, 2928, 20, 45.4), (5, 2340, 20, 36.4), (3, 1464, 20, 22.5), (1, 576, 20, 8.8), (0, 0, 42, 0.587)],
)
def test_flops_of_the_8b_model(tiles: int, visual: int, prompt: int, tera: float) -> None:
    c = SIZES["8b"]
    # by hand: 218.1 million weights a layer; a tile of 577 tokens costs 0.36 TFLOP with the projector
    assert (vision(c, tiles) + language(c, visual + prompt)) / 1e12 == pytest.approx(tera, rel=0.005)


def test_flops_of_one_token() -> None:
    c = SIZES["8b"]
    one_layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336
    assert language(c, 1) == 32 * (2 * one_layer + 2 * 4096)


def test_single_queries_are_set_beside_the_weights_that_they_read() -> None:
    embedder = LlavaNextEmbedder.load(registry.TINY, device="cpu", dtype="float32")
    found = measure(embedder, [PHOTO], ["a dog", "two cats on a red roof"], rounds=1)
    c = embedder.model.config.text_config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size + 2)  # and two norms
    assert found["weights_mb"] == pytest.approx(c.num_hidden_layers * layer * 4 / 1e6, abs=0.1)
    ratio = found["text_ms"] / found["reading_the_weights_ms"]
    assert found["text_against_reading_the_weights"] == pytest.approx(ratio, rel=0.1)
    assert (embedder.memory.hits, embedder.memory.misses) == (2, 2)
