"""To a device and back while it computes: it never waits for what comes next, nor that for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64 on `device`, which is not waited for: what it was given before may still be under way."""
    # a copy from other memory than pinned would wait
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(values, dtype=torch.long, pin_memory=pinned).to(device, non_blocking=True)
