"""Linear layers in floats of 8 bits (e4m3), which GPUs from Hopper on multiply twice as fast as those of 16.

A weight's scale is that of its output, an input's that of its row (token). A processor computes the same, slowly, so
that what a GPU has embedded can be searched anywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from e5v_search.backbones.packed import TINY, PackedLinear
from e5v_search.errors import ModelError

_EIGHT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_EIGHT).max
_HOPPER = (9, 0)


class Fp8Linear(PackedLinear):
    @classmethod
    def takes(cls, linear: nn.Linear) -> bool:
        return linear.in_features % 16 == 0 and linear.out_features % 16 == 0  # what the GPU's instructions ask for

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER):
            return
        raise ModelError(f"fp8 is for GPUs from Hopper on (H100, H200, B200), not for {device}: leave --quantize out")

    def hold(self, weight: Tensor, largest: Tensor) -> None:
        scales = largest / _LARGEST
        self.packed = (weight / scales[:, None]).to(_EIGHT)
        self.scales = scales[None]

    def multiplied(self, x: Tensor) -> Tensor:
        shape, x = x.shape[:-1], x.float().reshape(-1, x.shape[-1])
        scales = x.abs().amax(-1, keepdim=True).clamp_min_(TINY) / _LARGEST
        by_row = ScalingType.RowWise
        y: Tensor = F.scaled_mm(
            (x / scales).to(_EIGHT), self.packed.t(), scales, by_row, self.scales, by_row, output_dtype=torch.bfloat16
        )
        return y.view(*shape, -1)
