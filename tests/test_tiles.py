"""AnyRes against transformers' own PIL image processor, pixel for pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from e5v_search.backbones.tiles import TileSpec, best_resolution, cut, token_count, unpadded
from e5v_search.errors import UsageError

SPEC = TileSpec(336, 14, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
SHAPES = [
    (480, 640),
    (333, 500),
    (500, 333),
    (336, 336),
    (672, 672),
    (1, 1),
    (2, 3),
    (1, 2000),
    (2000, 1),
    (37, 1200),
    (701, 699),
]


def noise(height: int, width: int) -> Image.Image:
    small = np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(small)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pixels_equal_transformers(height: int, width: int) -> None:
    image = noise(height, width)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(p) for p in SPEC.pinpoints],
        do_rescale=False,
        do_normalize=False,
    )
    theirs = processor.preprocess([image], return_tensors="np")["pixel_values"][0]
    ours = cut(image, SPEC)
    assert ours.pixels.dtype == np.uint8
    assert len(ours.pixels) == 1 + ours.grid[0] * ours.grid[1]
    np.testing.assert_array_equal(ours.pixels, theirs)


sides = st.integers(1, 3000)
shapes = st.sampled_from([(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008), (336, 336), (1344, 336)])


@given(sides, sides, st.lists(shapes, min_size=1, max_size=6, unique=True))
def test_best_resolution_equals_transformers(height: int, width: int, pinpoints: list[tuple[int, int]]) -> None:
    theirs = select_best_resolution((height, width), pinpoints)
    if theirs is not None:
        assert best_resolution((height, width), pinpoints) == theirs


@given(sides, sides)
@settings(max_examples=300)
def test_unpadding_and_token_count_equal_transformers(height: int, width: int) -> None:
    import torch

    target = best_resolution((height, width), SPEC.pinpoints)
    grid = (target[0] // SPEC.patch, target[1] // SPEC.patch)
    numbered = torch.arange(grid[0] * grid[1]).reshape(1, *grid)
    rows, cols = unpadded((height, width), grid)
    assert torch.equal(numbered[:, rows, cols], unpad_image(numbered, (height, width)))
    processor = object.__new__(LlavaNextProcessor)
    features, newlines = processor._get_unpadded_features(
        height, width, SPEC.side, SPEC.side, target[0] // 336, target[1] // 336
    )
    assert token_count((height, width), SPEC) == SPEC.side**2 + features + newlines


@pytest.mark.parametrize(("size", "tokens"), [((640, 640), 2928), ((480, 640), 2340), ((333, 500), 1464)])
def test_token_counts_of_the_8b_model(size: tuple[int, int], tokens: int) -> None:
    assert token_count(size, SPEC) == tokens


@pytest.mark.parametrize(
    ("setting", "pinpoints", "name"),
    [
        ("auto", SPEC.pinpoints, "auto"),
        ("full", SPEC.pinpoints, "auto"),
        ("4", SPEC.pinpoints, "auto"),
        ("99", SPEC.pinpoints, "auto"),
        ("3", ((336, 672), (672, 336), (1008, 336), (336, 1008)), "3"),
        ("2", ((336, 672), (672, 336)), "2"),
        ("base", (), "base"),
    ],
)
def test_limits(setting: str, pinpoints: tuple[tuple[int, int], ...], name: str) -> None:
    spec, called = SPEC.limited(setting)
    assert (spec.pinpoints, called) == (pinpoints, name)


def test_limits_that_say_the_same_have_one_name() -> None:
    wide = TileSpec(336, 14, ((336, 672), (672, 1344)))  # 2 and 8 tiles
    assert {wide.limited(n)[1] for n in "234567"} == {"2"}


def test_a_limit_below_the_smallest_grid_is_refused() -> None:
    with pytest.raises(UsageError, match=r"have 2, 3, 4 tiles: 1 is too few.* or base"):
        SPEC.limited("1")


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_the_base_tile_alone(height: int, width: int) -> None:
    image = noise(height, width)
    base = cut(image, SPEC.limited("base")[0])
    np.testing.assert_array_equal(base.pixels, cut(image, SPEC).pixels[:1])
    assert base.grid == (0, 0)
    assert token_count((height, width), SPEC.limited("base")[0]) == 576


def test_token_counts_of_limits() -> None:
    assert [token_count((480, 640), SPEC.limited(n)[0]) for n in ("2", "3", "4")] == [1368, 1368, 2340]
