"""Patches and the words of what lies on them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from e5v_search.backbones.registry import BUNDLED
from e5v_search.config import load_recipe
from e5v_search.scenes import BACKGROUNDS, COLOURS, SHAPES
from e5v_search.training import told as telling
from e5v_search.training.recipe import Recipe
from e5v_search.training.told import Teller, Told

RECIPE = load_recipe(Recipe, Path(__file__).parent.parent / "training" / "e5v-tiny.toml")
SPEC = RECIPE.model.tiles()


@pytest.fixture(scope="module")
def teller() -> Teller:
    return Teller(SPEC, Tokenizer.from_file(str(BUNDLED / "e5v-tiny" / "tokenizer.json")))


@pytest.fixture(scope="module")
def made(teller: Teller) -> Told:
    return teller.make(40, random.Random(1))


def patches(pixels: torch.Tensor) -> np.ndarray:
    """(3, tile, tile) -> (p, patch², 3)"""
    side, patch = SPEC.side, SPEC.patch
    return pixels.reshape(3, side, patch, side, patch).permute(1, 3, 2, 4, 0).reshape(side**2, -1, 3).numpy().astype(int)


def test_shares_of_a_patch_are_a_distribution_or_none(made: Told, teller: Teller) -> None:
    assert made.pixels.shape == (40, 3, SPEC.tile, SPEC.tile)
    assert made.shares.shape == (40, SPEC.side**2, len(teller.ids))
    sums = made.shares.sum(dim=-1)
    assert ((sums == 0) | ((sums - 1).abs() < 1e-5)).all()


def test_the_words_are_those_that_scenes_are_spoken_of_with(teller: Teller) -> None:
    spoken = {teller.words[i] for i in range(len(teller.ids))}
    assert {*COLOURS, *SHAPES, "light", "crosses", "under", "four", "background"} <= spoken


def test_patches_of_drawings_are_told_their_colours(made: Told, teller: Teller) -> None:
    """Every fourth pair of tiles is a page; of the others, the colour told is the one that is seen."""
    seen = 0
    for i in (i for i in range(40) if i % 4 >= 2):
        for cell, shares in zip(patches(made.pixels[i]), made.shares[i], strict=True):
            said = {teller.words[int(j)] for j in shares.nonzero().flatten()}
            shape = said & set(SHAPES)
            if shape:
                [colour] = said & set(COLOURS)
                # enlarging rounds the edges: the colour itself is somewhere, or nearly
                distance = np.abs(cell - np.array(COLOURS[colour])).sum(axis=-1).min()
                assert distance < 150, (i, said)
            else:
                assert " ".join(sorted(said, reverse=True)) in BACKGROUNDS
                name = " ".join(sorted(said, reverse=True))
                near = np.abs(cell - np.array(BACKGROUNDS[name])).sum(axis=-1) < 60
                assert near.mean() > 0.7, (i, said)
            seen += bool(shape)
    assert seen > 100


def test_patches_of_pages_are_told_the_words_that_are_written_there(made: Told, teller: Teller) -> None:
    for i in (i for i in range(40) if i % 4 < 2):
        asked = made.shares[i].sum(dim=-1) > 0
        ink = (patches(made.pixels[i]).max(axis=-1) < 100).any(axis=-1)
        # no word where nothing is written; little is written where no word is asked for: the tops and tails of letters
        assert not (asked.numpy() & (patches(made.pixels[i]).min(axis=(1, 2)) > 200)).any()
        assert (ink & ~asked.numpy()).sum() <= 0.5 * max(1, ink.sum())


def test_a_page_is_read_in_its_order(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling.Scene, "caption", lambda *_: "a red square above a blue star")
    page = teller.make(2, random.Random(0))
    left, right = ([[teller.words[int(j)] for j in row.nonzero().flatten()] for row in half] for half in page.shares)
    side = SPEC.side
    row = next(n for n in range(side) if any(left[n * side : (n + 1) * side]))
    line = [*left[row * side : (row + 1) * side], *right[row * side : (row + 1) * side]]
    order = list(dict.fromkeys(word for words in line for word in sorted(words, key="a red square above blue star".find)))
    assert order == ["a", "red", "square", "above", "blue", "star"]


def test_a_words_vector_is_the_mean_of_its_tokens(teller: Teller) -> None:
    table = torch.randn(8192, 6, generator=torch.Generator().manual_seed(0))
    vectors = teller.vectors(table)
    for i, ids in enumerate(teller.ids):
        torch.testing.assert_close(vectors[i], sum(table[j] for j in ids) / len(ids))
