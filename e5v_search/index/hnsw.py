"""Rows linked to near ones: a search walks along the links. Quick for single queries; rows are added, never taken out."""

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, quantiser, selector
from e5v_search.index.scan import BLOCK, Scan, opened, serialised
from e5v_search.index.sealed import IndexDamaged


class Hnsw(Scan):
    """The links are in memory, the rows that they lead along are the mapped ones. Building holds the rows in memory too."""

    kind: ClassVar[str] = "hnsw"
    filters: ClassVar[bool] = False  # a walk that may only stop at few of the rows gets lost

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self._graph = opened(head, library().IO_FLAG_SKIP_STORAGE)
        if self._graph.ntotal != rows.ntotal:
            raise IndexDamaged("its links do not belong to its rows")
        self._graph.storage = rows.index
        self._graph.own_fields = False

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        faiss = library()
        half = faiss.ScalarQuantizer.QT_fp16
        graph = faiss.IndexHNSWSQ(rows.d, half, recipe.links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = recipe.ef_build
        return cls(rows, recipe, _linked(graph, rows, 0), {}, path.parent)

    def extended(self, rows: Rows, path: Path) -> Self:
        graph = opened(self.head, library().IO_FLAG_SKIP_STORAGE)
        held = quantiser(rows.d)
        held.add_sa_codes(self.rows.codes)
        graph.storage, graph.own_fields = held, False
        return type(self)(rows, self.recipe, _linked(graph, rows, self.rows.ntotal), {}, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        choice = {} if chosen is None else {"sel": selector(chosen)}
        ef = max(self.recipe.ef * effort, width)
        with faiss_errors():
            found: Found = self._graph.search(xq, width, params=library().SearchParametersHNSW(efSearch=ef, **choice))
        return found


def _linked(graph: Any, rows: Rows, start: int) -> bytes:
    for _, x in rows.blocks(start, BLOCK):
        with faiss_errors():
            graph.add(x)
    return serialised(graph, library().IO_FLAG_SKIP_STORAGE)
