"""The exact best of what passes a filter, whatever share of the collection that is."""

import math

import numpy as np

from e5v_search.catalog import Catalog
from e5v_search.filters import EVERYTHING, Filter
from e5v_search.index import Index

_SAMPLE = 128
_AMPLE = 3  # candidates for each that should pass: most searches then need no second scan
_CHECK = 6  # ids selected by an index in the time in which one candidate is checked


def search(index: Index, catalog: Catalog, xq: np.ndarray, k: int, where: Filter = EVERYTHING) -> tuple[np.ndarray, np.ndarray]:
    """The k best items for xq (d,) of those that pass: scores (m,) float32, ids (m,) int64; m < k only if no more pass.

    Best first, of equal scores the smaller id first. What the index holds and the catalog no longer does is left out.
    Raises CollectionError.
    """
    k = min(k, index.ntotal)
    if k < 1:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    n, plan = index.ntotal, None
    most = min(n, index.most)
    if where == EVERYTHING:
        width = min(k + 8, most)
    else:
        found = index.search_where(xq[None], max(k, min(k + 8, most)), where)
        if found is not None:
            D, I = (each[0] for each in found)  # noqa: E741
            there = np.isin(I, catalog.passing(I, where))
            return D[there][:k], I[there][:k]
        share = _share(index, catalog, where)
        width = min(math.ceil(_AMPLE * k / share) + 8, most) if share else most
        if _CHECK * width >= share * n:
            plan = catalog.plan(where)
    if plan is None or _CHECK * width < plan.effort:
        # candidates come in order: those that pass are the best that pass
        D, I = (found[0] for found in index.search(xq[None], width))  # noqa: E741
        passes = np.zeros(0, dtype=bool)
        while len(passes) < len(I) and passes.sum() < k:
            block = I[len(passes) :][: max(k, width // (2 * _AMPLE))]
            passes = np.append(passes, np.isin(block, catalog.passing(block, where)))
        if passes.sum() >= k or width == n:
            best = np.flatnonzero(passes)[:k]
            return D[best], I[best]
    D, I = index.search(xq[None], k, ids=catalog.select(where, plan))  # noqa: E741
    return D[0], I[0]


def _share(index: Index, catalog: Catalog, where: Filter) -> float:
    """The part of the collection that passes, from a sample of it."""
    sample = index.sample(_SAMPLE)
    return len(catalog.passing(sample, where)) / max(len(sample), 1)
