"""A filtered search gives what sorting all that passes would give, whatever share that is and whichever way it is found."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e5v_search.catalog import VIEW, Catalog, Put
from e5v_search.collection import narrow
from e5v_search.filters import EVERYTHING, parse
from e5v_search.index import FlatIndex, Index, Stamp

N, DIM = 20_000, 16
CAMERAS = ["Canon EOS 5D", "NIKON D90", "SONY ILCE-7", "Leica M"]


def unit(x: np.ndarray) -> np.ndarray:
    rows: np.ndarray = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Catalog, Index, np.ndarray, np.ndarray]]:
    """A catalog, its index, and all that they hold: ids (n,) and rows (n, DIM). Of few distinct rows, so that many tie."""
    rng = np.random.default_rng(0)
    xb = unit(rng.standard_normal((N // 4, DIM)))[rng.integers(0, N // 4, N)]
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as catalog:
        catalog.bind("m", DIM, {})
        puts = [
            Put(
                kind="image" if n % 10 else "text",
                content_hash=str(n),
                path=f"/p/{n % 100:03d}/{n}.jpg",
                size=n,
                width=n % 1000,
                height=100,
                camera=CAMERAS[0 if n % 10_000 == 77 else 1 + n % 3],
                text=None if n % 10 else f"text {n}",
                facts={} if n % 10 else {"stars": n % 50},
                vectors={VIEW: x},
            )
            for n, x in enumerate(xb.astype(np.float32))
        ]
        ids = np.array(catalog.commit(puts))
        index = FlatIndex.build(DIM, catalog.vectors())
        index.stamp = Stamp(catalog.uid, catalog.state)
        yield catalog, index, ids, xb


FILTERS = {
    "camera~canon": lambda n: n % 10_000 == 77,  # 0.01 %
    "folder=007": lambda n: n % 100 == 7,  # 1 %
    "width<500": lambda n: n % 1000 < 500,  # 50 %
    "kind=image": lambda n: n % 10 > 0,
    "not kind=image": lambda n: n % 10 == 0,
    "text~'text 7'": lambda n: n % 10 == 0 and str(n).startswith("7"),
    "size>=19999": lambda n: n == N - 1,
    "size>=20000": lambda n: False,
    "width<500 and camera~nikon": lambda n: n % 1000 < 500 and n % 3 == 0 and n % 10_000 != 77,
    "width<500 and width>=500": lambda n: False,
    "facts.stars>=25 or folder=0*": lambda n: (n % 10 == 0 and n % 50 >= 25) or n % 100 < 100,
    "has path": lambda n: True,
}


def brute_force(ids: np.ndarray, xb: np.ndarray, xq: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = xb.astype(np.float64) @ xq.astype(np.float64)
    order = np.lexsort((ids, -scores))[:k]
    return scores[order], ids[order]


def queries(n: int, seed: int) -> np.ndarray:
    xq: np.ndarray = unit(np.random.default_rng(seed).standard_normal((n, DIM))).astype(np.float32)
    return xq


@pytest.mark.parametrize("k", [1, 10, 300, 3 * N])
@pytest.mark.parametrize("expression", FILTERS)
def test_the_best_of_what_passes(place: Any, expression: str, k: int) -> None:
    catalog, index, ids, xb = place
    passes = np.array([FILTERS[expression](n) for n in range(N)])
    for xq in queries(3, k):
        D, I = narrow.search(index, catalog, xq, k, parse([expression]))  # noqa: E741
        truth = brute_force(ids[passes], xb[passes], xq, k)
        assert (D.dtype, I.dtype) == (np.float32, np.int64)
        assert I.tolist() == truth[1].tolist()
        np.testing.assert_allclose(D, truth[0], atol=1e-5)


@pytest.mark.parametrize("k", [1, 50, 5000])
def test_scores_are_those_of_the_search_without_a_filter(place: Any, k: int) -> None:
    catalog, index, _, _ = place
    for xq in queries(2, 9):
        all_scores = dict(zip(*(a[0].tolist() for a in reversed(index.search(xq[None], N))), strict=True))
        for expression in FILTERS:
            D, I = narrow.search(index, catalog, xq, k, parse([expression]))  # noqa: E741
            assert [all_scores[i] for i in I.tolist()] == D.tolist(), expression


@pytest.mark.parametrize("check", [0, 10**9])
def test_both_ways_find_the_same(place: Any, monkeypatch: pytest.MonkeyPatch, check: int) -> None:
    catalog, index, ids, xb = place
    monkeypatch.setattr(narrow, "_CHECK", check)  # candidates are free, or dear beyond measure
    for expression, test in FILTERS.items():
        passes = np.array([test(n) for n in range(N)])
        (xq,) = queries(1, 3)
        found = narrow.search(index, catalog, xq, 20, parse([expression]))[1]
        assert found.tolist() == brute_force(ids[passes], xb[passes], xq, 20)[1].tolist(), expression


def test_what_passes_lies_far_from_the_query(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As photos do from a text query among texts: all candidates fail, however large the share that passes."""
    rng = np.random.default_rng(1)
    n = 4000
    xb = 0.1 * rng.standard_normal((n, DIM))
    xb[:, 0] += np.where(np.arange(n) % 2, 1.0, -1.0)
    xb = unit(xb)
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as catalog:
        catalog.bind("m", DIM, {})
        kinds = ["image", "text"]
        puts = [
            Put(kind=kinds[i % 2], content_hash=str(i), path=f"/p/{i}", vectors={VIEW: xb[i].astype(np.float32)})
            for i in range(n)
        ]
        ids = np.array(catalog.commit(puts))
        index = FlatIndex.build(DIM, catalog.vectors())
        xq = np.eye(DIM, dtype=np.float32)[0]
        D, I = narrow.search(index, catalog, xq, 10, parse(["kind=image"]))  # noqa: E741
        assert I.tolist() == brute_force(ids[::2], xb[::2], xq, 10)[1].tolist()
        assert D.max() < 0


