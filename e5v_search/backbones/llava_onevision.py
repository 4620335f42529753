"""LLaVA-OneVision (UniME, UniME-V2): a SigLIP tower that sees a picture as a whole and in tiles, and a Qwen2 decoder.

Tiles are those of LLaVA-NeXT; where there are too many patches of them, the model thins them out. It is transformers' own.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.tiles import Size, Tiles, TileSpec, best_resolution, cut, enough, unpadded
from e5v_search.backbones.vision_language import VisionLanguage
from e5v_search.config import ModelChoice
from e5v_search.errors import IncompleteCheckpoint, ModelError

_SLACK = 1.1  # times too many, along a side, before patches are thinned out


@dataclass(frozen=True)
class Seen:
    tiles: Tiles
    tokens: int


class LlavaOnevision(VisionLanguage):
    CLASS: ClassVar[str] = "LlavaOnevisionModel"
    WORDING: ClassVar[str] = "llava-onevision"
    IMAGE: ClassVar[str] = "<image>"

    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        super().__init__(source, choice)
        settings, config = checkpoint.image_settings(source.folder), self.model.config
        if not settings.get("image_mean") or not settings.get("image_std"):
            raise IncompleteCheckpoint(f"{source.folder} has no preprocessor_config.json with image_mean and image_std")
        most = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
        if most is None or not isinstance(config.vision_feature_layer, int):
            raise ModelError(
                f"{source.folder}: vision_aspect_ratio {config.vision_aspect_ratio!r} or vision_feature_layer "
                f"{config.vision_feature_layer} are not supported; anyres_max_N and one layer are"
            )
        vision = config.vision_config
        pinpoints = tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)
        resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
        self.most_tiles = int(most[1])
        self.spec = TileSpec(vision.image_size, vision.patch_size, pinpoints, resample)
        self._mean, self._std = (
            torch.tensor(settings[name]).float().view(3, 1, 1).to(self.device) for name in ("image_mean", "image_std")
        )

    def enough(self, size: Size) -> Size:
        return enough(size, self.spec)

    def prepare(self, image: Image.Image, size: Size | None = None) -> Seen:
        """An upright RGB picture, or a reduction of one of `size`, -> tiles. Called from many threads, ahead of the model."""
        tiles = cut(image, self.spec, size)
        return Seen(tiles, self.token_count(tiles.size))

    def token_count(self, size: Size) -> int:
        """Visual tokens of a picture: the whole, then each row of patches and its newline, thinned out where too many."""
        side = self.spec.side
        target = best_resolution(size, self.spec.pinpoints)
        kept = unpadded(size, (target[0] // self.spec.tile * side, target[1] // self.spec.tile * side))
        rows, cols = (part.stop - part.start for part in kept)
        crowd = math.sqrt(rows * cols / (self.most_tiles * side**2))
        if crowd > _SLACK:
            rows, cols = int(rows // crowd), int(cols // crowd)
        count: int = side**2 + rows * (cols + 1)
        return count

    def states(self, ids: Tensor, mask: Tensor, pictures: list[Seen]) -> Tensor:
        shown = {}
        if pictures:
            pixels = torch.from_numpy(np.concatenate([p.tiles.pixels for p in pictures])).to(self.device)
            shown = {
                "pixel_values": ((pixels.float() * (1 / 255) - self._mean) / self._std).to(self.dtype),
                "image_sizes": torch.tensor([p.tiles.size for p in pictures], device=self.device),
            }
        states: Tensor = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False, **shown).last_hidden_state
        return states
