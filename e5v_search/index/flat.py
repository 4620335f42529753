"""Rows in memory, scanned whole: exact, changed at will, and soon read from the disk as long as they are few."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.base import Found, Index, Places, Stamp, best, distinct, matrix
from e5v_search.index.library import faiss_errors, library, reason
from e5v_search.index.rows import Rows, quantiser, search
from e5v_search.index.sealed import CHUNK, IndexDamaged, sealing, unsealed

KIND = "flat-fp16"


class FlatIndex(Index):
    """All rows in memory. Its file is FAISS's own `IndexIDMap`, which a plain `faiss.read_index` reads too."""

    def __init__(self, index: Any, stamp: Stamp) -> None:
        self._index = index
        self._places: Places | None = None
        self.stamp = stamp

    @property
    def kind(self) -> str:
        return KIND

    @property
    def d(self) -> int:
        return int(self._index.d)

    @property
    def ntotal(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def empty(cls, d: int) -> Self:
        return cls(library().IndexIDMap(quantiser(d)), Stamp("", 0))

    @classmethod
    def build(cls, d: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Self:
        """An index of all `blocks` of (ids (n,), x (n, d)); of an id that comes again the later row counts."""
        index = cls.empty(d)
        seen: set[int] = set()
        for ids, x in blocks:
            block = ids.tolist()
            index.put(ids, x, new=seen.isdisjoint(block))
            seen.update(block)
        return index

    def put(self, ids: np.ndarray, x: np.ndarray, *, new: bool = False) -> None:
        x = matrix(x, self.d)
        ids = distinct(ids, len(x))
        if not new:
            self.remove(ids)
        self._places = None
        with faiss_errors():
            self._index.add_with_ids(x, ids)

    def remove(self, ids: np.ndarray) -> None:
        if len(ids) and self.ntotal:
            self._places = None
            with faiss_errors():
                self._index.remove_ids(np.ascontiguousarray(ids, dtype=np.int64))

    def ids(self) -> np.ndarray:
        return self._held().ids

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        places = self._held().of(ids)
        if (places < 0).any():
            raise KeyError(int(np.asarray(ids)[places < 0][0]))
        with faiss_errors():
            x: np.ndarray = self._index.index.reconstruct_batch(places)
        return x

    def codes(self) -> np.ndarray:
        """The rows (ntotal, 2 d) as bytes of float16, in the order of storage; not copied."""
        return self._rows().codes

    def _rows(self) -> Rows:
        return Rows(library().downcast_index(self._index.index))

    def _held(self) -> Places:
        if self._places is None:
            self._places = Places(library().vector_to_array(self._index.id_map))
        return self._places

    def search(self, xq: np.ndarray, k: int, ids: np.ndarray | None = None) -> Found:
        xq = matrix(xq, self.d)
        if ids is None:
            return best(lambda width: search(self._index, xq, width), k, self.ntotal, len(xq))
        places = np.unique(self._held().of(ids))
        return self._rows().search(xq, k, places[places >= 0], self._held().ids)

    def save(self, path: Path) -> None:
        faiss = library()
        facts = {"uid": self.stamp.uid, "state": self.stamp.state, "kind": KIND, "d": self.d, "ntotal": self.ntotal}
        with sealing(path, facts) as file, faiss_errors():
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(file.write, CHUNK))
        column.remove_files(path)  # those of an index of another kind that was there before

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index in `path`, all of it in memory. Raises IndexDamaged."""
        with unsealed(path) as (facts, file):
            faiss = library()
            try:
                index = faiss.read_index(faiss.PyCallbackIOReader(file.read, CHUNK))
            except RuntimeError as error:
                raise IndexDamaged(f"FAISS cannot read it: {reason(error)}") from error
        if (index.d, index.ntotal) != (facts["d"], facts["ntotal"]):
            raise IndexDamaged("it does not hold what its trailer says")
        return cls(index, Stamp(facts["uid"], facts["state"]))

    def problems(self) -> list[str]:
        return []  # all of it was looked at when it was read