@pytest.mark.parametrize("expression", [None, "kind=image", "width<500", "folder=007", "camera~canon"])
def test_what_was_forgotten_takes_no_ones_place(tmp_path_factory: pytest.TempPathFactory, expression: str | None) -> None:
    n = 3000
    xb = unit(np.random.default_rng(2).standard_normal((n, DIM)))
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as catalog:
        catalog.bind("m", DIM, {})
        puts = [
            Put(
                kind="image",
                content_hash=str(i),
                path=f"/p/{i % 100:03d}/{i}",
                width=i % 1000,
                camera="Canon" if i % 50 == 0 else None,
                vectors={VIEW: xb[i].astype(np.float32)},
            )
            for i in range(n)
        ]
        ids = np.array(catalog.commit(puts))
        index = FlatIndex.build(DIM, catalog.vectors())
        (xq,) = queries(1, 5)
        where = EVERYTHING if expression is None else parse([expression])
        best = narrow.search(index, catalog, xq, 60, where)[1]
        catalog.commit(gone=best[:40].tolist())
        left = np.isin(ids, catalog.select(where))
        found = narrow.search(index, catalog, xq, 20, where)[1]
        assert found.tolist() == brute_force(ids[left], xb[left], xq, 20)[1].tolist()
        assert not set(found.tolist()) & set(best[:40].tolist())


def test_an_empty_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as catalog:
        for where in (EVERYTHING, parse(["kind=image"])):
            D, I = narrow.search(FlatIndex.empty(DIM), catalog, np.ones(DIM, np.float32), 5, where)  # noqa: E741
            assert (len(D), len(I)) == (0, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40), st.integers(1, 12), st.data())
def test_small_collections(tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, bool]], k: int, data: Any) -> None:
    rows = unit(np.random.default_rng(4).standard_normal((7, DIM)))
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as catalog:
        catalog.bind("m", DIM, {})
        puts = [
            Put(kind="image" if image else "text", content_hash="h", text="t", vectors={VIEW: rows[row].astype(np.float32)})
            for row, image in made
        ]
        ids = np.array(catalog.commit(puts), dtype=np.int64)
        index = FlatIndex.build(DIM, catalog.vectors())
        gone = data.draw(st.lists(st.sampled_from(ids.tolist()), unique=True)) if made else []
        catalog.commit(gone=gone)
        (xq,) = queries(1, 6)
        for expression, wanted in (("kind=image", {True}), ("kind=text", {False}), ("has text", {True, False})):
            chosen = np.array([image in wanted and i not in gone for i, (_, image) in zip(ids, made, strict=True)], dtype=bool)
            xb = np.array([rows[row] for row, _ in made]).reshape(-1, DIM)
            found = narrow.search(index, catalog, xq, k, parse([expression]))[1]
            assert found.tolist() == brute_force(ids[chosen], xb[chosen], xq, k)[1].tolist()
