"""Rows in half precision on the devices of torch, scanned whole: for GPUs that FAISS, as it is installed, does not see.

torch is no part of the other indexes, and loaded only by those who ask for GPUs.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch

from e5v_search.index.base import Found, merged
from e5v_search.index.rows import Rows
from e5v_search.index.scan import BLOCK

_GROUP = 32  # scores of which the greatest is sought first: to sort one in so many is soon done
_SCORES = 1 << 28  # numbers, at once on a device


def devices() -> list[str]:
    """Those of CUDA; none where torch sees none."""
    return [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


class TorchRows:
    """The rows, a part on each device."""

    def __init__(self, rows: Rows, devices: Sequence[str]) -> None:
        ends = np.linspace(0, rows.ntotal, len(devices) + 1).astype(int).tolist()
        shares = [(*share, device) for share, device in zip(pairwise(ends), devices, strict=True) if share[0] < share[1]]
        self._rows = rows
        self._parts = [_part(rows, *share) for share in shares]
        self._threads = ThreadPoolExecutor(len(shares), thread_name_prefix="torch")

    def search(self, xq: np.ndarray, width: int) -> Found:
        """Places I (nq, width) of the best rows and D, their scores as they are on the processor."""
        found = self._threads.map(lambda part: part.best(xq, width), self._parts)
        _, near = reduce(lambda one, other: merged(one, other, width), found)
        return self._rows.ranked(xq, near, near.shape[1])


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `start + n`, x (>= n, d), in whole groups, on a device."""

    start: int
    n: int
    x: torch.Tensor

    def best(self, xq: np.ndarray, width: int) -> Found:
        at_once = max(1, _SCORES // len(self.x))
        found = [self._best(xq[at : at + at_once], min(width, self.n)) for at in range(0, len(xq), at_once)]
        D, I = (torch.cat(side).cpu().numpy() for side in zip(*found, strict=True))  # noqa: E741
        return D, I + self.start

    @torch.inference_mode()
    def _best(self, xq: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(torch.tensor(xq, device=self.x.device))
        scores[:, self.n :] = -torch.inf
        greatest = scores.view(len(xq), -1, _GROUP).amax(2)
        # the best `width` scores lie in as many groups at most, and those have the greatest greatest
        groups = greatest.topk(min(width, greatest.shape[1])).indices
        places = (groups[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
        D, at = scores.gather(1, places).topk(width)
        return D, places.gather(1, at)

    def _scores(self, xq: torch.Tensor) -> torch.Tensor:
        """(nq, len(x)) in single precision, which a product of halves on a GPU adds up in."""
        if self.x.is_cuda:
            return torch.mm(xq.half(), self.x.T, out_dtype=torch.float32)
        return torch.cat([xq @ x.float().T for x in torch.split(self.x, BLOCK)], dim=1)


def _part(rows: Rows, start: int, stop: int, device: str) -> _Part:
    halves = rows.codes[start:stop].view(np.float16)
    x = torch.zeros((-(-len(halves) // _GROUP) * _GROUP, rows.d), dtype=torch.float16, device=device)
    for at in range(0, len(halves), BLOCK):
        x[at : at + BLOCK][: len(halves) - at] = torch.tensor(halves[at : at + BLOCK])
    return _Part(start, stop - start, x)
