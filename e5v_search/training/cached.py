"""The gradient of a large batch in the memory of a small one (GradCache, Gao et al. 2021, arXiv 2101.06983).

A contrastive loss needs all rows' embeddings at once, but not all rows' activations: once the gradient with respect to
the embeddings is known, each piece can be encoded again and sent backwards alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


def cached_backward(encode: Callable[[P], Tensor], pieces: Sequence[P], loss: Callable[[Tensor], Tensor]) -> float:
    """Add the gradient of `loss(torch.cat([encode(piece) for piece in pieces]))` to the parameters' gradients -> the loss.

    encode: one piece -> (n_i, d), differentiable; called twice for each piece but the last, with the same state of
        torch's generators (CPU and current CUDA device), so that dropout drops the same. Nothing else may change between
        the calls. With a single piece this is the plain backward pass.
    loss: (n, d), rows of all pieces in order -> a scalar. Anchors, positives and negatives are slices of the rows; it
        may gather rows of other processes (`gather`), and is called once.

    Activations of one piece are held at a time. Generators are left as after the plain computation. A loss that is not
    finite has put such gradients: look at it before the optimiser's step.
    """
    *again, last = pieces
    chances: list[_Chance] = []
    parts: list[Tensor] = []
    with torch.no_grad():
        for piece in again:
            chances.append(_Chance.now())
            parts.append(encode(piece))
    # memory for one piece's activations is needed anyway: the last one keeps its graph and saves a pass
    kept = encode(last)
    embeddings = torch.cat([*parts, kept.detach()]).requires_grad_()
    value = loss(embeddings)
    (gradient,) = torch.autograd.grad(value, embeddings)
    *gradients, of_last = torch.split(gradient, [len(part) for part in (*parts, kept)])
    kept.backward(of_last)  # type: ignore[no-untyped-call]
    del kept
    end = _Chance.now()
    for piece, chance, part in zip(again, chances, gradients, strict=True):
        chance.restore()
        encode(piece).backward(part)  # type: ignore[no-untyped-call]
    end.restore()
    return float(value.detach())


class _Chance(NamedTuple):
    """The state of torch's random generators."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "_Chance":
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
