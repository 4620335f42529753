"""Which items of a collection a command looks at, and their vectors as one matrix."""

from collections.abc import Sequence

import numpy as np

from e5v_search import filters
from e5v_search.catalog import VIEW, Catalog


def chosen(catalog: Catalog, kinds: Sequence[str], where: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Ids (n,) int64, ascending, of the items of each of `kinds` that pass the filters `where`. Raises QueryError."""
    return {kind: catalog.select(filters.parse([f"kind={kind}", *where])) for kind in kinds}


def stored(catalog: Catalog, ids: np.ndarray, view: str = VIEW) -> tuple[np.ndarray, np.ndarray]:
    """-> (ids (n,), x (n, d) float16) in the order of `ids` (distinct); what has no vector in `view` is left out."""
    blocks = list(catalog.vectors(ids=ids, view=view))
    if not blocks:
        return np.empty(0, np.int64), np.empty((0, catalog.dim or 0), np.float16)
    found = np.concatenate([block for block, _ in blocks])
    x = np.concatenate([x for _, x in blocks])
    ascending = np.argsort(found)
    have = np.isin(ids, found)
    return ids[have], x[ascending[np.searchsorted(found, ids[have], sorter=ascending)]]
