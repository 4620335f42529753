"""The index files of a collection, one for each of its views: derived from the catalog, and made anew when in doubt."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from e5v_search.catalog import VIEW, Catalog
from e5v_search.index import Index, IndexDamaged, Stamp


class Indexes:
    """Which file serves a view, whether it is what the catalog says, and what to do when it is not.

    A file that is behind is brought up to date in memory; one that is missing, damaged or of another catalog is replaced
    by one built from the catalog. Nothing is ever embedded.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._folder = catalog.path.parent
        self._loaded: dict[str, Index] = {}

    def path(self, view: str = VIEW) -> Path:
        return self._folder / ("index.faiss" if view == VIEW else f"index-{view}.faiss")

    def current(self, view: str = VIEW) -> tuple[Index, bool]:
        """The index with everything that the catalog holds in `view`, and whether it had to be built whole."""
        built = False
        index = self._loaded.get(view)
        if index is None or index.stamp.uid != self._catalog.uid:
            try:
                index = Index.load(self.path(view))
                of_this_catalog = index.stamp.uid == self._catalog.uid and index.stamp.state <= self._catalog.state
                if not of_this_catalog or index.d != self._catalog.dim:
                    raise IndexDamaged("it belongs to another state of the catalog")
            except IndexDamaged:
                index, built = self._built(view), True
        stamp = self._stamp()
        if index.stamp != stamp:
            # read the stamp first: what is committed meanwhile is fetched twice rather than never
            index.remove(self._catalog.removed(index.stamp.state))
            for ids, x in self._catalog.vectors(after=index.stamp.state, view=view):
                index.put(ids, x)
            index.stamp = stamp
        self._loaded[view] = index
        return index, built

    def _stamp(self) -> Stamp:
        return Stamp(self._catalog.uid, self._catalog.state)

    def _built(self, view: str) -> Index:
        stamp = self._stamp()
        index = Index.build(self._catalog.dim or 1, self._catalog.vectors(view=view))
        index.stamp = stamp
        return index

    # on disk; the caller holds the write lock

    def sync(self) -> None:
        """Save every index that is not on disk as the catalog is now."""
        if self._catalog.dim is None:
            return
        for view in self._catalog.views:
            if self._saved_stamp(view) != self._stamp():
                self.current(view)[0].save(self.path(view))

    def rebuild(self) -> int:
        """Make all anew from the catalog. Returns the number of vectors."""
        for view in self._catalog.views:
            self._loaded[view] = self._built(view)
            self._loaded[view].save(self.path(view))
        return sum(self._loaded[view].ntotal for view in self._catalog.views)

    # what is said of them

    @property
    def missing(self) -> bool:
        return not all(self.path(view).exists() for view in self._catalog.views)

    @property
    def stale(self) -> bool:
        """Whether a search would have to bring something up to date."""
        return any(self._saved_stamp(view) != self._stamp() for view in self._catalog.views)

    def _saved_stamp(self, view: str) -> Stamp | None:
        try:
            return Index.read_stamp(self.path(view))
        except IndexDamaged:
            return None

    def problems(self) -> Iterator[str]:
        """Every way in which a file contradicts the catalog, one line each."""
        for view in self._catalog.views:
            for problem in self._problems(view):
                yield f"{self.path(view).name}: {problem}; mend it with: e5v-search rebuild"

    def _problems(self, view: str) -> Iterator[str]:
        try:
            index = Index.load(self.path(view))
        except IndexDamaged as error:
            if any(self._catalog.count().values()):
                yield str(error)
            return
        if index.stamp != self._stamp():
            # what an interrupted run leaves: a search makes up for it, so it is no error
            index, _ = self.current(view)
        ids = set(index.ids().tolist())
        truth: set[int] = set()
        wrong = 0
        for block, x in self._catalog.vectors(view=view):
            truth.update(block.tolist())
            present = np.array([i in ids for i in block.tolist()], dtype=bool)
            if present.any():
                wrong += int((index.vectors(block[present]) != x[present].astype(np.float32)).any(axis=1).sum())
        if missing := len(truth - ids):
            yield f"{missing} vectors are missing"
        if orphans := len(ids - truth):
            yield f"{orphans} vectors belong to no item"
        if wrong:
            yield f"{wrong} vectors differ from the catalog's"
