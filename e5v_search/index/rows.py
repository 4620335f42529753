"""Half-precision rows as FAISS's scalar quantiser has them, in memory or in a file, and their exact scan."""

import os
import threading
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found, best, merged
from e5v_search.index.library import faiss_errors, library

_MAPPED = 1 << 30  # bytes of a file that may all come to lie in this process's memory
_COPIED = 1 << 24  # bytes of rows that a search of few of them copies at once
_own = threading.local()


def quantiser(d: int) -> Any:
    """An empty scalar quantiser of half precision, inner product."""
    faiss = library()
    return faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def view(index: Any, codes: np.ndarray) -> Any:
    """Let a FAISS index of flat codes use `codes` (n, code_size) uint8 where they are."""
    faiss = library()
    pointer = faiss.swig_ptr(codes)
    lent = faiss.MaybeOwnedVectorUInt8()
    lent.is_owned = False
    lent.view_data = lent.c_ptr = pointer
    lent.view_size = lent.c_size = codes.size
    index.codes = lent
    index.ntotal = len(codes)
    index.referenced_objects = [codes]  # FAISS itself keeps nothing but the address
    return index


def selector(chosen: np.ndarray) -> Any:
    """FAISS's selector of the places where chosen (n,) bool is true."""
    return library().IDSelectorBitmap(np.packbits(chosen, bitorder="little"))


def search(index: Any, xq: np.ndarray, width: int, chosen: np.ndarray | None = None) -> Found:
    """Exactly the best `width` rows of a scalar quantiser; D, and I as places."""
    parameters = None if chosen is None else library().SearchParameters(sel=selector(chosen))
    with faiss_errors():
        found: Found = index.search(xq, width, params=parameters)
    return found


