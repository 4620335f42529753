"""One bit for each number of a rotated row (RaBitQ): 32 times fewer bytes to scan than float32 has."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found, merged
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import codes_of, quantiser, selector, view
from e5v_search.index.scan import SEED, Scan, blocks, opened, reranked, sample, search_reranked, serialised

_TRAINED_ON = 16_384  # rows of which the mean is taken; nothing else is learned
_PART = 1 << 24  # bytes of codes for which a thread of its own is worth while


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `start + n`, as FAISS searches them; it keeps only addresses of `coarse` and `rows`."""

    start: int
    n: int
    coarse: Any
    rows: Any
    refine: Any

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, bits: int) -> Found:
        choice = {} if chosen is None else {"sel": selector(chosen[self.start : self.start + self.n])}
        parameters = library().RaBitQSearchParameters(qb=bits, **choice)
        D, I = search_reranked(self.refine, xq, min(width, self.n), parameters)  # noqa: E741
        return D, np.where(I < 0, I, I + self.start)


class OneBit(Scan):
    """All codes are scanned. Their file has them in the order of the rows, so that more are written behind them."""

    kind: ClassVar[str] = "one-bit"

    def __init__(self, rows: Any, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self.codes = folder / facts["codes"]
        coarse = opened(head)
        self._size = library().downcast_index(coarse.index).code_size
        self._data = column.mapped(self.codes, rows.ntotal * self._size)
        self._whole = self._part(0, rows.ntotal)
        parts = max(1, min(library().omp_get_max_threads(), len(self._data) // _PART))
        ends = np.linspace(0, rows.ntotal, parts + 1).astype(int).tolist()
        self._parts = [self._part(*some) for some in pairwise(ends)] if parts > 1 else [self._whole]
        # kept: to begin threads for a single query takes a third of its time
        self._threads = ThreadPoolExecutor(parts, thread_name_prefix="scan")

    def _part(self, start: int, stop: int) -> _Part:
        coarse = opened(self.head)
        view(library().downcast_index(coarse.index), self._data.reshape(-1, self._size)[start:stop])
        rows = view(quantiser(self.rows.d), codes_of(self.rows)[start:stop])
        return _Part(start, stop - start, coarse, rows, reranked(coarse, rows))

    @classmethod
    def build(cls, rows: Any, recipe: Recipe, path: Path) -> Self:
        faiss = library()
        rotation = faiss.HadamardRotation(rows.d, SEED)
        coarse = faiss.IndexPreTransform(rotation, faiss.IndexRaBitQ(rotation.d_out, faiss.METRIC_L2))
        with faiss_errors():
            coarse.train(sample(rows, _TRAINED_ON))
        codes = path.with_name(f"{path.name}.codes")
        _, crc32 = column.append(codes, _encoded(coarse, rows, 0))
        return cls(rows, recipe, serialised(coarse), {"codes": codes.name, "codes_crc32": crc32}, path.parent)

    def extended(self, rows: Any, path: Path) -> Self:
        more = _encoded(self._whole.coarse, rows, self.rows.ntotal)
        _, crc32 = column.append(self.codes, more, len(self._data), self.facts["codes_crc32"])
        return type(self)(rows, self.recipe, self.head, self.facts | {"codes_crc32": crc32}, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        width = min(max(width, self.recipe.candidates), self.rows.ntotal)
        if len(xq) >= len(self._parts):  # FAISS itself has a thread for each query
            return self._whole.search(xq, width, chosen, self.recipe.query_bits)

        def search(part: _Part) -> Found:
            return part.search(xq, width, chosen, self.recipe.query_bits)

        found = self._threads.map(search, self._parts)
        return reduce(lambda one, other: merged(one, other, width), found)

    def problems(self) -> list[str]:
        right = column.checksum(self._data) == self.facts["codes_crc32"]
        return [] if right else [f"the checksum of {self.codes.name} is wrong"]


def _encoded(coarse: Any, rows: Any, start: int) -> Iterator[np.ndarray]:
    for _, x in blocks(rows, start):
        with faiss_errors():
            yield coarse.sa_encode(x)
