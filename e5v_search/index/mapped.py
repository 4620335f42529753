"""Rows on the disk, something small that finds candidates among them, and what is newer than both in memory.

Beside the sealed file lie a file of rows and, for most kinds, one of codes. Rows are only ever written behind the others,
so that whoever has mapped them can go on; which of them count, and under which ids, stands in the sealed file, whose
replacement makes everything new visible at once.
"""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found, Index, Places, Stamp, best, distinct, matrix, merged
from e5v_search.index.flat import FlatIndex
from e5v_search.index.gpu import OnGpu
from e5v_search.index.gpu_cagra import OnGpuCagra
from e5v_search.index.gpu_ivf import OnGpuIvf
from e5v_search.index.hnsw import Hnsw
from e5v_search.index.ivf import Ivf
from e5v_search.index.onebit import OneBit
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, search
from e5v_search.index.scan import Scan
from e5v_search.index.sealed import sealing, unsealed

SCANS: dict[str, type[Scan]] = {scan.kind: scan for scan in (OneBit, Ivf, Hnsw, OnGpu, OnGpuIvf, OnGpuCagra)}
_EXACT_ROWS = 20_000  # so many that pass a filter are scanned exactly
_WORN = 4  # one in so many rows is dead: time to write the others anew
_SHARE = 128  # of the rows, one in so many may be newer than the files
_EFFORTS = (1, 8, 64)


