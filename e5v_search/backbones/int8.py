"""Linear layers in the integer arithmetic of a processor: weights and inputs of 8 bits, sums of 32, results in float.

A weight's scale is that of its output, an input's that of its row (token), so that a vector does not depend on what else is in
its batch. Of an input's bits 7 are used: processors without VNNI add two products in 16 bits, which would overflow.
"""

import warnings

import torch
from torch import Tensor, nn

from e5v_search.backbones.pieces import in_pieces
from e5v_search.errors import ModelError

_STEPS = 63  # from zero to a row's largest value
_TINY = 1e-12  # of a row of zeros


class Int8Linear(nn.Module):
    """(..., k) -> (..., n) in the precision of its input. Has a weight, on the meta device, until it is given one to pack."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor | None = linear.weight
        self.bias = linear.bias

    def pack(self, weight: Tensor) -> None:
        """Take over (n, k) floats of any precision."""
        weight = weight.float()
        scales = weight.abs().amax(dim=1).clamp_min(_TINY) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to replace its quantised tensors, some day
            zeros = torch.zeros(len(scales), dtype=torch.long)
            quantised = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._multiplied, x)

    def _multiplied(self, x: Tensor) -> Tensor:
        x32 = x.float()
        # torch's own maximum norm takes twenty times as long
        largest = torch.maximum(x32.amax(-1, keepdim=True), -x32.amin(-1, keepdim=True)).clamp_min_(_TINY)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y: Tensor = multiply(x32 / largest, 1 / _STEPS, _STEPS + 1, self.packed).mul_(largest)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)


def swap_linears(model: nn.Module, device: torch.device) -> None:
    """Put an `Int8Linear` without numbers in the place of each linear layer.

    The text model's first layer stays as it is: whatever it gets wrong, all others work on (benchmarks/LOG.md).
    """
    if device.type != "cpu" or "x86" not in torch.backends.quantized.supported_engines:
        raise ModelError(f"int8 is for x86 processors, not for {device}: leave --quantize out, or take 8bit on a GPU")
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if not path.startswith("language_model.layers.0."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Int8Linear(linear))
