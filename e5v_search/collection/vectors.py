"""Search by vectors that somebody else has made: row by row of a matrix, many at once."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from e5v_search import filters
from e5v_search.collection import narrow
from e5v_search.collection.core import Collection
from e5v_search.collection.importing import open_vectors
from e5v_search.errors import CollectionError, CollectionNotFound, QueryError, UsageError
from e5v_search.filters import EVERYTHING
from e5v_search.hits import Hit, Hits

_BATCH = 64
_GONE = 8  # ids more than asked for: the catalog may just have lost some of them


def search_file(
    collection: Collection, path: Path, *, k: int = 10, where: Sequence[str] = (), threshold: float | None = None
) -> Iterator[Hits]:
    """As `search_vectors`, for the rows of a .npy file, which is not loaded as a whole. Raises UsageError."""
    try:
        xq = open_vectors(path)
    except CollectionError as error:
        raise UsageError(str(error)) from error
    return search_vectors(collection, xq, k=k, where=where, threshold=threshold)


def search_vectors(
    collection: Collection, xq: np.ndarray, *, k: int = 10, where: Sequence[str] = (), threshold: float | None = None
) -> Iterator[Hits]:
    """For each row of xq (nq, d), brought to length 1, the k nearest items, best first; scores are cosines.

    Raises QueryError with the number of a row that cannot be used, when its turn comes, and at once for what cannot be
    used at all; CollectionNotFound for a collection without items.
    """
    if k < 1:
        raise QueryError(f"k must be at least 1, not {k}")
    passing = filters.parse(where)
    dim = collection.catalog.dim
    if dim is None or collection.catalog.empty():
        raise CollectionNotFound(f"collection {collection.path} is empty; there is nothing to search")
    if xq.ndim != 2 or xq.shape[1] != dim:
        raise QueryError(f"rows of {dim} numbers are needed, as the collection's vectors are, not an array {xq.shape}")
    return _searched(collection, xq, k, passing, threshold)


def _searched(collection: Collection, xq: np.ndarray, k: int, where: filters.Filter, threshold: float | None) -> Iterator[Hits]:
    catalog = collection.catalog
    for start in range(0, len(xq), _BATCH):
        began = time.perf_counter()
        unit = _unit(xq[start : start + _BATCH], start)
        index = collection.indexes.current()
        loaded = time.perf_counter()
        if where == EVERYTHING:
            found = list(zip(*index.search(unit, k + _GONE), strict=True))
        else:
            found = [narrow.search(index, catalog, row, k, where) for row in unit]
        nearest = {i for _, ids in found for i in ids[:k].tolist()}
        items = catalog.items(nearest)
        if len(items) < len(nearest):
            items |= catalog.items({i for _, ids in found for i in ids[k:].tolist()})
        ended = time.perf_counter()
        took = _took(loaded - began, (ended - loaded) / len(unit))
        for n, (D, ids) in enumerate(found, start=start):
            near = [(i, score) for i, score in zip(ids.tolist(), D.tolist(), strict=True) if i in items]
            kept = [(i, score) for i, score in near[:k] if threshold is None or score >= threshold]
            hits = [Hit.of(items[i], rank, min(score, 1.0)) for rank, (i, score) in enumerate(kept, start=1)]
            yield Hits(hits, {"vector": n}, catalog.fingerprint or "", took)
            took = _took(0.0, (ended - loaded) / len(unit))


def _unit(x: np.ndarray, first: int) -> np.ndarray:
    exact = np.asarray(x, np.float64)
    norms = np.linalg.norm(exact, axis=1)
    wrong = ~np.isfinite(norms) | (norms == 0)
    if wrong.any():
        row = int(wrong.argmax())
        what = "is all zeros" if norms[row] == 0 else "holds a number that is not finite"
        raise QueryError(f"row {first + row} (from 0) {what}")
    unit: np.ndarray = (exact / norms[:, None]).astype(np.float32)
    return unit


def _took(load: float, search: float) -> dict[str, float]:
    """Milliseconds of the phases that took so many seconds."""
    return {"load": 1e3 * load, "embed": 0.0, "search": 1e3 * search, "total": 1e3 * (load + search)}
