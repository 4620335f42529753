"""Muon (K. Jordan 2024): momentum, made orthogonal, for the matrices of hidden layers; AdamW for everything else.

Every direction of a weight matrix is then learned at one speed, which in short runs saves a large part of the steps.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# coefficients of the quintic iteration: singular values end between 0.7 and 1.2 after five rounds
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Nearly the nearest matrix with orthonormal rows or columns (Newton-Schulz)."""
    x: Tensor = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (float(x.norm()) + 1e-7)
    for _ in range(rounds):
        a = x @ x.T
        x = _A * x + (_B * a + _C * a @ a) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal=True` hold matrices; the others are handled as AdamW does.

    A matrix moves by `lr * 0.2 * sqrt(longer side)` times an orthogonal one: steps as large as AdamW's, so that one
    learning rate serves both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0, "orthogonal": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state = self.state[parameter]
                if group["orthogonal"]:
                    _orthogonal_step(parameter, parameter.grad, state, group)
                else:
                    _adam_step(parameter, parameter.grad, state, group)


def _orthogonal_step(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
    momentum.lerp_(gradient, 1 - group["momentum"])
    ahead = gradient.lerp(momentum, group["momentum"])  # Nesterov's look ahead
    update = orthogonal(ahead.flatten(1)).view_as(parameter)
    parameter.add_(update, alpha=-group["lr"] * 0.2 * max(update.shape[0], update[0].numel()) ** 0.5)


def _adam_step(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    if not state:
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": torch.zeros(())}
    beta1, beta2 = group["betas"]
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
    step = int(state["step"])
    mean = state["exp_avg"] / (1 - beta1**step)
    size = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(1e-8)
    parameter.addcdiv_(mean, size, value=-group["lr"])
