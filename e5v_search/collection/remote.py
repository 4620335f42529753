"""What an index on a server asks of the catalog: rows for the scores, and facts to keep beside the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from e5v_search.catalog import Catalog, Item
from e5v_search.collection.chosen import stored

_FIELDS = tuple(each.name for each in fields(Item))


class CatalogSource:
    """One view of a catalog."""

    def __init__(self, catalog: Catalog, view: str) -> None:
        self._catalog, self._view = catalog, view

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return stored(self._catalog, ids, self._view)

    def facts(self, ids: np.ndarray) -> Sequence[Mapping[str, Any]]:
        items = self._catalog.items(ids)
        return [{name: getattr(items[i], name) for name in _FIELDS} for i in ids.tolist()]

    def sample(self, n: int) -> np.ndarray:
        return self._catalog.sample(n)
