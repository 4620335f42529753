"""Pictures as CLIP and SigLIP take them: resized, cropped in the middle; the pixels of transformers' PIL processors."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search.backbones import checkpoint
from e5v_search.backbones.tiles import MARGIN, Size
from e5v_search.errors import IncompleteCheckpoint, ModelError

_LONGEST = 128  # times the shorter edge: what is longer is not resized as a whole


@dataclass(frozen=True)
class Pixels:
    """side: of the square that comes out; edge: what the shorter edge is resized to, or None: both to `side`."""

    side: int
    edge: int | None
    resample: Image.Resampling
    scale: float
    mean: Tensor  # (3, 1, 1)
    std: Tensor

    @classmethod
    def read(cls, folder: Path, side: int, square: bool) -> "Pixels":
        """From a checkpoint's own settings, for a tower that takes `side`. `square`: how a bare number for the size is
        meant, and that nothing is cropped unless said. Raises IncompleteCheckpoint or ModelError.
        """
        settings = checkpoint.image_settings(folder)
        if not settings:
            raise IncompleteCheckpoint(f"{folder} has no preprocessor_config.json: not a whole model folder")
        odd = [f"{step} false" for step in ("do_resize", "do_rescale", "do_normalize") if settings.get(step) is False]
        odd += [f"no {values}" for values in ("image_mean", "image_std") if len(settings.get(values) or ()) != 3]
        size, crop = settings.get("size", side), None
        if settings.get("do_center_crop", not square):
            crop = _size(settings.get("crop_size", side), square=True)
        found = _size(size, square)
        edge = found if isinstance(found, int) else None
        if odd or (side, side) != (crop or found) or (crop and edge is None) or (edge is not None and edge < side):
            raise ModelError(
                f"{folder}: image settings are not supported (size {size}, crop_size {settings.get('crop_size')}"
                f"{''.join(f', {what}' for what in odd)}) for a model of {side}×{side} pixels"
            )
        mean, std = (torch.tensor(settings[values]).float().view(3, 1, 1) for values in ("image_mean", "image_std"))
        resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        return cls(side, edge, resample, settings.get("rescale_factor", 1 / 255), mean, std)

    def enough(self, size: Size) -> Size:
        """The least size that a picture of `size` may be reduced to beforehand."""
        if self.edge is None:
            return MARGIN * self.side, MARGIN * self.side
        scale = MARGIN * self.edge / min(size)
        return math.ceil(size[0] * scale), math.ceil(size[1] * scale)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """-> (3, side, side) uint8"""
        image = image.convert("RGB")
        square = image.resize((self.side, self.side), self.resample) if self.edge is None else self._cropped(image, self.edge)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def _cropped(self, image: Image.Image, edge: int) -> Image.Image:
        short = min(image.size)
        whole = [edge if n == short else int(edge * n / short) for n in image.size]
        left, top = ((n - self.side) // 2 for n in whole)
        kept = (left, top, left + self.side, top + self.side)
        if max(whole) <= _LONGEST * edge:
            return image.resize((whole[0], whole[1]), self.resample).crop(kept)
        # of a thread of a picture (1×60,000) only what is kept: the whole would take gigabytes. Up to rounding the same
        x, y = (n / m for n, m in zip(image.size, whole, strict=True))
        box = (left * x, top * y, min(kept[2] * x, image.width), min(kept[3] * y, image.height))
        return image.resize((self.side, self.side), self.resample, box)

    def normalised(self, pixels: Tensor) -> Tensor:
        """(n, 3, side, side) uint8 -> float32"""
        return (pixels.float() * self.scale - self.mean.to(pixels.device)) / self.std.to(pixels.device)


def _size(value: Any, square: bool) -> Size | int | None:
    """(height, width), or the length of the shorter edge; None for what is neither."""
    if isinstance(value, int):
        return (value, value) if square else value
    if not isinstance(value, dict):
        return None
    if isinstance(edge := value.get("shortest_edge"), int) and not value.get("longest_edge"):
        return edge
    height, width = value.get("height"), value.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None
