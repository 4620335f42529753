"""An index that Milvus holds: kept up with from here, searched there, its scores taken from the catalog's rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from e5v_search.errors import QueryError, StoreError
from e5v_search.filters import Filter
from e5v_search.index import column
from e5v_search.index.base import Found, Index, Stamp, matrix, merged
from e5v_search.index.flat import FlatIndex
from e5v_search.index.milvus.fields import expression, fields
from e5v_search.index.milvus.place import Place
from e5v_search.index.milvus.server import MOST, Server, among, chunks
from e5v_search.index.recipe import Recipe
from e5v_search.index.sealed import IndexDamaged, read_facts, sealing

KIND = "milvus"
_NOTE = "e5v_search"  # the property of a collection in Milvus that says whose it is and what it holds


class Source(Protocol):
    """What the catalog knows of the items."""

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and rows (n, d) float16 of those that there are."""

    def facts(self, ids: np.ndarray) -> Sequence[Mapping[str, Any]]:
        """What else is known of each item, in this order, by the catalog's names."""

    def sample(self, n: int) -> np.ndarray:
        """Ids (m,) of some n items, or fewer."""


class MilvusIndex(Index):
    """Rows that a server holds, and in memory what is to take their place.

    The file of such an index says only where the rows are. What they hold stands beside them in Milvus, written behind them:
    a process that is killed while it sends them leaves an index that is behind, no other.
    """

    most = MOST
    newer = 1000  # each change makes the question to the server longer

    def __init__(self, server: Server, recipe: Recipe, d: int, stamp: Stamp, source: Source) -> None:
        server.load(recipe)
        self._server = server
        self.recipe = recipe
        self._d = d
        self.stamp = self.there = stamp  # the latter without what is in memory
        self._source = source
        self._rest()

    def _rest(self) -> None:
        """There is nothing in memory that the server has not."""
        self._tail = FlatIndex.empty(self._d)
        self._gone = np.empty(0, np.int64)  # ids whose rows there do not count
        self._live: int | None = None

    @classmethod
    def claim(cls, recipe: Recipe, suffix: str, newest: Stamp, d: int, source: Source, anew: bool = False) -> Self:
        """The collection that the recipe names, for the catalog whose stamp is `newest`.

        What is there of this catalog's is kept, however much it is, but for `anew`, which still goes on with what was cut
        short; anything of others' is a StoreError. `suffix` is that of the view.
        """
        server = _server(recipe, suffix)
        found = server.describe()
        if found is not None:
            stamp, made_by = _check(server, recipe, found.properties, found.d, newest.uid, d)
            whole = stamp.item < 0
            if made_by == _built(recipe) and stamp.state <= newest.state and not (anew and whole):
                return cls(server, recipe, d, stamp, source)
            server.drop()
        start = Stamp(newest.uid, 0)
        server.create(d, recipe, _note(start, recipe))
        return cls(server, recipe, d, start, source)

    @property
    def kind(self) -> str:
        return KIND

    @property
    def d(self) -> int:
        return self._d

    @property
    def ntotal(self) -> int:
        if self._live is None:
            self._live = self._server.count(self._gone)
        return self._live + self._tail.ntotal

    # changes, in memory

    def put(self, ids: np.ndarray, x: np.ndarray, *, new: bool = False) -> None:
        self._tail.put(ids, x, new=new)
        self._pass_over(ids)

    def remove(self, ids: np.ndarray) -> None:
        self._tail.remove(ids)
        self._pass_over(ids)

    def _pass_over(self, ids: np.ndarray) -> None:
        if len(ids):
            self._gone = np.union1d(self._gone, np.asarray(ids, np.int64))
            self._live = None

    def _without_gone(self) -> str:
        return f"id not in {self._gone.tolist()}" if len(self._gone) else ""

    # reading

    def ids(self) -> np.ndarray:
        return np.concatenate([np.setdiff1d(self._server.ids(), self._gone), self._tail.ids()])

    def sample(self, n: int) -> np.ndarray:
        return self._source.sample(n)

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        inside = np.isin(ids, self._tail.ids())
        x = np.empty((len(ids), self._d), np.float32)
        if inside.any():
            x[inside] = self._tail.vectors(ids[inside])
        places = {i: n for n, i in enumerate(ids.tolist()) if not inside[n] and i not in self._gone}
        missing = len(ids) - int(inside.sum())
        for block, rows in self._server.vectors(np.array(list(places), np.int64), self._d):
            x[[places[i] for i in block.tolist()]] = rows
            missing -= len(block)
        if missing:
            raise KeyError(f"{missing} of {len(ids)} rows are not there")
        return x

    def search(self, xq: np.ndarray, k: int, ids: np.ndarray | None = None) -> Found:
        xq = matrix(xq, self._d)
        found = self._tail.search(xq, k, ids)
        if ids is None:
            return merged(found, self._near(xq, k, self._without_gone()), k)
        for chunk in chunks(np.setdiff1d(ids, self._gone)):
            found = merged(found, self._near(xq, k, among(chunk)), k)
        return found

    def search_where(self, xq: np.ndarray, k: int, where: Filter) -> Found | None:
        test = expression(where)
        if test is None or len(self._gone):  # nobody knows the facts of what is in memory
            return None
        return self._near(matrix(xq, self._d), k, test)

    def _near(self, xq: np.ndarray, k: int, where: str) -> Found:
        """The k best rows of the server's that pass.

        It names candidates, in whatever precision its index has; their scores are those of the catalog's rows.
        """
        if k > MOST:
            raise QueryError(
                f"Milvus finds at most {MOST:,} items at once, not {k:,}: ask for fewer, or leave it with rebuild --recipe"
            )
        width = max(2 * k, self.recipe.candidates)
        while True:
            width = min(width, MOST)
            near = self._server.search(xq, width, where, self.recipe.search)
            candidates = np.unique(np.concatenate([np.empty(0, np.int64), *near]))
            D, I = FlatIndex.build(self._d, [self._source.rows(candidates)]).search(xq, width)  # noqa: E741
            # copies score the same: look on until the last score that counts has no further equals
            tied = D.shape[1] > k and bool((D[:, k - 1] == D[:, -1]).any())
            if not tied or width == MOST or all(len(ids) < width for ids in near):
                return D[:, :k], I[:, :k]
            width *= 4

    # there

    def save(self, path: Path) -> None:
        """Send what is in memory, note behind it what is there now, and write down where: killed before, it sends again."""
        sent = self._tail.ids()
        self._server.delete(np.setdiff1d(self._gone, sent))
        if len(sent):
            x = self._tail.codes().view(np.float16)
            self._server.upsert(sent, x, [fields(item) for item in self._source.facts(sent)])
        if self.stamp.item < 0:
            self._server.settle()
        self._rest()
        self._server.note(_note(self.stamp, self.recipe))
        self.there = self.stamp
        with sealing(path, {"kind": KIND, "d": self._d, "recipe": asdict(self.recipe)} | asdict(self.stamp)):
            pass
        column.remove_files(path)  # those of an index of another kind that was there before

    @classmethod
    def load(cls, path: Path, source: Source, suffix: str) -> Self:
        """The index that the file tells of. Raises IndexDamaged where Milvus has it no more, StoreError."""
        facts = read_facts(path)
        recipe = Recipe(**facts["recipe"])
        server = _server(recipe, suffix)
        found = server.describe()
        if found is None:
            raise IndexDamaged("Milvus does not have it any more")
        stamp, _ = _check(server, recipe, found.properties, found.d, facts["uid"], facts["d"])
        return cls(server, recipe, facts["d"], stamp, source)

    def problems(self) -> list[str]:
        return []


