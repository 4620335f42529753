"""AnyRes of LLaVA-NeXT: a picture becomes one small base tile and a grid of tiles at higher resolution, if any.

Pixel for pixel what transformers' PIL image processor gives (LlavaNextImageProcessorPil), at a fraction of its time:
tiles stay uint8 until they are on the device, and a picture is resized twice, never tile by tile. No torch here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from e5v_search.errors import UsageError

Size = tuple[int, int]  # (height, width) in pixels
MARGIN = 3  # times what is left of a picture, so that resizing has something to average over


@dataclass(frozen=True)
class TileSpec:
    """How a checkpoint wants its pictures. `tile` and `patch` in pixels; pinpoints are (height, width).

    Without pinpoints a picture is its base tile alone, and costs one token a patch.
    """

    tile: int
    patch: int
    pinpoints: tuple[Size, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    def limited(self, tiles: str) -> "tuple[TileSpec, str]":
        """With fewer tiles ("base": none but the base tile, "3": at most three besides it), and what to call that.

        What leaves nothing out is "auto". Raises UsageError for fewer than the least grid has.
        """
        if tiles == "base":
            return replace(self, pinpoints=()), tiles
        if tiles in ("auto", "full"):
            return self, "auto"
        counts = [h // self.tile * (w // self.tile) for h, w in self.pinpoints]
        kept = tuple(p for p, n in zip(self.pinpoints, counts, strict=True) if n <= int(tiles))
        if not kept:
            known = ", ".join(map(str, sorted(set(counts))))
            raise UsageError(f"this model's pictures have {known} tiles: {tiles} is too few, give one of these, or base")
        return (
            (self, "auto")
            if len(kept) == len(counts)
            else (replace(self, pinpoints=kept), str(max(n for n in counts if n <= int(tiles))))
        )


@dataclass(frozen=True)
class Tiles:
    """A prepared picture: `pixels` (1 + rows·cols, 3, tile, tile) uint8, base tile first, then row by row."""

    pixels: np.ndarray
    size: Size
    grid: Size  # (rows, cols) of tiles besides the base tile


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the picture's pixels; of equals the one that wastes least, then the first."""
    height, width = size

    def merit(pinpoint: Size) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def fit(size: Size, target: Size) -> Size:
    """The size of a picture scaled into `target` with its aspect ratio kept, rounded up."""
    height, width = size
    scale_h, scale_w = target[0] / height, target[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_h), target[1])


def unpadded(size: Size, patches: Size) -> tuple[slice, slice]:
    """Rows and columns of a (rows, cols) map of patches that hold picture, not padding."""
    height, width = size
    rows, cols = patches
    if width / height > cols / rows:
        pad = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(pad, rows - pad), slice(0, cols)
    pad = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(pad, cols - pad)


def token_count(size: Size, spec: TileSpec) -> int:
    """Visual tokens that a picture of `size` costs: base tile, then each kept row and its newline."""
    if not spec.pinpoints:
        return spec.side**2
    target = best_resolution(size, spec.pinpoints)
    rows, cols = unpadded(size, (target[0] // spec.patch, target[1] // spec.patch))
    kept: int = (rows.stop - rows.start) * (cols.stop - cols.start + 1)
    return spec.side**2 + kept


def enough(size: Size, spec: TileSpec) -> Size:
    """The least size that a picture of `size` may be reduced to beforehand: resized from there, it loses next to nothing."""
    inner = fit(size, best_resolution(size, spec.pinpoints)) if spec.pinpoints else (0, 0)
    return MARGIN * max(inner[0], spec.tile), MARGIN * max(inner[1], spec.tile)


def cut(image: Image.Image, spec: TileSpec, size: Size | None = None) -> Tiles:
    """Prepare an upright RGB picture, or a reduction of one of `size`."""
    size = size or (image.height, image.width)
    base = np.asarray(image.resize((spec.tile, spec.tile), spec.resample)).transpose(2, 0, 1)[None]
    if not spec.pinpoints:
        return Tiles(np.ascontiguousarray(base), size, (0, 0))
    target = best_resolution(size, spec.pinpoints)
    inner = fit(size, target)
    canvas = np.zeros((*target, 3), dtype=np.uint8)
    top, left = (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = np.asarray(image.resize((inner[1], inner[0]), spec.resample))
    rows, cols = target[0] // spec.tile, target[1] // spec.tile
    grid = canvas.reshape(rows, spec.tile, cols, spec.tile, 3).transpose(0, 2, 4, 1, 3)
    pixels = np.concatenate((base, grid.reshape(-1, 3, spec.tile, spec.tile)))
    return Tiles(pixels, size, (rows, cols))
