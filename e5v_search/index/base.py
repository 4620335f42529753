"""What every index can do, whatever it is made of."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.filters import Filter
from e5v_search.index.sealed import IndexDamaged

__all__ = ["Found", "Index", "IndexDamaged", "Places", "Stamp", "best", "matrix", "merged"]

Found = tuple[np.ndarray, np.ndarray]  # D (nq, k) float32 scores, I (nq, k) int64 ids or places


@dataclass(frozen=True)
class Stamp:
    """What an index holds: everything that the catalog `uid` held when it had reached `state`.

    One that is being filled holds of the state after that the rows of the items up to `item`.
    """

    uid: str
    state: int
    item: int = -1


class Index(ABC):
    """Rows of half precision; the score of a row is its inner product with the query.

    xb (n, d) are rows, xq (nq, d) queries, D (nq, k) scores, I (nq, k) ids. Searches may run in several threads at once;
    changes may not run beside anything else.
    """

    stamp: Stamp
    most = sys.maxsize  # rows that one search can find

    @property
    @abstractmethod
    def kind(self) -> str:
        """What `status` calls it."""

    @property
    @abstractmethod
    def d(self) -> int: ...

    @property
    @abstractmethod
    def ntotal(self) -> int:
        """Number of rows that can be found."""

    @abstractmethod
    def put(self, ids: np.ndarray, x: np.ndarray, *, new: bool = False) -> None:
        """Add rows x (n, d) under distinct ids (n,), in place of those they had. `new`: the caller knows that they had none."""

    @abstractmethod
    def remove(self, ids: np.ndarray) -> None:
        """Remove the rows of these ids (n,); ids that are not there are passed over."""

    @abstractmethod
    def ids(self) -> np.ndarray:
        """(ntotal,) int64, in the order of storage; not to be written to."""

    def sample(self, n: int) -> np.ndarray:
        """Ids (m,) of about n rows, drawn from all."""
        ids = self.ids()
        return np.unique(np.random.default_rng(0).choice(ids, min(n, len(ids)), replace=len(ids) > 50 * n))

    @abstractmethod
    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The rows (n, d) float32 of ids (n,). Raises KeyError for one that is not there."""

    @abstractmethod
    def search(self, xq: np.ndarray, k: int, ids: np.ndarray | None = None) -> Found:
        """The k best rows for each query, among `ids` only where given: D float32, I int64, both (nq, k).

        Best first, of equal scores the smaller id first. With fewer than k rows to choose from there are as many columns
        as rows; nothing is padded. A row scores the same whichever way it is found.
        """

    def search_where(self, xq: np.ndarray, k: int, where: Filter) -> Found | None:
        """As `search`, among the rows of the items that pass; None where the index does not know what the filter asks for."""
        return None

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the index to `path`, wholly or not at all: what was there stays until the new one is on the disk.

        Raises DiskFull, CollectionReadOnly, CollectionError.
        """

    @abstractmethod
    def problems(self) -> list[str]:
        """What is wrong with what it holds on the disk and does not look at when it is opened; reads all of it."""


class Places:
    """Where each id's row is stored."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        ascending = bool((ids[1:] > ids[:-1]).all())
        # what was only ever added to, as most collections are, needs no sorting
        self._order = None if ascending else np.argsort(ids)
        self._sorted = ids if self._order is None else ids[self._order]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The place (n,) int64 of each of ids (n,), -1 for what is not there."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._sorted, ids), len(self.ids) - 1)
        return np.where(self._sorted[at] == ids, at if self._order is None else self._order[at], -1)


def matrix(x: np.ndarray, d: int) -> np.ndarray:
    """x as C-contiguous float32 (n, d). Raises ValueError."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"rows of {d} numbers are needed, not an array {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("a row holds a number that is not finite")
    return x


def distinct(ids: np.ndarray, n: int) -> np.ndarray:
    """ids as int64 (n,), each once. Raises ValueError."""
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    if ids.shape != (n,) or len(np.unique(ids)) != n:
        raise ValueError(f"{n} rows need as many distinct ids, not {ids.shape}")
    return ids


def best(search: Callable[[int], Found], k: int, candidates: int, nq: int, names: np.ndarray | None = None) -> Found:
    """The k best of what `search(width)` finds, best first, of equal scores the smaller id first.

    There are `candidates` rows to choose from; `names` are their ids, where `search` gives places.
    """
    k = min(k, candidates)
    if k < 1 or not nq:
        return np.empty((nq, 0), np.float32), np.empty((nq, 0), np.int64)
    width = k
    tied = True
    while tied:
        # copies of a photo score the same: look on until the last score that counts has no further equals
        width = min(4 * width if width > k else k + 1, candidates)
        D, I = search(width)  # noqa: E741
        tied = width < candidates and bool((D[:, k - 1] == D[:, -1]).any())
    return _first(D, I if names is None else names[I], k)


def merged(one: Found, other: Found, k: int) -> Found:
    """The k best of two findings."""
    D, I = (np.concatenate(parts, axis=1) for parts in zip(one, other, strict=True))  # noqa: E741
    return _first(D, I, k)


def _first(D: np.ndarray, I: np.ndarray, k: int) -> Found:  # noqa: E741
    order: Any = np.lexsort((I, -D), axis=-1)[:, :k]
    return np.take_along_axis(D, order, axis=1), np.take_along_axis(I, order, axis=1)
