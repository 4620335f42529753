"""A picture teacher's maps as targets: reduced to what varies, and read where a crop's patches lie."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from e5v_search.training.data import Photos
from e5v_search.training.picture_teacher import teacher_maps

_WIDTH = 192  # directions that are kept: 96 % of the energy of efficientnet-lite2's maps of Flickr8k
_SAMPLE = 1000  # photos that tell which


@dataclass(frozen=True)
class Maps:
    """`values` (photos, d, s, s) float16: what the teacher says of each cell of each photo. Only directions count."""

    values: Tensor

    @property
    def dim(self) -> int:
        return self.values.shape[1]

    def at(self, rows: Sequence[int], boxes: Tensor, places: Tensor, side: int) -> Tensor:
        """Targets (n, p, d) of patches in crops of the photos `rows`.

        boxes (n, 4): each crop's left, top, right and bottom as shares of its photo, left and right exchanged when it is
        mirrored; places (n, p): which of the crop's side² patches, row by row.
        """
        row, column = places // side, places % side
        left, top, right, bottom = boxes.T[..., None]
        x = left + (right - left) * (column + 0.5) / side
        y = top + (bottom - top) * (row + 0.5) / side
        grid = 2 * torch.stack((x, y), dim=-1) - 1
        values = self.values[torch.tensor(list(rows))].float()
        found = F.grid_sample(values, grid[:, None], padding_mode="border", align_corners=False)
        return found[:, :, 0].mT


def load_maps(photos: Photos, teacher: str, folder: Path, say: Callable[[str], None]) -> Maps:
    """Ask the teacher about each photo, once: the answers stay in `folder`."""
    return reduced(torch.from_numpy(teacher_maps(photos.pixels, teacher, folder, say)))


def reduced(raw: Tensor) -> Maps:
    """From a teacher's maps (n, d', s, s): the strongest directions about the mean, the strong ones damped.

    Damped by the root of their size: else a few would be all that a cosine sees.
    """
    cells = raw[:: max(1, len(raw) // _SAMPLE)].float().permute(0, 2, 3, 1).flatten(0, 2)
    mean = cells.mean(dim=0)
    energy, components = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    keep = components[:, -_WIDTH:] * energy[-_WIDTH:].clamp(min=1e-6) ** -0.25
    pieces = [((some.float().permute(0, 2, 3, 1) - mean) @ keep).permute(0, 3, 1, 2).half() for some in torch.split(raw, 500)]
    return Maps(torch.cat(pieces))