def check(recipe: Recipe, uid: str, d: int | None) -> None:
    """Raises StoreError where the Milvus that the recipe names cannot be reached, or has something of others' there."""
    server = _server(recipe, "")
    found = server.describe()
    if found is not None:
        _check(server, recipe, found.properties, found.d, uid, d)


def _server(recipe: Recipe, suffix: str) -> Server:
    place = Place.parse(recipe.store)
    return Server(place, place.beside(suffix))


def _note(stamp: Stamp, recipe: Recipe) -> dict[str, str]:
    return {_NOTE: json.dumps(asdict(stamp) | {"built": _built(recipe)})}


def _built(recipe: Recipe) -> dict[str, Any]:
    """What cannot be changed of what is there."""
    return {"index": recipe.index, "vectors": recipe.vectors, "build": recipe.build}


def _check(
    server: Server, recipe: Recipe, properties: Mapping[str, str], d: int | None, uid: str, wanted: int | None
) -> tuple[Stamp, dict[str, Any]]:
    """What the collection holds, and how it was made. Raises StoreError where it is not of the catalog `uid`."""
    try:
        note = json.loads(properties[_NOTE])
        stamp = Stamp(note["uid"], note["state"], note["item"])
    except (KeyError, ValueError):
        stamp, note = Stamp("", 0), {}
    if not note or stamp.uid != uid or (wanted is not None and d != wanted):
        whose = "another collection's vectors" if note else "vectors that are not e5v-search's"
        size = "" if d is None else f" of {d:,} numbers"
        raise StoreError(
            f"{server.name} in {recipe.store} holds {whose}{size}, which are left alone: take another name behind"
            " --store, or drop it in Milvus if nobody needs it"
        )
    return stamp, note.get("built", {})
