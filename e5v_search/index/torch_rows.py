"""Rows in half precision on the devices of torch, scanned whole: for GPUs that FAISS, as it is installed, does not see.

torch is no part of the other indexes, and loaded only by those who ask for GPUs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import torch

from e5v_search.index.base import Found, merged
from e5v_search.index.coded import threads
from e5v_search.index.rows import Rows
from e5v_search.index.scan import BLOCK

_GROUP = 32  # scores of which the greatest is sought first: to sort one in so many is soon done
_NUMBERS = 1 << 28  # worked on at once by a device


def devices() -> list[str]:
    """Those of CUDA; none where torch sees none."""
    return [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


class TorchRows:
    """The rows, a part on each device."""

    def __init__(self, rows: Rows, devices: Sequence[str]) -> None:
        ends = np.linspace(0, rows.ntotal, len(devices) + 1).astype(int).tolist()
        shares = [(*share, device) for share, device in zip(pairwise(ends), devices, strict=True) if share[0] < share[1]]
        self._parts = [_part(rows, *share) for share in shares]

    def search(self, xq: np.ndarray, width: int) -> Found:
        """D and places I (nq, least of width and ntotal) of the best rows, best first, of equal scores the smaller place first.

        Scores are summed up in single precision, in another order than on the processor.
        """
        nothing = np.empty((len(xq), 0), np.float32), np.empty((len(xq), 0), np.int64)
        found = threads(len(self._parts)).map(lambda part: part.best(xq, width), self._parts)
        return reduce(lambda one, other: merged(one, other, width), found, nothing)


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `start + n`, x (>= n, d), in whole groups, on a device."""

    start: int
    n: int
    x: torch.Tensor

    def best(self, xq: np.ndarray, width: int) -> Found:
        width = min(width, self.n)
        at_once = max(1, _NUMBERS // max(len(self.x), width * self.x.shape[1]))
        found = [self._best(torch.tensor(some, device=self.x.device), width) for some in _split(xq, at_once)]
        D, I = (torch.cat(side).cpu().numpy() for side in zip(*found, strict=True))  # noqa: E741
        return D, I + self.start

    @torch.inference_mode()
    def _best(self, xq: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(xq)
        scores[:, self.n :] = -torch.inf
        greatest = scores.view(len(xq), -1, _GROUP).amax(2)
        # the best `width` scores lie in as many groups at most, and those have the greatest greatest
        groups = greatest.topk(min(width, greatest.shape[1])).indices
        places = (groups[:, :, None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
        near = places.gather(1, scores.gather(1, places).topk(width).indices)
        # a sum for each, not a product of matrices, so that copies of a row score the same wherever they are
        return (self.x[near].float() * xq[:, None]).sum(2), near

    def _scores(self, xq: torch.Tensor) -> torch.Tensor:
        """(nq, len(x)) in single precision; on a GPU of queries in half precision."""
        if self.x.is_cuda:
            return torch.mm(xq.half(), self.x.T, out_dtype=torch.float32)
        return torch.cat([xq @ x.float().T for x in torch.split(self.x, BLOCK)], dim=1)


def _split(xq: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (xq[at : at + size] for at in range(0, len(xq), size))


def _part(rows: Rows, start: int, stop: int, device: str) -> _Part:
    halves = rows.codes[start:stop].view(np.float16)
    x = torch.zeros((-(-len(halves) // _GROUP) * _GROUP, rows.d), dtype=torch.float16, device=device)
    for at in range(0, len(halves), BLOCK):
        x[at : at + BLOCK][: len(halves) - at] = torch.tensor(halves[at : at + BLOCK])
    return _Part(start, stop - start, x)
