"""All rows in one bit a number, scanned whole."""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found, merged
from e5v_search.index.coded import Coded, over, parameters, threads
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, view
from e5v_search.index.scan import BLOCK, SEED, opened, serialised

_TRAINED_ON = 16_384  # rows of which the mean is taken; nothing else is learned
_PART = 1 << 24  # bytes of codes for which a thread of its own is worth while


class OneBit(Coded):
    """The file of codes has them in the order of the rows, so that more are written behind them."""

    kind: ClassVar[str] = "one-bit"

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        coarse = opened(head)
        self._size = library().downcast_index(coarse.index).code_size
        self._data = column.mapped(self.codes, rows.ntotal * self._size)
        self._whole = self._part(slice(0, rows.ntotal))
        n = max(1, min(library().omp_get_max_threads(), len(self._data) // _PART))
        ends = np.linspace(0, rows.ntotal, n + 1).astype(int).tolist()
        self._parts = [(where, rows.part(where), self._part(where)) for where in map(slice, ends[:-1], ends[1:])]

    def _part(self, where: slice) -> Any:
        """FAISS's index of the codes of these rows."""
        coarse = over(where.stop - where.start, self.head)
        view(library().downcast_index(coarse.index), self._data.reshape(-1, self._size)[where])
        return coarse

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        faiss = library()
        rotation = faiss.HadamardRotation(rows.d, SEED)
        # by L2, whatever the scores are: it tells rows of length 1 better apart
        coarse = faiss.IndexPreTransform(rotation, faiss.IndexRaBitQ(rotation.d_out, faiss.METRIC_L2))
        with faiss_errors():
            coarse.train(rows.sample(_TRAINED_ON))
        codes = path.with_name(f"{path.name}.codes")
        _, crc32 = column.append(codes, _encoded(coarse, rows, 0))
        return cls(rows, recipe, serialised(coarse), {"codes": codes.name, "codes_crc32": crc32}, path.parent)

    def extended(self, rows: Rows, path: Path) -> Self:
        more = _encoded(self._whole, rows, self.rows.ntotal)
        _, crc32 = column.append(self.codes, more, len(self._data), self.facts["codes_crc32"])
        return type(self)(rows, self.recipe, self.head, self.facts | {"codes_crc32": crc32}, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        """A few queries share the parts among threads: each ranks its own candidates, if rows need not be read for that."""
        if len(xq) >= len(self._parts):
            return super().search(xq, width, chosen, effort)
        most = self._most(width)

        def near(part: tuple[slice, Rows, Any]) -> Found:
            where, rows, coarse = part
            how = self._how(None if chosen is None else chosen[where])
            own = min(most, rows.ntotal)
            if self.rows.in_place:
                D, I = rows.refined(coarse, how, xq, min(width, own), own)  # noqa: E741
            else:
                with faiss_errors():
                    D, I = coarse.search(xq, own, params=how)  # noqa: E741
                D = -D
            return D, np.where(I < 0, I, I + where.start)

        workers = threads(len(self._parts))
        kept = width if self.rows.in_place else most
        found = reduce(lambda one, other: merged(one, other, kept), workers.map(near, self._parts))
        return found if self.rows.in_place else workers.submit(self.rows.ranked, xq, found[1], width).result()

    def _scanned(self, chosen: np.ndarray | None, effort: int) -> tuple[Any, Any]:
        return self._whole, self._how(chosen)

    def _how(self, chosen: np.ndarray | None) -> Any:
        return parameters(library().RaBitQSearchParameters, self.recipe, chosen)


def _encoded(coarse: Any, rows: Rows, start: int) -> Iterator[np.ndarray]:
    for _, x in rows.blocks(start, BLOCK):
        with faiss_errors():
            yield coarse.sa_encode(x)
