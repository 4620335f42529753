"""The smallest parameters of an index that meet a target, measured on the collection itself against exact truth."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from e5v_search.catalog import VIEW, Catalog
from e5v_search.collection.core import Collection
from e5v_search.errors import CollectionNotFound, QueryError, UsageError
from e5v_search.index import KINDS, Index, MappedIndex, Recipe
from e5v_search.index.recipe import lists_for, read_bytes, resident_bytes

RECALL = 0.99  # asked for where nothing is said of it
QUERIES = 200
_CANDIDATES = (25, 50, 100, 200, 400, 800, 1600, 3200)
_PROBES = (4, 8, 16, 32, 64, 128, 256, 512)
_EF = (16, 32, 64, 128, 256, 512, 1024)
_TIMED = 40  # queries, one at a time
_ROUNDING = 1e-5  # of a score computed in single precision


@dataclass(frozen=True)
class Target:
    """What is asked of an index. None: whatever comes."""

    recall: float | None = None  # of the k nearest, found on average
    latency: float | None = None  # seconds for one query, median
    memory: int | None = None  # bytes that a search works in, rows that it re-ranks from the disk not counted

    def check(self) -> None:
        """Raises UsageError for what can never be met or means nothing."""
        if self.recall is None and self.latency is None and self.memory is None:
            raise UsageError("say what is to be met: a recall, a latency or a size of memory")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise UsageError(f"the recall must be above 0 and at most 1, not {self.recall:g}")
        if any(value is not None and value <= 0 for value in (self.latency, self.memory)):
            raise UsageError("a latency or a size of memory must be above 0")


@dataclass(frozen=True)
class Point:
    """A way to search, and what it was measured to give."""

    recipe: Recipe
    recall: float
    milliseconds: float
    bytes: int
    read: int  # bytes, by one search

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_json(),
            "recall": round(self.recall, 4),
            "ms": round(self.milliseconds, 3),
            "bytes": self.bytes,
        }


@dataclass
class Tuned:
    """All that was measured, and what was chosen; None if nothing meets the target, and nothing has been changed."""

    k: int
    queries: int
    points: list[Point] = field(default_factory=list)
    chosen: Point | None = None

    def to_json(self) -> dict[str, Any]:
        chosen = None if self.chosen is None else self.chosen.to_json()
        return {"k": self.k, "queries": self.queries, "points": [p.to_json() for p in self.points], "chosen": chosen}


def tune(
    collection: Collection,
    target: Target,
    k: int = 10,
    xq: np.ndarray | None = None,
    dry_run: bool = False,
    on_point: Callable[[Point], None] | None = None,
) -> Tuned:
    """Find the smallest parameters that meet the target and, unless `dry_run`, give the collection that index.

    The queries are `xq` (nq, d) or, without them, some of the stored vectors, each of which is then not to find itself.
    The kind of index in use is tried first, then those that fit into the memory, in the order of what they take to build;
    they are built beside the one in use. Raises UsageError, CollectionNotFound, CollectionBusy.
    """
    target.check()
    catalog = collection.catalog
    n, d = catalog.count_vectors(VIEW), catalog.dim
    if n < 2 or d is None:
        raise CollectionNotFound(f"collection {collection.path} holds too little to tune a search; see: e5v-search status")
    if collection.indexes.store:
        raise UsageError(
            "the index is in Milvus, whose parameters a recipe names (docs/cluster.md): try others with rebuild --recipe FILE"
        )
    k = min(k, n - 1)
    with collection.writing():
        collection.indexes.sync()
        in_use = collection.indexes.current()
        trial = _Trial(catalog, in_use.ids(), k, xq)
        tuned = Tuned(k, len(trial.xq))
        used = collection.indexes.recipe()[0]
        for kind in [used.kind, *(kind for kind in KINDS if kind != used.kind)]:
            recipe = used if kind == used.kind else Recipe(kind)  # type: ignore[arg-type]
            if target.memory is not None and resident_bytes(recipe, n, d) > target.memory:
                continue
            index = in_use if recipe is used else collection.indexes.made(recipe)
            before = index.recipe if isinstance(index, MappedIndex) else recipe
            try:
                for point in trial.points(index, recipe, n, d):
                    tuned.points.append(point)
                    if on_point is not None:
                        on_point(point)
                tuned.chosen = _best([p for p in tuned.points if p.recipe.kind == kind], target)
            finally:
                if isinstance(index, MappedIndex) and (tuned.chosen is None or dry_run):
                    if index is in_use:
                        index.search_as(before)
                    else:
                        index.discard()
            if tuned.chosen is not None:
                if not dry_run:
                    collection.indexes.adopt(index, tuned.chosen.recipe, _why(target, tuned))
                break
    return tuned


def _best(points: list[Point], target: Target) -> Point | None:
    """The smallest parameters that meet the target: those with which a search reads the least. Of equals the quickest."""
    recall = RECALL if target.recall is None else target.recall
    met = [p for p in points if p.recall >= recall and (target.latency is None or p.milliseconds <= 1e3 * target.latency)]
    return min(met, key=lambda p: (p.read, p.milliseconds), default=None)


def _why(target: Target, tuned: Tuned) -> str:
    assert tuned.chosen is not None
    asked = [f"recall {RECALL if target.recall is None else target.recall:g}"]
    asked += [f"{1e3 * target.latency:g} ms"] if target.latency is not None else []
    asked += [f"{target.memory / 1e6:,.0f} MB"] if target.memory is not None else []
    got = f"recall@{tuned.k} {tuned.chosen.recall:.4f} in {tuned.chosen.milliseconds:.2f} ms"
    return f"tuned for {', '.join(asked)}: {got} for {tuned.queries} queries"


class _Trial:
    """The queries, and how good the k-th best of each must be by an exact scan of the catalog."""

    def __init__(self, catalog: Catalog, ids: np.ndarray, k: int, xq: np.ndarray | None) -> None:
        self.k = k
        self.own = np.full((0 if xq is None else len(xq), 1), -1)  # the ids of the queries, where they are rows themselves
        if xq is None:
            self.own, xq = _some(catalog, ids)
        elif xq.ndim != 2 or xq.shape[1] != catalog.dim or not np.isfinite(xq).all() or not len(xq):
            raise QueryError(f"finite rows of {catalog.dim} numbers are needed as queries, not an array {xq.shape}")
        self.xq = np.ascontiguousarray(xq, np.float32)
        top = np.full((len(self.xq), k), -np.inf, np.float32)
        for block, x in catalog.vectors():
            D = np.where(block == self.own, -np.inf, self.xq @ x.astype(np.float32).T)
            top = np.partition(np.concatenate([top, D], axis=1), -k, axis=1)[:, -k:]
        self.least = top.min(axis=1)

    def points(self, index: Index, recipe: Recipe, n: int, d: int) -> Iterator[Point]:
        """The recipe's kind with parameters that grow."""
        for way in _ways(recipe, n, self.k):
            if isinstance(index, MappedIndex):
                index.search_as(way)
            D, I = index.search(self.xq, self.k + 1)  # noqa: E741
            # of copies, which score the same, any will do
            good = (self.least[:, None] - _ROUNDING <= D) & (self.own != I)
            recall = float(np.minimum(good.sum(axis=1), self.k).mean()) / self.k
            times = [_seconds(lambda x=x: index.search(x[None], self.k)) for x in self.xq[:_TIMED]]  # type: ignore[misc]
            yield Point(way, recall, 1e3 * float(np.median(times)), resident_bytes(way, n, d), read_bytes(way, n, d))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ways(recipe: Recipe, n: int, k: int) -> Iterator[Recipe]:
    candidates = [c for c in _CANDIDATES if k < c < 4 * n] or [k + 1]
    if recipe.kind == "one-bit":
        yield from (replace(recipe, candidates=c) for c in candidates)
    elif recipe.kind == "ivf":
        yield from (replace(recipe, probes=p, candidates=c) for p in _probes(recipe, n) for c in candidates[::2])
    elif recipe.kind == "gpu-ivf":
        yield from (replace(recipe, probes=p) for p in _probes(recipe, n))
    elif recipe.kind in ("hnsw", "gpu-cagra"):
        yield from (replace(recipe, ef=ef) for ef in _EF)
    else:
        yield recipe


def _probes(recipe: Recipe, n: int) -> list[int]:
    lists = recipe.lists or lists_for(n)
    return [p for p in _PROBES if p < lists] + [lists][: lists <= _PROBES[-1]]


def _some(catalog: Catalog, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids (nq, 1) and vectors (nq, d) of some of `ids`, evenly spread."""
    chosen = np.sort(ids)[np.unique(np.linspace(0, len(ids) - 1, min(QUERIES, len(ids))).astype(np.int64))]
    blocks = list(catalog.vectors(ids=chosen))
    return np.concatenate([b for b, _ in blocks])[:, None], np.concatenate([x for _, x in blocks]).astype(np.float32)
