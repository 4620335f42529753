"""Every kind of index, through whatever happens to a collection, finds what sorting all vectors would give."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import Collection, indexes
from e5v_search.collection.indexes import Indexes
from e5v_search.errors import CollectionBusy, DiskFull
from e5v_search.index import FlatIndex, IndexDamaged, MappedIndex, Recipe, Stamp, build, by_size, load, read_facts

D = 24
# all rows are candidates: what is found must then be exactly the best
EXACT_WAYS = {
    "exact": Recipe("exact"),
    "one-bit": Recipe("one-bit", candidates=10_000, newer=3),
    "ivf": Recipe("ivf", candidates=10_000, lists=4, probes=4, newer=3),
    "ivf-few-probes": Recipe("ivf", candidates=10_000, lists=1, probes=1, newer=0),
    "hnsw": Recipe("hnsw", ef=10_000, newer=3),
}
MAPPED = [name for name in EXACT_WAYS if name != "exact"]


def rows(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    """(n, d) float16 of length 1, of low intrinsic dimension like real embeddings."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 6)) @ np.random.default_rng(99).standard_normal((6, d)) + 0.2 * rng.standard_normal((n, d))
    unit: np.ndarray = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    return unit


def brute_force(xb: dict[int, np.ndarray], xq: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, I) in float64, of equal scores the smaller id first."""
    ids = np.array(sorted(xb), dtype=np.int64)
    scores = xq.astype(np.float64) @ np.stack([xb[i] for i in ids.tolist()]).astype(np.float64).T
    order = np.argsort(-scores.round(6), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


def assert_best(found: tuple[np.ndarray, np.ndarray], xb: dict[int, np.ndarray], xq: np.ndarray, k: int) -> None:
    """The scores are those of brute force, and each id has the score that stands beside it."""
    D, ids = brute_force(xb, xq, k) if xb else (np.empty((len(xq), 0)), np.empty((len(xq), 0), np.int64))
    np.testing.assert_allclose(found[0], D, atol=1e-5)
    assert found[1].shape == ids.shape
    for n, row in enumerate(found[1].tolist()):
        assert len(set(row)) == len(row)
        own = [float(xb[i].astype(np.float64) @ xq[n].astype(np.float64)) for i in row]
        np.testing.assert_allclose(found[0][n], own, atol=1e-5)


class LikeADict(RuleBasedStateMachine):
    """Add, update, remove, search, save, rebuild by any recipe, reopen, lose or damage files: a dict knows the answer."""

    @initialize()
    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.catalog = Catalog.create(self.folder)
        self.catalog.bind("f", D, {})
        self.catalog.add_views(["cirr"])
        self.truth: dict[str, dict[int, np.ndarray]] = {VIEW: {}, "cirr": {}}
        self.made = 0
        self.held = False
        self.indexes = Indexes(self.catalog, self.lock)

    @contextmanager
    def lock(self) -> Iterator[None]:
        if self.held:
            raise CollectionBusy("another process is writing")
        yield

    def teardown(self) -> None:
        if hasattr(self, "catalog"):
            self.catalog.close()
            self._folder.cleanup()

    def _row(self, seed: int) -> np.ndarray:
        return rows(1, seed % 11)[0]  # few distinct rows, so that scores tie

    def _vectors(self, seed: int) -> dict[str, np.ndarray]:
        both = {VIEW: self._row(seed), "cirr": self._row(seed + 1)}
        return both if seed % 3 else {VIEW: both[VIEW]}

    def _note(self, item_id: int, vectors: dict[str, np.ndarray]) -> None:
        for view, held in self.truth.items():
            held.pop(item_id, None)
            if view in vectors:
                held[item_id] = vectors[view]

    @rule(seeds=st.lists(st.integers(0, 50), min_size=1, max_size=12))
    def add(self, seeds: list[int]) -> None:
        puts = []
        for seed in seeds:
            self.made += 1
            put = Put(kind="image", path=f"/{self.made}", content_hash=str(self.made), vectors=self._vectors(seed))
            puts.append(put)
        for item_id, seed in zip(self.catalog.commit(puts), seeds, strict=True):
            self._note(item_id, self._vectors(seed))

    @precondition(lambda self: self.truth[VIEW])
    @rule(pick=st.integers(0, 100), seed=st.integers(0, 50))
    def update(self, pick: int, seed: int) -> None:
        item_id = sorted(self.truth[VIEW])[pick % len(self.truth[VIEW])]
        put = Put(kind="image", path=f"/new{item_id}", content_hash="x", item_id=item_id, vectors=self._vectors(seed))
        self.catalog.commit([put])
        self._note(item_id, self._vectors(seed))

    @precondition(lambda self: self.truth[VIEW])
    @rule(picks=st.sets(st.integers(0, 100), max_size=5))
    def remove(self, picks: set[int]) -> None:
        gone = list({sorted(self.truth[VIEW])[pick % len(self.truth[VIEW])] for pick in picks})
        self.catalog.commit(gone=gone)
        for item_id in gone:
            self._note(item_id, {})

    @rule()
    def save(self) -> None:
        self.indexes.sync()
        assert not self.indexes.stale

    @rule(way=st.sampled_from([*EXACT_WAYS, "auto"]))
    def rebuild(self, way: str) -> None:
        chosen = None if way == "auto" else {"recipe": EXACT_WAYS[way].to_json(), "why": "a test"}
        self.catalog.choose_recipe(chosen)
        self.indexes.rebuild()

    @rule(way=st.sampled_from([*EXACT_WAYS]))
    def another_recipe(self, way: str) -> None:
        """The next save builds it beside the old one and swaps."""
        self.catalog.choose_recipe({"recipe": EXACT_WAYS[way].to_json(), "why": "a test"})

    @rule()
    def reopen(self) -> None:
        self.catalog.close()
        self.catalog = Catalog.open(self.folder)
        self.indexes = Indexes(self.catalog, self.lock)

    @rule(held=st.booleans())
    def someone_writes(self, held: bool) -> None:
        self.held = held

    @rule(pick=st.integers(0, 100), how=st.sampled_from(["lose", "cut"]))
    def damage(self, pick: int, how: str) -> None:
        files = sorted(self.folder.glob("index*"))
        if files:
            file = files[pick % len(files)]
            # a new file in its place, as a copy that has failed leaves it: those who have mapped the old one keep it
            data = file.read_bytes()
            file.unlink()
            if how == "cut":
                file.write_bytes(data[: len(data) // 2])
            self.indexes = Indexes(self.catalog, self.lock)

    @rule(k=st.integers(1, 12), share=st.integers(1, 4), seed=st.integers(0, 5))
    def search(self, k: int, share: int, seed: int) -> None:
        xq = rows(3, 1000 + seed).astype(np.float32)
        for view, truth in self.truth.items():
            index = self.indexes.current(view)
            assert sorted(index.ids().tolist()) == sorted(truth)
            assert index.ntotal == len(truth)
            assert_best(index.search(xq, k), truth, xq, k)
            some = {i: x for n, (i, x) in enumerate(sorted(truth.items())) if n % share == 0}
            wanted = np.array([*some, 10**6], np.int64)
            assert_best(index.search(xq, k, ids=wanted), some, xq, k)
            if some:
                np.testing.assert_array_equal(index.vectors(wanted[:-1]), np.stack(list(some.values())).astype(np.float32))

    @invariant()
    def no_file_is_left_over(self) -> None:
        if hasattr(self, "truth"):
            assert len(list(self.folder.glob("index*.rows"))) <= 2


LikeADict.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


class TestLikeADict(LikeADict.TestCase):
    @pytest.fixture(autouse=True)
    def _small_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(indexes, "_BEHIND", 7)
        monkeypatch.setattr(indexes, "_AT_ONCE", 4)
