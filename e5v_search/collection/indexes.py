"""The index files of a collection, one for each of its views: derived from the catalog, and made anew when in doubt."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.catalog import VIEW, Catalog
from e5v_search.collection.remote import CatalogSource
from e5v_search.collection.views import file_name
from e5v_search.config import parse
from e5v_search.errors import CollectionError, StoreError, UsageError
from e5v_search.index import (
    FlatIndex,
    Index,
    IndexDamaged,
    MappedIndex,
    MilvusIndex,
    Place,
    Recipe,
    Stamp,
    build,
    by_size,
    check,
    load,
    read_facts,
)
from e5v_search.index.recipe import physical_memory

_BEHIND = 20_000  # changes that a search brings into memory before it asks for the files to be renewed
_AT_ONCE = 65_536  # rows in memory before they are brought to the disk
_KINDS = {"flat-fp16": "exact"}  # of indexes, where recipes have another name for it


class Indexes:
    """Which file serves a view, whether it is what the catalog says, and what to do when it is not.

    What little a file lacks is brought in memory by those who search; one that is far behind, missing, damaged, of another
    catalog or of a kind that is not right any more is replaced by one built from the catalog. Nothing is ever embedded.
    One in Milvus is a file that says where it is, and follows the same rules; a StoreError tells of what fails there.
    `writing` holds the collection's write lock, or raises CollectionError.
    """

    def __init__(self, catalog: Catalog, writing: Callable[[], AbstractContextManager[None]]) -> None:
        self._catalog = catalog
        self._writing = writing
        self._folder = catalog.path.parent
        self._loaded: dict[str, Index] = {}

    def path(self, view: str = VIEW) -> Path:
        return self._folder / file_name("index", view, ".faiss")

    def recipe(self, view: str = VIEW) -> tuple[Recipe, str]:
        """Which index a view is to have, and why. Raises UsageError for a recipe of a newer e5v-search."""
        n = self._catalog.count_vectors(view)
        chosen = self._chosen()
        if chosen is not None and n:
            return chosen
        facts = self._facts(view)
        used = None if facts is None else _KINDS.get(facts["kind"], facts["kind"])
        return by_size(n, self._catalog.dim or 1, physical_memory(), used)

    @property
    def store(self) -> str:
        """The place in Milvus that the indexes are in; empty where they are in files."""
        chosen = self._chosen()
        return "" if chosen is None else chosen[0].store

    def placed(self, recipe: Recipe, store: str | None = None) -> Recipe:
        """The recipe with the place in Milvus that it asks for: `store`, its own, or the one in use.

        Raises UsageError where there is none, or no such place; StoreError where it does not serve, or holds something else.
        """
        if recipe.kind != "milvus":
            if store is not None:
                raise UsageError(f"--store goes with a recipe of the kind milvus, not {recipe.kind}")
            return recipe
        recipe = replace(recipe, store=Place.parse(store or recipe.store or self.store).text)
        check(recipe, self._catalog.uid, self._catalog.dim)
        return recipe

    def _chosen(self) -> tuple[Recipe, str] | None:
        chosen = self._catalog.recipe
        if chosen is None:
            return None
        return parse(Recipe, chosen["recipe"], f"the index recipe of {self._folder}"), chosen["why"]

    # for those who search

    def current(self, view: str = VIEW) -> Index:
        """The index with everything that the catalog holds in `view`."""
        held = self._loaded.get(view)
        if held is not None and not isinstance(held, MilvusIndex) and held.stamp == self._stamp():
            return held
        index, trouble = self._usable(view), ""
        if index is None or self._far_behind(index, view):
            # a search repairs the files for the next one, but never waits or fails for it
            try:
                with self._writing():
                    self._bring_up(view)
            except StoreError:
                raise
            except CollectionError as error:
                trouble = f" ({error})"
            index = self._usable(view)
            if self.recipe(view)[0].kind == "milvus" and (index is None or self._far_behind(index, view)):
                # all that it lacks may be more than memory holds
                raise StoreError(
                    f"{self.store} is not filled yet{trouble}; ask again when it is, or fill it with: e5v-search index"
                )
        if index is None:
            stamp = self._stamp()
            index = FlatIndex.build(self._catalog.dim or 1, self._catalog.vectors(view=view))
            index.stamp = stamp
        self._catch_up(index, view)
        self._loaded[view] = index
        return index

    def _usable(self, view: str) -> Index | None:
        """The index in memory or, where that is none or far behind, in the file; None if it is not of this catalog."""
        index = self._loaded.get(view)
        if isinstance(index, MilvusIndex) and self._left(index, view):
            index = None
        if index is not None and index.stamp.uid == self._catalog.uid and not self._far_behind(index, view):
            return index
        try:
            facts = read_facts(self.path(view))
            if index is not None and Stamp(facts["uid"], facts["state"]) == index.stamp:
                return index
            index = self._load(view)
        except IndexDamaged:
            return None
        if not self._of_this_catalog(index):
            return None
        chosen = self._chosen()
        if chosen is not None and isinstance(index, MappedIndex) and index.kind == chosen[0].kind:
            index.search_as(chosen[0])
        self._loaded[view] = index
        return index

    def _left(self, index: MilvusIndex, view: str) -> bool:
        """Whether another process is filling it anew, or has turned to another index."""
        facts = self._facts(view)
        if facts is None or facts["kind"] != index.kind or facts["recipe"]["store"] != index.recipe.store:
            return True
        return (facts["uid"], facts["state"], facts["item"]) < (index.there.uid, index.there.state, index.there.item)

    def _of_this_catalog(self, index: Index) -> bool:
        known = index.stamp.uid == self._catalog.uid and index.stamp.state <= self._catalog.state
        return known and index.d == (self._catalog.dim or 1)

    def _far_behind(self, index: Index, view: str) -> bool:
        if index.stamp == self._stamp():
            return False
        if isinstance(index, MilvusIndex):
            most = index.newer
        else:
            most = max(_BEHIND, index.newer if isinstance(index, MappedIndex) else 0)
        return self._catalog.changes(index.stamp.state, view, most + 1) > most

    def _catch_up(self, index: Index, view: str, at_once: int | None = None) -> None:
        """Bring in what is newer; with `at_once`, rows go to the disk when so many are in memory, and to Milvus soon."""
        stamp = self._stamp()
        if index.stamp == stamp:
            return
        # read the stamp first: what is committed meanwhile is fetched twice rather than never
        index.remove(self._catalog.removed(index.stamp.state, view))
        for ids, x in self._catalog.vectors(after=index.stamp.state, view=view, item=index.stamp.item):
            index.put(ids, x)
            if at_once is not None and isinstance(index, MappedIndex) and index.unsaved >= at_once:
                index.absorb()
            elif at_once is not None and isinstance(index, MilvusIndex):
                # nobody else writes: this is what the last row was read with
                last = int(ids[-1])
                index.stamp = Stamp(stamp.uid, self._catalog.written(last, view) - 1, last)
                index.save(self.path(view))
        index.stamp = stamp

    def _stamp(self) -> Stamp:
        return Stamp(self._catalog.uid, self._catalog.state)

    # on disk; the caller holds the write lock

    def sync(self) -> None:
        """Save every index whose file is not what it should be as the catalog is now."""
        if self._catalog.dim is None:
            return
        for view in self._catalog.views:
            if self._due(view):
                self._bring_up(view)

    def rebuild(self) -> int:
        """Make all anew from the catalog. Returns the number of vectors."""
        for view in self._catalog.views:
            self._build(view, anew=True)
        return sum(self._loaded[view].ntotal for view in self._catalog.views)

    def _bring_up(self, view: str) -> None:
        index = self._usable(view)
        if index is None or not self._worth_keeping(index, view):
            self._build(view)
            return
        self._catch_up(index, view, _AT_ONCE)
        index.save(self.path(view))

    def _worth_keeping(self, index: Index, view: str) -> bool:
        if not self._fits(index.kind, view, index.recipe.store if isinstance(index, MilvusIndex) else ""):
            return False
        if not isinstance(index, MappedIndex):
            return True
        return not index.worn and self._catalog.changes(index.stamp.state, view, index.ntotal + 1) <= index.ntotal

    def _build(self, view: str, anew: bool = False) -> None:
        recipe = self.recipe(view)[0]
        if recipe.kind == "milvus":
            source, dim = CatalogSource(self._catalog, view), self._catalog.dim or 1
            index: Index = MilvusIndex.claim(recipe, file_name("", view, ""), self._stamp(), dim, source, anew)
            index.save(self.path(view))  # who has it in memory is to know if it was emptied
            self._catch_up(index, view, _AT_ONCE)
        else:
            index = self.made(recipe, view)
        index.save(self.path(view))
        self._loaded[view] = index

    def _load(self, view: str) -> Index:
        """The index that the view's file holds, or tells of. Raises IndexDamaged, StoreError."""
        path = self.path(view)
        if read_facts(path)["kind"] == "milvus":
            return MilvusIndex.load(path, CatalogSource(self._catalog, view), file_name("", view, ""))
        return load(path)

    def made(self, recipe: Recipe, view: str = VIEW) -> Index:
        """An index of all that the catalog holds in `view`, which is not saved yet."""
        stamp = self._stamp()
        index = build(self.path(view), recipe, self._catalog.dim or 1, self._catalog.vectors(view=view))
        index.stamp = stamp
        return index

    def adopt(self, index: Index, recipe: Recipe, why: str) -> None:
        """From now on this recipe, by which `index` was made, is the collection's; the index is saved."""
        self._catalog.choose_recipe({"recipe": recipe.to_json(), "why": why})
        if isinstance(index, MappedIndex):
            index.search_as(recipe)
        index.save(self.path())
        self._loaded[VIEW] = index
        self.sync()  # of the other views

    # what is said of them

    @property
    def missing(self) -> bool:
        return not all(self.path(view).exists() for view in self._catalog.views)

    @property
    def stale(self) -> bool:
        """Whether there is something to be brought up to date, or more than searches make up for at no cost."""
        return any(self._due(view) for view in self._catalog.views)

    @property
    def kind(self) -> str:
        """Of the index that serves searches of photos and texts."""
        facts = self._facts(VIEW)
        return "flat-fp16" if facts is None else str(facts["kind"])

    def _due(self, view: str) -> bool:
        facts = self._facts(view)
        if facts is None or facts["uid"] != self._catalog.uid:
            return True
        if not self._fits(facts["kind"], view, facts.get("recipe", {}).get("store", "")):
            return True
        if facts["state"] == self._catalog.state:
            return False
        newer = facts.get("newer")
        return newer is None or self._catalog.changes(facts["state"], view, newer + 1) > newer

    def _fits(self, kind: str, view: str, store: str) -> bool:
        recipe = self.recipe(view)[0]
        return (_KINDS.get(kind, kind), store) == (recipe.kind, recipe.store)

    def _facts(self, view: str) -> dict[str, Any] | None:
        try:
            return read_facts(self.path(view))
        except IndexDamaged:
            return None

    def problems(self) -> Iterator[str]:
        """Every way in which a file contradicts the catalog, one line each."""
        for view in self._catalog.views:
            for problem in self._problems(view):
                yield f"{self.path(view).name}: {problem}; mend it with: e5v-search rebuild"

    def _problems(self, view: str) -> Iterator[str]:
        try:
            index = self._load(view)
        except IndexDamaged as error:
            if any(self._catalog.count().values()):
                yield str(error)
            return
        yield from index.problems()
        if not self._of_this_catalog(index):
            yield "it belongs to another catalog, or to a later state of this one"
            return
        self._catch_up(index, view)  # what an interrupted run leaves is no error: a search makes up for it
        ids = index.ids()
        truth: list[np.ndarray] = []
        wrong = 0
        for block, x in self._catalog.vectors(view=view):
            truth.append(block)
            present = np.isin(block, ids)
            if present.any():
                wrong += int((index.vectors(block[present]) != x[present].astype(np.float32)).any(axis=1).sum())
        held = np.concatenate(truth) if truth else np.empty(0, np.int64)
        if missing := len(np.setdiff1d(held, ids)):
            yield f"{missing} vectors are missing"
        if orphans := len(np.setdiff1d(ids, held)):
            yield f"{orphans} vectors belong to no item"
        if wrong:
            yield f"{wrong} vectors differ from the catalog's"
