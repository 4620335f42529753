"""Scans of rows in one bit a number (RaBitQ): 32 times fewer bytes than float32 has."""

import os
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found
from e5v_search.index.library import library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, selector
from e5v_search.index.scan import Scan, opened

_SPARE = 4  # candidates for each result that is asked for: their order by codes is not quite that of their scores


class Coded(Scan):
    """Candidates are found by codes in a file, and ranked by their rows."""

    _data: np.ndarray  # the file of codes (bytes,) uint8, mapped

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self.codes = folder / facts["codes"]

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        most = self._most(width)
        workers = library().omp_get_max_threads()
        coarse, how = self._scanned(chosen, effort)

        def some(x: np.ndarray) -> Found:
            return self.rows.refined(coarse, how, x, width, most)

        if workers == 1:
            return some(xq)
        # by slices, so that while one thread reads rows another finds candidates
        found = list(threads(workers).map(some, np.array_split(xq, min(len(xq), 4 * workers))))
        D, I = (np.concatenate(parts) for parts in zip(*found, strict=True))  # noqa: E741
        return D, I

    @abstractmethod
    def _scanned(self, chosen: np.ndarray | None, effort: int) -> tuple[Any, Any]:
        """FAISS's index of all codes, and its parameters for a search among those chosen."""

    def _most(self, width: int) -> int:
        """How many candidates there are to be for so many results."""
        return min(max(_SPARE * width, self.recipe.candidates), self.rows.ntotal)

    def problems(self) -> list[str]:
        right = column.checksum(self._data) == self.facts["codes_crc32"]
        return [] if right else [f"the checksum of {self.codes.name} is wrong"]


def parameters(kind: type[Any], recipe: Recipe, chosen: np.ndarray | None, **own: int) -> Any:
    """FAISS's of either kind, with its `own`, behind the rotation: which rows count, and how the query is compared."""
    # centred: around 0 and without its few extreme numbers, two bits serve as well as three from the least to the greatest
    said = own | {"qb": recipe.query_bits, "centered": True}
    among = {} if chosen is None else {"sel": selector(chosen)}
    return library().SearchParametersPreTransform(index_params=kind(**said, **among))


def over(n: int, head: bytes) -> Any:
    """What FAISS wrote as `head`, for n rows that it is given to find by L2. It says that it finds them by what rows are
    scored with: FAISS refines like by like alone."""
    coarse = opened(head)
    coarse.ntotal, coarse.metric_type = n, library().METRIC_INNER_PRODUCT
    return coarse


def threads(n: int) -> ThreadPoolExecutor:
    """n threads that are kept: to begin them for a single query takes a third of its time. A forked process has its own."""
    return _threads(os.getpid(), n)


@cache
def _threads(process: int, n: int) -> ThreadPoolExecutor:
    # FAISS would divide the work of each of them again
    return ThreadPoolExecutor(n, "scan", initializer=library().omp_set_num_threads, initargs=(1,))
