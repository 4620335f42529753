"""Linear layers whose weights are held, and multiplied, in eight bits."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from e5v_search.backbones.pieces import in_pieces

TINY = 1e-12  # instead of the largest value of a row of zeros


class PackedLinear(nn.Module):
    """(..., k) -> (..., n) in the precision of its input. Has a weight, on the meta device, until it is given one to pack."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor | None = linear.weight
        self.bias = linear.bias

    @classmethod
    def takes(cls, linear: nn.Linear) -> bool:
        """Whether it can stand in the place of `linear`."""
        return True

    @classmethod
    @abstractmethod
    def check(cls, device: torch.device) -> None:
        """Raises ModelError where `device` cannot compute so."""

    def pack(self, weight: Tensor) -> None:
        """Take over (n, k) floats of any precision."""
        weight = weight.float()
        self.hold(weight, weight.abs().amax(dim=1).clamp_min(TINY))
        self.weight = None

    @abstractmethod
    def hold(self, weight: Tensor, largest: Tensor) -> None:
        """Keep weight (n, k) float32, of whose rows (n,) `largest` are the largest values."""

    @abstractmethod
    def multiplied(self, x: Tensor) -> Tensor:
        """(..., k) -> (..., n), without the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.multiplied(x)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)


def swap_linears(model: nn.Module, made: type[PackedLinear], device: torch.device) -> None:
    """Put a layer of the kind `made`, without numbers, in the place of each linear layer.

    The text model's first layer stays as it is: whatever it gets wrong, all others work on (benchmarks/LOG.md).
    """
    made.check(device)
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if made.takes(linear) and not path.startswith("language_model.layers.0."):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made(linear))
