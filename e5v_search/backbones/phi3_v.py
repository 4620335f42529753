"""Phi-3-vision and Phi-3.5-vision (the paper's Table 8, UniME, VLM2Vec), without the code that their checkpoints bring.

A picture is scaled to as many crops as the checkpoint takes, padded with white to whole ones, and seen crop by crop and
once more as a whole; of each crop's patches four make a token. A learnt separator ends every row of tokens, and another
stands between the crops and the whole. The decoder is transformers' own Phi-3.

Shapes: c crops of a picture, m tokens along a side of a crop, v the vision tower's width, d the decoder's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn

from e5v_search.backbones import checkpoint, library, registry
from e5v_search.backbones.adapters import Adapter
from e5v_search.backbones.config import VisionConfig
from e5v_search.backbones.modules import VisionTower
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.backbones.tiles import MARGIN, Size
from e5v_search.backbones.vision_language import VisionLanguage
from e5v_search.config import ModelChoice
from e5v_search.errors import IncompleteCheckpoint, ModelError

_PREFIX = "vision_embed_tokens."
_HEAD_DIM = 64  # of CLIP in every size
_WHITE = 255


@dataclass(frozen=True)
class Crops:
    """pixels (3, height, width) uint8, whole crops; grid (rows, cols) of them."""

    pixels: np.ndarray
    grid: Size
    tokens: int


class Eyes(nn.Module):
    """What makes tokens of a picture. Parameter names are the checkpoint's, but for the tower's."""

    def __init__(self, vision: VisionConfig, layers: int, d: int) -> None:
        super().__init__()
        v = vision.hidden_size
        self.crop, self.m = vision.image_size, vision.image_size // vision.patch_size // 2
        self.tower = VisionTower(vision, layers)
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, 4 * v))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, 4 * v))
        self.img_projection = nn.Sequential(nn.Linear(4 * v, d), nn.GELU(), nn.Linear(d, d))

    def forward(self, picture: Tensor) -> Tensor:
        """A normalised picture (3, rows·crop, cols·crop) -> (tokens, d)"""
        rows, cols = (n // self.crop for n in picture.shape[1:])
        whole = F.interpolate(picture[None].float(), size=(self.crop, self.crop), mode="bicubic").to(picture.dtype)
        split = picture.reshape(3, rows, self.crop, cols, self.crop).permute(1, 3, 0, 2, 4).reshape(-1, 3, self.crop, self.crop)
        seen = self._merged(self.tower(torch.cat((whole, split)))[:, 1:])
        crops = seen[1:].reshape(rows, cols, self.m, self.m, -1).transpose(1, 2).reshape(rows * self.m, cols * self.m, -1)
        both = torch.cat((self._rows(crops), self.glb_GN[0], self._rows(seen[0])))
        tokens: Tensor = self.img_projection(both)
        return tokens

    def _merged(self, patches: Tensor) -> Tensor:
        """(c, 4·m², v) -> (c, m, m, 4·v), four neighbours behind each other."""
        x = patches.reshape(len(patches), self.m, 2, self.m, 2, -1)
        return x.transpose(2, 3).reshape(len(patches), self.m, self.m, -1)

    def _rows(self, tokens: Tensor) -> Tensor:
        """(rows, cols, 4·v) -> (rows·(cols + 1), 4·v)"""
        return torch.cat((tokens, self.sub_GN[0].expand(len(tokens), 1, -1)), dim=1).flatten(0, 1)


class SplitEncoder(PromptEncoder):
    """Ids before and behind a picture are those of two texts, as the published processor has them."""

    def fill(self, template: str, texts: Sequence[str]) -> list[list[int]]:
        before, picture, after = template.partition(self.wording.picture)
        if not picture:
            return super().fill(template, texts)
        parts = zip(super().fill(before, texts), super().fill(after, texts), strict=True)
        return [[*head, self.image_id, *tail] for head, tail in parts]


class Phi3V(VisionLanguage):
    CLASS: ClassVar[str] = "Phi3Model"
    WORDING: ClassVar[str] = "phi3"
    IMAGE: ClassVar[str] = "<|image_1|>"
    ENCODER: ClassVar[type[PromptEncoder]] = SplitEncoder

    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        super().__init__(source, choice)
        # beyond it positions are scaled otherwise, for all rows of a batch
        self.encoder.max_tokens = self.model.config.original_max_position_embeddings
        settings = checkpoint.image_settings(source.folder)
        if lacking := [name for name in ("num_crops", "image_mean", "image_std") if not settings.get(name)]:
            raise IncompleteCheckpoint(f"{source.folder} has no preprocessor_config.json with {', '.join(lacking)}")
        self.most_crops = int(settings["num_crops"])
        self._mean, self._std = (
            torch.tensor(settings[name]).float().view(3, 1, 1).to(self.device) for name in ("image_mean", "image_std")
        )
        self.eyes = _eyes(source.folder, self.dim_of_states, self.device, self.dtype)

    def load_model(self, folder: Path, quantize: str | None, adapter: Adapter | None) -> Any:
        raw = checkpoint.read_json(folder / "config.json")
        layer = raw.get("embd_layer") or {}
        wanted = {"use_hd_transform": True, "with_learnable_separator": True, "hd_transform_order": "sub_glb"}
        if odd := [f"{key} {layer.get(key)}" for key, value in wanted.items() if layer.get(key) != value]:
            raise ModelError(f"{folder}: {', '.join(odd)}: not supported in Phi-3-vision")
        try:
            config = _decoder(raw)
        except (KeyError, ValueError, TypeError) as error:
            raise ModelError(f"{folder}: config.json is not understood ({error})") from error
        return library.load(folder, self.CLASS, self.device, self.dtype, quantize=quantize, adapter=adapter, config=config)

    def scaled(self, size: Size) -> Size:
        """The (height, width) that a picture of `size` is scaled to: as large as the crops allow, its longer side whole."""
        height, width = size
        long, short = max(size), min(size)
        scale = 1
        while (scale + 1) * math.ceil((scale + 1) / (long / short)) <= self.most_crops:
            scale += 1
        length = scale * self.eyes.crop
        breadth = max(1, int(length / (long / short)))
        return (breadth, length) if width >= height else (length, breadth)

    def enough(self, size: Size) -> Size:
        height, width = self.scaled(size)
        return MARGIN * height, MARGIN * width

    def prepare(self, image: Image.Image, size: Size | None = None) -> Crops:
        """An upright RGB picture, or a reduction of one of `size`, -> crops. Called from many threads, ahead of the model."""
        image, (height, width), crop = image.convert("RGB"), self.scaled(size or (image.height, image.width)), self.eyes.crop
        if upright := height > width:  # resizing rounds in between: it has to begin along the same side
            image, height, width = image.transpose(Image.Transpose.TRANSPOSE), width, height
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        padding = -height % crop
        pixels = np.pad(pixels, ((padding // 2, padding - padding // 2), (0, 0), (0, 0)), constant_values=_WHITE)
        pixels = np.ascontiguousarray(pixels.transpose((2, 1, 0) if upright else (2, 0, 1)))
        rows, cols = (n // crop for n in pixels.shape[1:])
        m = self.eyes.m
        return Crops(pixels, (rows, cols), rows * m * (cols * m + 1) + 1 + m * (m + 1))

    def states(self, ids: Tensor, mask: Tensor, pictures: list[Crops]) -> Tensor:
        places = ids == self.encoder.image_id  # which may lie outside the table
        x = self.model.embed_tokens(ids.masked_fill(places, 0))
        if pictures:
            pixels = (torch.from_numpy(p.pixels).to(self.device) for p in pictures)
            seen = [self.eyes(((p.float() * (1 / 255) - self._mean) / self._std).to(self.dtype)) for p in pixels]
            x = x.masked_scatter(places[..., None], torch.cat(seen).to(x.dtype))
        states: Tensor = self.model(inputs_embeds=x, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states


def _decoder(raw: Mapping[str, Any]) -> Any:
    """transformers' Phi3Config. What was published as "su" is its "longrope", which wants the trained length inside."""
    config = transformers.Phi3Config()
    known = {key: value for key, value in raw.items() if key in config.to_dict() and key != "model_type"}
    rope = dict(raw.get("rope_scaling") or {})
    kind = rope.pop("type", rope.pop("rope_type", "default"))
    if kind not in ("default", "su", "longrope"):
        raise ValueError(f"rotary scaling {kind!r} is not supported")
    rope |= {"rope_type": "default" if kind == "default" else "longrope", "rope_theta": raw.get("rope_theta", 10000.0)}
    if kind != "default":
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    return transformers.Phi3Config(**known | {"rope_parameters": rope})


