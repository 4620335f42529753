"""What is done to each row by itself, done to some hundred at a time."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 512  # rows

# on Linux torch then asks for its large tensors in pages of 2 MB; it looks before the first of them
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
os.environ.setdefault(HUGE_PAGES, "1")


def in_pieces(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) for an `f` that takes (..., d) to (..., n) row by row.

    On a processor, and where no gradient is wanted, in pieces: their intermediate values stay in its caches, and in memory
    that it has already, where those of thousands of rows cost a sixth of the time in fresh pages alone (benchmarks/LOG.md).
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= PIECE or x.device.type != "cpu" or torch.is_grad_enabled():
        return f(x)
    return torch.cat([f(piece) for piece in torch.split(rows, PIECE)]).view(*x.shape[:-1], -1)