class Rows:
    """Rows (ntotal, d) behind a scalar quantiser, of which any can be had and scored.

    index: FAISS's, over all of them. codes (ntotal, 2 d) uint8: the float16 numbers.
    """

    def __init__(self, index: Any, file: column.Reader | None = None) -> None:
        self.index = index
        self.d = int(index.d)
        self.ntotal = int(index.ntotal)
        codes: np.ndarray = library().rev_swig_ptr(index.codes.data(), self.ntotal * index.code_size)
        self.codes = codes.reshape(self.ntotal, index.code_size)
        self._file = file

    @classmethod
    def mapped(cls, path: Path, d: int, n: int) -> Self:
        """The first n rows of a file. Raises IndexDamaged if there are fewer."""
        index = view(quantiser(d), column.mapped(path, 2 * d * n).reshape(n, 2 * d))
        read = 2 * d * n > _MAPPED and hasattr(os, "preadv")
        return cls(index, column.Reader(path, 2 * d) if read else None)

    def read(self, places: np.ndarray) -> np.ndarray:
        """The codes (n, 2 d) uint8 at places (n,), copied. Raises CollectionError."""
        codes = np.empty((len(places), self.codes.shape[1]), np.uint8)
        self._copy(places, codes)
        return codes

    def _copy(self, places: np.ndarray, into: np.ndarray) -> None:
        if self._file is None:
            np.take(self.codes, places, axis=0, out=into, mode="clip")
        else:
            # the system maps up to two megabytes around a row that is touched: of the whole file all would soon be resident
            self._file.read(places, into)

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """The rows (n, d) float32 at places (n,)."""
        x: np.ndarray = self.read(places).view(np.float16).astype(np.float32)
        return x

    def decoded(self, start: int, stop: int) -> np.ndarray:
        """Rows start:stop as float32 (stop - start, d)."""
        with faiss_errors():
            x: np.ndarray = self.index.reconstruct_n(start, stop - start)
        return x

    def blocks(self, start: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows from `start` on, by `size`: (position of the first, float32 (m, d))."""
        for at in range(start, self.ntotal, size):
            yield at, self.decoded(at, min(at + size, self.ntotal))

    def sample(self, most: int) -> np.ndarray:
        """(m, d) float32, at most `most` rows, evenly spread."""
        return self.vectors(np.unique(np.linspace(0, self.ntotal - 1, min(most, self.ntotal)).astype(np.int64)))

    @property
    def in_place(self) -> bool:
        """Whether rows are scored where they are, and not read from a file for it."""
        return self._file is None

    def part(self, where: slice) -> "Rows":
        """These rows, where they are."""
        return Rows(view(quantiser(self.d), self.codes[where]))

    def refined(self, coarse: Any, how: Any, xq: np.ndarray, width: int, most: int) -> Found:
        """Exactly the best `width` of the `most` rows that `coarse`, an index of the same ones, finds by parameters `how`.

        As `ranked`.
        """
        with faiss_errors():
            if not self.in_place:
                return self.ranked(xq, coarse.search(xq, most, params=how)[1], width)
            faiss = library()
            # FAISS multiplies, and cuts off what is behind the point
            within = faiss.IndexRefineSearchParameters(k_factor=(most + 0.5) / width, base_index_params=how)
            D, I = faiss.IndexRefine(coarse, self.index).search(xq, width, params=within)  # noqa: E741
        return np.where(I < 0, -np.inf, D), I

    def ranked(self, xq: np.ndarray, candidates: np.ndarray, width: int) -> Found:
        """Exactly the best `width` for each query among its `candidates` (nq, m), distinct places or -1.

        D (nq, width), I as places; where there are fewer, -inf and -1.
        """
        D = np.full((len(xq), width), -np.inf, np.float32)
        I = np.full((len(xq), width), -1, np.int64)  # noqa: E741
        for n, own in enumerate(candidates):
            near, places = self._best_of(own[own >= 0], xq[n : n + 1], width)
            D[n, : near.shape[1]], I[n, : near.shape[1]] = near[0], places[0]
        return D, I

    def search(self, xq: np.ndarray, k: int, places: np.ndarray, names: np.ndarray) -> Found:
        """Exactly the best k among the distinct `places`; D, and I as `names` (of all places) call them."""
        # one copy serves all queries, each of which would ask every row
        find = self._best_of if 16 * len(places) <= self.ntotal else self._best_in_place
        return best(lambda width: find(places, xq, width), k, len(places), len(xq), names)

    def _best_in_place(self, places: np.ndarray, xq: np.ndarray, width: int) -> Found:
        """As `_best_of`, where the rows lie."""
        chosen = np.zeros(self.ntotal, dtype=bool)
        chosen[places] = True
        return search(self.index, xq, min(width, len(places)), chosen) if len(places) else _nothing(len(xq))

    def _best_of(self, places: np.ndarray, xq: np.ndarray, width: int) -> Found:
        """D, and I as places, (nq, least of width and n) for places (n,)."""

        def best_of(some: np.ndarray) -> Found:
            codes = _memory(len(some), self.codes.shape[1])
            self._copy(some, codes)
            D, at = search(view(quantiser(self.d), codes), xq, min(width, len(some)))
            return D, some[at]

        if not len(places):
            return _nothing(len(xq))
        step = max(1, _COPIED // self.codes.shape[1])
        places = np.sort(places)  # as they lie on the disk
        parts = (best_of(places[start : start + step]) for start in range(0, len(places), step))
        return reduce(lambda one, other: merged(one, other, width), parts)


def _nothing(nq: int) -> Found:
    return np.empty((nq, 0), np.float32), np.empty((nq, 0), np.int64)


def _memory(n: int, size: int) -> np.ndarray:
    """(n, size) uint8, the same for all searches of this thread: to be given pages anew may take longer than to read rows."""
    held: np.ndarray = getattr(_own, "memory", np.empty(0, np.uint8))
    if held.size < n * size:
        held = _own.memory = np.empty(n * size, np.uint8)
    return held[: n * size].reshape(n, size)
