"""Embeddings and gradients across the processes of one run.

The rule that makes them exact: a process computes some loss of the gathered rows, and the run minimises the mean of the
processes' losses. Then each process's backward pass through `gather`, and after it the mean of the parameters' gradients
over processes (`average_gradients`, or what DistributedDataParallel does), give the gradient that one process with all
rows would have. It holds when a process takes its own anchors against everybody's candidates (equation 1 with
`offset`), and as well when every process takes the whole loss, which small losses over all pairs may do.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from e5v_search.errors import UsageError


def rank() -> int:
    return dist.get_rank() if _several() else 0


def processes() -> int:
    return dist.get_world_size() if _several() else 1


def gather(x: Tensor, local_only: bool = False) -> Tensor:
    """(n, d) of each process -> (processes · n, d), the same on all of them, in the order of ranks.

    The gradient of a row is the sum of what all processes' losses give it. With `local_only` a process sees the others'
    rows as constants, as the published code of E5-V does: part of the gradient is lost. One process: `x` itself.

    A collective operation: every process must call it equally often. Raises UsageError, on all of them, when they bring
    different numbers of rows: means over unequal shares would weigh rows unequally.
    """
    if not _several():
        return x
    counts = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(x), device=x.device))
    if len(set(found := [int(n) for n in counts])) > 1:
        raise UsageError(
            f"processes bring {', '.join(map(str, found))} rows to one batch: its size must be a multiple of {len(found)}"
        )
    if not local_only:
        return torch.cat(all_gather(x))  # type: ignore[no-untyped-call]
    rows = [torch.empty_like(x, requires_grad=False) for _ in counts]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x
    return torch.cat(rows)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, in one message; a process that has none counts with zeros."""
    if not _several():
        return
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(trained, torch.split(flat, [p.numel() for p in trained]), strict=True):
        p.grad = mean.view_as(p).to(p.dtype)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
