"""Qwen2-VL (GME, VLM2Vec-V2) and Qwen3-VL (Qwen3-VL-Embedding): pictures at their own size, within bounds.

A picture is resized so that its sides are whole patches and its area lies within the model's bounds, and cut into patches
in the order that transformers' PIL processor has them; the models are transformers' own.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.tiles import MARGIN, Size
from e5v_search.backbones.vision_language import VisionLanguage
from e5v_search.config import ModelChoice
from e5v_search.errors import IncompleteCheckpoint, ModelError

_SIZES = ("patch_size", "merge_size", "temporal_patch_size")
_NARROWEST = 200  # a picture's longer side, in shorter ones; a narrower one is squeezed


@dataclass(frozen=True)
class Bounds:
    """How a checkpoint wants its pictures: patches of `patch` pixels, merged `merge` by `merge` into a token, each seen
    `frames` times, since the models know videos; least and most pixels."""

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    mean: Tensor  # (3, 1, 1)
    std: Tensor
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @classmethod
    def read(cls, folder: Path) -> "Bounds":
        """From a checkpoint's own settings. Raises IncompleteCheckpoint or ModelError."""
        settings = checkpoint.image_settings(folder)
        if not settings:
            raise IncompleteCheckpoint(f"{folder} has no preprocessor_config.json: not a whole model folder")
        size = settings.get("size") or {}
        said: dict[str, Any] = {name: settings.get(name) for name in (*_SIZES, "image_mean", "image_std")}
        said["min_pixels"] = settings.get("min_pixels") or size.get("shortest_edge")
        said["max_pixels"] = settings.get("max_pixels") or size.get("longest_edge")
        if lacking := [name for name, value in said.items() if not value]:
            raise ModelError(f"{folder}: image settings are not supported, for they do not say {', '.join(lacking)}")
        patch, merge, frames, least, most = (int(said[name]) for name in (*_SIZES, "min_pixels", "max_pixels"))
        mean, std = (torch.tensor(said[name]).float().view(3, 1, 1) for name in ("image_mean", "image_std"))
        return cls(
            patch, merge, frames, least, most, mean, std, Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        )

    def fit(self, size: Size) -> Size:
        """The (height, width) that a picture of `size` is resized to."""
        longest = _NARROWEST * min(size)
        height, width = (min(n, longest) for n in size)
        factor = self.patch * self.merge
        h, w = round(height / factor) * factor, round(width / factor) * factor
        if h * w > self.most:
            shrink = math.sqrt(height * width / self.most)
            h, w = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
        elif h * w < self.least:
            grow = math.sqrt(self.least / (height * width))
            h, w = (math.ceil(n * grow / factor) * factor for n in (height, width))
        return h, w


@dataclass(frozen=True)
class Patches:
    """pixels (rows·cols, 3, patch, patch) uint8, the patches of a token side by side; grid (rows, cols) of patches."""

    pixels: np.ndarray
    grid: Size
    tokens: int


class QwenVL(VisionLanguage):
    IMAGE = "<|image_pad|>"

    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        super().__init__(source, choice)
        bounds, known = Bounds.read(source.folder), source.known
        if known is not None:
            bounds = replace(bounds, least=known.min_pixels or bounds.least, most=known.max_pixels or bounds.most)
        self.bounds = bounds

    def enough(self, size: Size) -> Size:
        height, width = self.bounds.fit(size)
        return MARGIN * height, MARGIN * width

    def prepare(self, image: Image.Image, size: Size | None = None) -> Patches:
        """An upright RGB picture, or a reduction of one of `size`, -> patches. Called from many threads, ahead of the model."""
        b = self.bounds
        height, width = b.fit(size or (image.height, image.width))
        pixels = np.asarray(image.convert("RGB").resize((width, height), b.resample)).transpose(2, 0, 1)
        rows, cols = height // b.patch, width // b.patch
        split = pixels.reshape(3, rows // b.merge, b.merge, b.patch, cols // b.merge, b.merge, b.patch)
        patches = split.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * cols, 3, b.patch, b.patch)
        return Patches(np.ascontiguousarray(patches), (rows, cols), rows * cols // b.merge**2)

    def states(self, ids: Tensor, mask: Tensor, pictures: list[Patches]) -> Tensor:
        shown = {}
        if pictures:
            pixels = torch.from_numpy(np.concatenate([p.pixels for p in pictures])).to(self.device)
            b = self.bounds
            x = (pixels.float() * (1 / 255) - b.mean.to(self.device)) / b.std.to(self.device)
            frames = x[:, :, None].expand(-1, -1, b.frames, -1, -1)
            shown = {
                "pixel_values": frames.flatten(1).to(self.dtype),
                "image_grid_thw": torch.tensor([(1, *p.grid) for p in pictures], device=self.device),
                "mm_token_type_ids": (ids == self.encoder.image_id).int(),
            }
        states: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **shown).last_hidden_state
        return states


class Qwen2VL(QwenVL):
    CLASS: ClassVar[str] = "Qwen2VLModel"
    WORDING: ClassVar[str] = "qwen2-vl"


class Qwen3VL(QwenVL):
    CLASS: ClassVar[str] = "Qwen3VLModel"
    WORDING: ClassVar[str] = "qwen3-vl-embedding"
