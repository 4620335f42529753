"""What the figures in benchmarks/LOG.md rest on."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from flops import language, vision
from models import SIZES


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
