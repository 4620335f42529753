"""Rows on GPUs. What FAISS does there stands in for itself on the processor; what is around it is as it runs everywhere."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from e5v_search.index import FlatIndex, Index, Recipe, Stamp, build, gpu, load

D = 24


def rows(n: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, D))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(params=[1, 3])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """So many; and which of them were asked for."""
    asked: list[int] = []

    def flat(number: int, d: int) -> faiss.IndexFlatIP:
        asked.append(number)
        return faiss.IndexFlatIP(d)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: request.param)
    monkeypatch.setattr(gpu, "_flat", flat)
    monkeypatch.setattr(gpu, "BLOCK", 100)
    return asked


def both(folder: Path, n: int) -> tuple[Index, FlatIndex]:
    """The same rows on GPUs, saved and opened again, and in memory."""
    ids, x = np.arange(5, n + 5), rows(n, 1)
    made = build(folder / "index.faiss", Recipe("gpu"), D, [(ids[:300], x[:300]), (ids[300:], x[300:])])
    made.stamp = Stamp("u", 1)
    made.save(folder / "index.faiss")
    return load(folder / "index.faiss"), FlatIndex.build(D, [(ids, x)])


def same(ours: Index, exact: FlatIndex, k: int = 10, ids: np.ndarray | None = None) -> None:
    xq = rows(5, 77).astype(np.float32)
    found, expected = ours.search(xq, k, ids), exact.search(xq, k, ids)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_finds_what_a_scan_finds_through_changes(tmp_path: Path, gpus: list[int]) -> None:
    ours, exact = both(tmp_path, 1000)
    assert ours.kind == "gpu"
    assert sorted(set(gpus)) == list(range(len(set(gpus))))
    same(ours, exact)
    same(ours, exact, k=1000)
    same(ours, exact, ids=np.arange(5, 900, 3))
    gone = np.arange(5, 805)
    for index in (ours, exact):
        index.remove(gone)  # most of the rows that a GPU still has
        index.put(np.arange(2000, 2050), rows(50, 2))
    same(ours, exact)
    ours.save(tmp_path / "index.faiss")
    same(load(tmp_path / "index.faiss"), exact, k=40)
    assert load(tmp_path / "index.faiss").problems() == []


def test_each_gpu_has_its_share(tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, list[int]] = {}
    flat = gpu._flat

    def counted(number: int, d: int) -> faiss.IndexFlatIP:
        index = flat(number, d)
        add = index.add
        index.add = lambda x: (sizes.setdefault(number, []).append(len(x)), add(x))
        return index

    monkeypatch.setattr(gpu, "_flat", counted)
    n = faiss.get_num_gpus()
    build(tmp_path / "index.faiss", Recipe("gpu"), D, [(np.arange(1000), rows(1000, 1))])
    assert [sum(sizes[number]) for number in range(n)] == [1000 // n + (n == 3 and number == 2) for number in range(n)]
    assert max(size for of_one in sizes.values() for size in of_one) <= 100


def test_without_a_gpu_the_rows_are_scanned_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    same(*both(tmp_path, 1000))
    assert {r.getMessage() for r in caplog.records} == {
        "there is no GPU that FAISS can use: the rows of the index are scanned on the processor"
    }


def test_a_gpu_that_is_full(
    tmp_path: Path, gpus: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(faiss.IndexFlatIP):
        def add(self, x: np.ndarray) -> None:
            raise RuntimeError("Error: 'err == cudaSuccess' failed: out of memory\nand more")

    monkeypatch.setattr(gpu, "_flat", lambda number, d: Full(d))
    same(*both(tmp_path, 1000))
    assert "do not go onto the GPU (Error: 'err == cudaSuccess' failed: out of memory)" in caplog.text
