"""Rows in the memory of GPUs: tried out before they are relied on, and scanned on the processor where they are not.

Here a scan of all of them, which is as exact as on a processor; `gpu_ivf` and `gpu_cagra` look at some.
"""

import logging
import threading
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found
from e5v_search.index.library import gpus_of_faiss, library, reason
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, quantiser, search, view
from e5v_search.index.scan import BLOCK, Scan

MOST = 2048  # results of a search, and lists that it looks into, as FAISS allows them on a GPU
_MARGIN = 16  # more than asked for: half precision may order equals in another way than the rows themselves
_TRIED_ON = 4096  # rows of which a scan is compared with what the GPUs find
_TRIED_WITH = 16  # queries
_TRIED_HARD = 64  # effort
_ROUNDING = 1e-4

# of xq, width, effort and how to search: D, exact, and I, -1 for what is not found. It refers to no scan, so that the memory
# of the GPUs is free as soon as nobody refers to that
Finder = Callable[[np.ndarray, int, int, Recipe], Found]

_log = logging.getLogger(__name__)


class OnGpus(Scan):
    """The rows go to the GPUs with the first search: to write an index takes none, and what is written is the same.

    Where FAISS has no GPU, but torch has, torch scans all of them there, whatever the kind. No failure of a GPU is one of a
    search: from the first on, and a line in the log, the rows are scanned where they are.
    """

    filters: ClassVar[bool] = False  # those who pass are scanned on the processor
    most: ClassVar[int] = MOST
    may_miss: ClassVar[float] = 0.0  # share of what a scan finds, when it is tried out

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self._one = threading.Lock()  # a GPU's index is not made for two searches at a time
        self._begun = False
        self._find: Finder | None = None

    @abstractmethod
    def bring(self, gpus: int) -> Finder:
        """What finds exact scores and places among the rows, once they are on so many GPUs of FAISS; raises what FAISS does."""

    def extended(self, rows: Rows, path: Path) -> Self:
        return type(self)(rows, self.recipe, self.head, self.facts, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        asked = min((width + _MARGIN) * effort, self.rows.ntotal)
        found = self._found(xq, asked, effort) if asked <= self.most else None
        if found is None:
            return search(self.rows.index, xq, width, chosen)
        D, I = _there(found, chosen)  # noqa: E741
        return D[:, :width], I[:, :width]

    def _found(self, xq: np.ndarray, asked: int, effort: int) -> Found | None:
        """What the GPUs find; None where they do not serve."""
        with self._one:
            if not self._begun:
                self._begun = True
                self._find = self._brought()
            if self._find is None:
                return None
            try:
                return self._find(xq, asked, effort, self.recipe)
            except Exception as error:  # whatever it is, the processor has no part in it
                self._find = None
                _scanned_here("a search on the GPU failed (%s)", reason(error))
                return None

    def _brought(self) -> Finder | None:
        gpus = gpus_of_faiss()
        try:
            find = self.bring(gpus) if gpus else _by_torch(self.rows)
            missed = 0.0 if find is None else _missed(self.rows, find, self.recipe)
        except Exception as error:  # out of memory, a driver that is too old, a FAISS that lacks a name, …
            _scanned_here("the rows of the index do not go onto the GPU (%s)", reason(error))
            return None
        if find is None:
            _scanned_here("there is no GPU that FAISS or torch can use")
        elif missed > (self.may_miss if gpus else 0.0):
            _scanned_here("the GPU misses %s of what a scan finds", f"{missed:.0%}")
            return None
        return find


class OnGpu(OnGpus):
    """All rows in half precision, a part on each GPU, scanned whole."""

    kind: ClassVar[str] = "gpu"

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        return cls(rows, recipe, b"", {}, path.parent)

    def bring(self, gpus: int) -> Finder:
        return flat(self.rows, gpus)


def flat(rows: Rows, gpus: int) -> Finder:
    """Rows in half precision, shared out among GPUs, each of which scans its own."""
    refine = refined(shared_out(rows, gpus, lambda gpu: _flat(gpu, rows.d)), rows)
    return lambda xq, width, *_: search_refined(refine, xq, width)


def shared_out(rows: Rows, gpus: int, empty: Callable[[int], Any]) -> Any:
    """The rows, in their order, in as many of FAISS's indexes as there are GPUs; `empty` makes the one for a GPU."""
    ends = np.linspace(0, rows.ntotal, gpus + 1).astype(int).tolist()
    parts = library().IndexShards(rows.d, True, True)  # a thread each, and numbered on from one to the next
    for gpu in range(gpus):
        part = empty(gpu)
        for start in range(ends[gpu], ends[gpu + 1], BLOCK):
            part.add(rows.decoded(start, min(start + BLOCK, ends[gpu + 1])))
        parts.add_shard(part)
    return parts


def refined(parts: Any, rows: Rows) -> Any:
    """FAISS's search that takes candidates from `parts` and their scores from `rows`."""
    metric = parts.metric_type
    parts.metric_type = rows.index.metric_type  # else they would not be let together
    refine = library().IndexRefine(parts, rows.index)
    parts.metric_type = metric  # by which the results of the parts are merged
    refine.own_fields = refine.own_refine_index = False
    return refine


def search_refined(refine: Any, xq: np.ndarray, width: int, parameters: Any = None) -> Found:
    """`width` candidates of the parts, found with their `parameters`, by their exact scores."""
    within = {} if parameters is None else {"base_index_params": parameters}
    found: Found = refine.search(xq, width, params=library().IndexRefineSearchParameters(k_factor=1.0, **within))
    return found


def _flat(gpu: int, d: int) -> Any:
    """An empty exact index of half precision on one GPU."""
    faiss = library()
    config = faiss.GpuIndexFlatConfig()
    config.device, config.useFloat16 = gpu, True
    return faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), d, config)


def _by_torch(rows: Rows) -> Finder | None:
    # here, because whoever has no index on GPUs is not to wait for torch
    from e5v_search.index.torch_rows import TorchRows, devices

    found = devices()
    if not found:
        return None
    _log.info("FAISS has no GPU: torch scans the rows of the index on %s", ", ".join(found))
    held = TorchRows(rows, found)
    return lambda xq, width, *_: held.search(xq, width)


def _there(found: Found, chosen: np.ndarray | None) -> Found:
    """What was found, best first, and of the chosen rows; behind it -1 for the others."""
    D, I = found  # noqa: E741
    there = I >= 0 if chosen is None else (I >= 0) & chosen[I]
    order = np.lexsort((-D, ~there), axis=-1)
    D, I, there = (np.take_along_axis(each, order, axis=1) for each in (D, I, there))  # noqa: E741
    return np.where(there, D, -np.inf), np.where(there, I, -1)


def _missed(rows: Rows, find: Finder, recipe: Recipe) -> float:
    """The share of what a scan of some of the rows finds for which `find`, that looks among all, has nothing as good."""
    places = np.unique(np.linspace(0, rows.ntotal - 1, min(_TRIED_ON, rows.ntotal)).astype(np.int64))
    some = Rows(view(quantiser(rows.d), rows.read(places)))
    xq = some.sample(_TRIED_WITH)
    k = min(10, len(places))
    D, _ = search(some.index, xq, k)
    found, _ = _there(find(xq, min(k + _MARGIN, rows.ntotal), _TRIED_HARD, recipe), None)
    return 1 - float((found[:, :k] >= D - _ROUNDING).mean())  # not <: nothing is as good as a score that is no number


def _scanned_here(why: str, *words: str) -> None:
    _log.warning(f"{why}: the rows of the index are scanned on the processor", *words)
