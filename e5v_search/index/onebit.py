"""One bit for each number of a rotated row (RaBitQ): 32 times fewer bytes to scan than float32 has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import selector, view
from e5v_search.index.scan import SEED, Scan, blocks, opened, reranked, sample, search_reranked, serialised

_TRAINED_ON = 16_384  # rows of which the mean is taken; nothing else is learned


class OneBit(Scan):
    """All codes are scanned. Their file has them in the order of the rows, so that more are written behind them."""

    kind: ClassVar[str] = "one-bit"

    def __init__(self, rows: Any, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        faiss = library()
        self.codes = folder / facts["codes"]
        self._coarse = opened(head)
        self._one_bit = faiss.downcast_index(self._coarse.index)
        self._data = column.mapped(self.codes, rows.ntotal * self._one_bit.code_size)
        view(self._one_bit, self._data.reshape(rows.ntotal, -1))
        self._refine = reranked(self._coarse, rows)

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
        more = _encoded(self._coarse, rows, self.rows.ntotal)
        _, crc32 = column.append(self.codes, more, len(self._data), self.facts["codes_crc32"])
        return type(self)(rows, self.recipe, self.head, self.facts | {"codes_crc32": crc32}, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        faiss = library()
        choice = {} if chosen is None else {"sel": selector(chosen)}
        parameters = faiss.RaBitQSearchParameters(qb=self.recipe.query_bits, **choice)
        return search_reranked(self._refine, xq, min(max(width, self.recipe.candidates), self.rows.ntotal), parameters)

    def problems(self) -> list[str]:
        right = column.checksum(self._data) == self.facts["codes_crc32"]
        return [] if right else [f"the checksum of {self.codes.name} is wrong"]


def _encoded(coarse: Any, rows: Any, start: int) -> Iterator[np.ndarray]:
    for _, x in blocks(rows, start):
        with faiss_errors():
            yield coarse.sa_encode(x)