def _eyes(folder: Path, d: int, device: torch.device, dtype: torch.dtype) -> Eyes:
    """From the checkpoint. The tower's sizes, which no config says, are those of its tensors."""
    found = {
        name.removeprefix(_PREFIX).replace("img_processor.vision_model.", "tower."): tensor.to(dtype).to(device)
        for name, tensor in checkpoint.tensors(folder, lambda name: name.startswith(_PREFIX))
    }
    try:
        patch = found["tower.embeddings.patch_embedding.weight"]
        positions = len(found["tower.embeddings.position_embedding.weight"]) - 1
        wide = len(found["tower.encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise IncompleteCheckpoint(f"{folder} lacks the tensor {error.args[0]}; download the model again") from None
    layers = 1 + max(int(name.split(".")[3]) for name in found if name.startswith("tower.encoder.layers."))
    vision = VisionConfig(
        hidden_size=len(patch),
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=max(1, len(patch) // _HEAD_DIM),
        image_size=math.isqrt(positions) * patch.shape[-1],
        patch_size=patch.shape[-1],
    )
    with torch.device("meta"):
        eyes = Eyes(vision, layers - 1, d)  # the last but one layer is read
    wanted = eyes.state_dict()
    if missing := sorted(wanted.keys() - found.keys()):
        raise IncompleteCheckpoint(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; download the model again"
        )
    try:
        eyes.load_state_dict({name: found[name] for name in wanted}, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise IncompleteCheckpoint(f"{folder} cannot be loaded ({reason}); download the model again") from None
    return eyes.requires_grad_(False).eval()