class MappedIndex(Index):
    """`scan` finds candidates among the rows in the file `rows_path`, of which (n,) bool `dead` count no more."""

    def __init__(self, path: Path, rows_path: Path, d: int, ids: np.ndarray, dead: np.ndarray, scan: Scan) -> None:
        self._path = path
        self._rows_path = rows_path
        self._d = d
        self.stamp = Stamp("", 0)
        self._hold(ids, dead, scan)

    def _hold(self, ids: np.ndarray, dead: np.ndarray, scan: Scan) -> None:
        self._ids = ids
        self._dead = dead
        self._scan = scan
        self._alive = np.flatnonzero(~dead)
        self._places = Places(ids[self._alive])
        self._tail = FlatIndex.empty(self._d)
        self._changed()

    def _changed(self) -> None:
        self._live = int((~self._dead).sum())
        self._chosen = None if self._live == len(self._dead) else ~self._dead
        self._all: np.ndarray | None = None

    @property
    def kind(self) -> str:
        return self._scan.kind

    @property
    def d(self) -> int:
        return self._d

    @property
    def ntotal(self) -> int:
        return self._live + self._tail.ntotal

    @property
    def recipe(self) -> Recipe:
        return self._scan.recipe

    def search_as(self, recipe: Recipe) -> None:
        """Take from another recipe of the same kind how to search; what is built stays as it is.

        Not from one that wants other lists: its probes are meant for those.
        """
        if recipe.lists == self.recipe.lists:
            self._scan.recipe = recipe

    @property
    def newer(self) -> int:
        """How many changes may stay outside the files, for searches to take from the catalog."""
        return max(self.recipe.newer, len(self._ids) // _SHARE)

    @property
    def unsaved(self) -> int:
        """Rows that are in memory alone."""
        return self._tail.ntotal

    @property
    def worn(self) -> bool:
        """Whether it should be built anew: much of it is dead, or it was made for far fewer rows."""
        return _WORN * (len(self._ids) - self._live) > len(self._ids) or self._scan.outgrown(self.ntotal)

    # changes, in memory

    def put(self, ids: np.ndarray, x: np.ndarray, *, new: bool = False) -> None:
        x = matrix(x, self._d)
        ids = distinct(ids, len(x))
        if not new:
            self._bury(ids)
        self._tail.put(ids, x, new=new)
        self._all = None

    def remove(self, ids: np.ndarray) -> None:
        self._bury(ids)
        self._tail.remove(ids)
        self._all = None

    def _bury(self, ids: np.ndarray) -> None:
        places = self._of(ids)
        if (places >= 0).any():
            self._dead[places[places >= 0]] = True
            self._changed()

    def _of(self, ids: np.ndarray) -> np.ndarray:
        """The place (n,) of each id's row, -1 of one that has none there or whose row is dead."""
        if not len(self._alive):
            return np.full(len(ids), -1)
        at = self._places.of(ids)
        places = np.where(at >= 0, self._alive[at], -1)
        return np.where((places >= 0) & ~self._dead[places], places, -1)

    # reading

    def ids(self) -> np.ndarray:
        if self._all is None:
            held = self._ids if self._chosen is None else self._ids[self._chosen]
            self._all = np.concatenate([held, self._tail.ids()]) if self._tail.ntotal else held
        return self._all

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        places = self._of(ids)
        inside = places >= 0
        x = np.empty((len(ids), self._d), np.float32)
        x[inside] = self._scan.rows.vectors(places[inside])
        if not inside.all():
            x[~inside] = self._tail.vectors(ids[~inside])
        return x

    def search(self, xq: np.ndarray, k: int, ids: np.ndarray | None = None) -> Found:
        xq = matrix(xq, self._d)
        if ids is None:
            found = best(lambda width: self._near(xq, k, width, self._chosen), k, self._live, len(xq), self._ids)
        else:
            places = np.unique(self._of(ids))
            places = places[places >= 0]
            if len(places) <= _EXACT_ROWS or not self._scan.filters:
                found = self._scan.rows.search(xq, k, places, self._ids)
            else:
                chosen = np.zeros(len(self._ids), dtype=bool)
                chosen[places] = True
                found = best(lambda width: self._near(xq, k, width, chosen), k, len(places), len(xq), self._ids)
        return merged(found, self._tail.search(xq, k, ids), k) if self._tail.ntotal else found

    def _near(self, xq: np.ndarray, k: int, width: int, chosen: np.ndarray | None) -> Found:
        """As many of the best as were asked for: what looks at a part of the rows may have to look at more of them."""
        least = min(k, width)
        for effort in _EFFORTS:
            D, I = self._scan.search(xq, width, chosen, effort)  # noqa: E741
            if (I[:, :least] >= 0).all():
                return D, I
        return search(self._scan.rows.index, xq, width, chosen)

    # files

    @classmethod
    def build(cls, path: Path, recipe: Recipe, d: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Self:
        """An index of all `blocks` of (ids (n,), x (n, d)), at least one row, in files beside `path` of which nobody knows
        until it is saved; of an id that comes again the later row counts. Raises DiskFull, CollectionReadOnly."""
        seen: list[np.ndarray] = []

        def halves() -> Iterator[np.ndarray]:
            for ids, x in blocks:
                seen.append(ids)
                yield x.astype("<f2", copy=False)

        stem = _stem(path)
        rows_path = stem.with_name(f"{stem.name}.rows")
        try:
            column.append(rows_path, halves())
            ids = np.concatenate(seen)
            scan = SCANS[recipe.kind].build(Rows.mapped(rows_path, d, len(ids)), recipe, stem)
        except BaseException:
            for left in stem.parent.glob(f"{stem.name}.*"):
                left.unlink(missing_ok=True)
            raise
        _, last = np.unique(ids[::-1], return_index=True)
        dead = np.ones(len(ids), bool)
        dead[len(ids) - 1 - last] = False
        return cls(path, rows_path, d, ids, dead, scan)

    def absorb(self) -> None:
        """Bring what is in memory alone behind the rows on the disk; like what is built, nobody knows of it until `save`."""
        if not self._tail.ntotal:
            return
        new = self._tail.ids()
        column.append(self._rows_path, [self._tail.codes()], 2 * self._d * len(self._ids))
        ids = np.concatenate([self._ids, new])
        scan = self._scan.extended(Rows.mapped(self._rows_path, self._d, len(ids)), _stem(self._path))
        self._hold(ids, np.concatenate([self._dead, np.zeros(len(new), bool)]), scan)

    def save(self, path: Path) -> None:
        self.absorb()
        facts = {
            "uid": self.stamp.uid,
            "state": self.stamp.state,
            "kind": self.kind,
            "d": self._d,
            "ntotal": self.ntotal,
            "n": len(self._ids),
            "newer": self.newer,
            "rows": self._rows_path.name,
            "head": len(self._scan.head),
            "recipe": asdict(self.recipe),
            "scan": self._scan.facts,
        }
        with sealing(path, facts) as file:
            file.write(self._scan.head)
            file.write(self._ids.tobytes())
            file.write(np.packbits(self._dead).tobytes())
        column.remove_files(path, {self._rows_path.name, self._scan.facts.get("codes")})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index in `path`, rows and codes left on the disk. Raises IndexDamaged."""
        with unsealed(path) as (facts, file):
            n, d = facts["n"], facts["d"]
            head = file.read(facts["head"])
            ids = np.frombuffer(file.read(8 * n), np.int64)
            dead = np.unpackbits(np.frombuffer(file.read((n + 7) // 8), np.uint8), count=n).astype(bool)
        rows_path = path.with_name(facts["rows"])
        scan = SCANS[facts["kind"]](Rows.mapped(rows_path, d, n), Recipe(**facts["recipe"]), head, facts["scan"], path.parent)
        index = cls(path, rows_path, d, ids, dead, scan)
        index.stamp = Stamp(facts["uid"], facts["state"])
        return index

    def discard(self) -> None:
        """Remove the files of an index that was built and is not wanted; it cannot be used any more."""
        for name in (self._rows_path.name, self._scan.facts.get("codes")):
            if name is not None:
                self._path.with_name(name).unlink(missing_ok=True)

    def problems(self) -> list[str]:
        return self._scan.problems()


def _stem(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}")
