"""Linear layers in the integer arithmetic of a processor: weights and inputs of 8 bits, sums of 32, results in float.

A weight's scale is that of its output, an input's that of its row (token), so that a vector does not depend on what else is in
its batch. Of an input's bits 7 are used: processors without VNNI add two products in 16 bits, which would overflow.
"""

import warnings

import torch
from torch import Tensor

from e5v_search.backbones.packed import TINY, PackedLinear
from e5v_search.errors import ModelError

_STEPS = 63  # from zero to a row's largest value


class Int8Linear(PackedLinear):
    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type != "cpu" or "x86" not in torch.backends.quantized.supported_engines:
            raise ModelError(f"int8 is for x86 processors, not for {device}: leave --quantize out, or take 8bit on a GPU")

    def hold(self, weight: Tensor, largest: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to replace its quantised tensors, some day
            zeros = torch.zeros(len(weight), dtype=torch.long)
            quantised = torch.quantize_per_channel(weight, largest.double() / 127, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def multiplied(self, x: Tensor) -> Tensor:
        x = x.float()
        # torch's own maximum norm takes twenty times as long
        largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_min_(TINY)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = multiply(x / largest, 1 / _STEPS, _STEPS + 1, self.packed).mul_(largest)
        return y
