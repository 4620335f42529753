"""Tiles of drawings and of pages, and the words of what lies on each of their patches: so a vision tower learns shapes and
letters many times sooner than from one caption for a whole picture."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from e5v_search.backbones.tiles import TileSpec, cut, fit
from e5v_search.render import render
from e5v_search.render import words as words_on
from e5v_search.scenes import Scene, draw, outline, random_scene

_COVERED = 0.06  # of a patch: less of a shape is not asked for
_SCENES = 3000  # that tell which words scenes are spoken of with
_LEAST = 0.2  # of a drawing is what a tile shows at least

Patches = list[tuple[int, str, float]]  # patch, word, share


@dataclass(frozen=True)
class Told:
    """n tiles (n, 3, tile, tile) uint8 and for each of their p patches the shares (n, p, words) of the words that lie there;
    all zeros where nothing is asked."""

    pixels: Tensor
    shares: Tensor


class Teller:
    """Draws tiles: half of them of scenes, half of pages that captions of scenes are written on."""

    def __init__(self, spec: TileSpec, tokenizer: Tokenizer) -> None:
        self.spec, self._side = spec, spec.side
        rng = random.Random(0)
        self.words = sorted({word for _ in range(_SCENES) for word in _words(random_scene(rng).caption(rng))})
        self.ids = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in self.words]

    def make(self, n: int, rng: random.Random) -> Told:
        tiles = [tile for _ in range(-(-n // 4)) for tile in (*self._page(rng), self._scene(rng), self._scene(rng))][:n]
        shares = np.zeros((n, self._side**2, len(self.words)), dtype=np.float32)
        places = {word: i for i, word in enumerate(self.words)}
        for i, (_, patches) in enumerate(tiles):
            for patch, word, share in patches:
                shares[i, patch, places[word]] += share
        shares /= np.maximum(shares.sum(axis=-1, keepdims=True), 1e-9)
        return Told(torch.from_numpy(np.stack([pixels for pixels, _ in tiles])), torch.from_numpy(shares))

    def vectors(self, table: Tensor) -> Tensor:
        """(words, d) from the word vectors (vocabulary, d): the mean of each word's tokens."""
        return torch.stack([table[own].mean(dim=0) for own in self.ids])

    def _scene(self, rng: random.Random) -> tuple[np.ndarray, Patches]:
        """A part of a drawing, as a base tile shows all of it and the tiles of the full layout show a quarter."""
        scene, tile, side = random_scene(rng), self.spec.tile, 2 * self.spec.tile
        state = rng.getstate()
        picture = draw(scene, rng, (side, side))
        rng.setstate(state)
        covered = outline(scene, rng, (side, side))
        width = round(side * rng.uniform(_LEAST, 1.0) ** 0.5)
        left, top = rng.randint(0, side - width), rng.randint(0, side - width)
        box = (left, top, left + width, top + width)
        pixels = np.asarray(picture.resize((tile, tile), self.spec.resample, box=box)).transpose(2, 0, 1)
        marks = np.asarray(covered.resize((tile, tile), Image.Resampling.NEAREST, box=box))
        patch = self.spec.patch
        cells = marks.reshape(self._side, patch, self._side, patch).swapaxes(1, 2).reshape(self._side**2, -1)
        return pixels, list(_said(scene, cells))

    def _page(self, rng: random.Random) -> Iterator[tuple[np.ndarray, Patches]]:
        """Both tiles of a page."""
        text = random_scene(rng).caption(rng)
        page = render(text)
        tiles = cut(page, self.spec)
        rows, columns = tiles.grid
        height, width = fit(tiles.size, (rows * self.spec.tile, columns * self.spec.tile))
        scale = width / page.width
        shift = ((columns * self.spec.tile - width) / 2, (rows * self.spec.tile - height) / 2)
        found: list[Patches] = [[] for _ in range(rows * columns)]
        patch = self.spec.patch
        for written, (left, top, right, bottom) in words_on(text):
            word = "".join(_words(written))
            x0, x1 = left * scale + shift[0], right * scale + shift[0]
            y0, y1 = top * scale + shift[1], bottom * scale + shift[1]
            for row in range(int(y0 // patch), int(y1 // patch) + 1):
                high = min(y1, (row + 1) * patch) - max(y0, row * patch)
                if high < 0.4 * (y1 - y0):
                    continue
                for column in range(int(x0 // patch), int(x1 // patch) + 1):
                    wide = min(x1, (column + 1) * patch) - max(x0, column * patch)
                    if wide > 2:
                        which = row // self._side * columns + column // self._side
                        at = row % self._side * self._side + column % self._side
                        found[which].append((at, word, wide))
        yield from zip(tiles.pixels[1:], found, strict=True)


def _said(scene: Scene, cells: np.ndarray) -> Iterator[tuple[int, str, float]]:
    """For the patches (p, pixels) of a drawing's outline, the words of the group that covers most, or of the background."""
    for at, cell in enumerate(cells):
        covers = np.bincount(cell, minlength=1 + len(scene.groups))[1:]
        group = scene.groups[int(covers.argmax())] if covers.max() > _COVERED * len(cell) else None
        # the shape is harder than the colour
        said = [(group.colour, 0.35), (group.shape, 0.65)] if group else [(word, 1.0) for word in _words(scene.background)]
        for word, share in said:
            yield at, word, share


def _words(text: str) -> list[str]:
    return re.findall("[a-z]+", text)
