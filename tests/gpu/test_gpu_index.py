"""Indexes on GPUs against the same rows in memory. Skipped, saying so, where FAISS, or torch, finds no GPU."""

import logging
from pathlib import Path

import faiss
import numpy as np
import pytest

from e5v_search.index import FlatIndex, Index, Recipe, Stamp, build, gpu_cagra, load
from e5v_search.index.torch_rows import devices

needs_faiss = pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs faiss-gpu and a CUDA device")
needs_cagra = pytest.mark.skipif(not hasattr(faiss, "GpuIndexCagra"), reason="needs faiss-gpu-cuvs")
needs_torch = pytest.mark.skipif(not devices(), reason="needs torch with CUDA, and a device")
pytestmark = pytest.mark.gpu


def clustered(n: int, d: int, seed: int) -> np.ndarray:
    """(n, d) float16 of length 1, in clusters as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((50, d), dtype=np.float32)
    x = centres[rng.integers(0, 50, n)] + rng.standard_normal((n, d), dtype=np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def both(folder: Path, kind: str, n: int, d: int) -> tuple[Index, FlatIndex]:
    ids, x = np.arange(n), clustered(n, d, 1)
    made = build(folder / "index.faiss", Recipe(kind), d, [(ids, x)])
    made.stamp = Stamp("u", 1)
    made.save(folder / "index.faiss")
    ours, exact = load(folder / "index.faiss"), FlatIndex.build(d, [(ids, x)])
    for index in (ours, exact):
        index.remove(ids[::7])
    return ours, exact


def equal(ours: Index, exact: FlatIndex, least: float) -> None:
    for nq, k in ((1, 10), (64, 100)):
        xq = clustered(nq, exact.d, 2).astype(np.float32)
        found, expected = ours.search(xq, k), exact.search(xq, k)
        pairs = zip(found[1].tolist(), expected[1].tolist(), strict=True)
        assert np.mean([len(set(a) & set(b)) / k for a, b in pairs]) >= least
        for x, scores, ids in zip(xq, *found, strict=True):
            np.testing.assert_allclose(exact.vectors(ids) @ x, scores, rtol=1e-4, atol=1e-4)


@needs_faiss
@pytest.mark.parametrize("d", [256, 4096])
@pytest.mark.parametrize(
    ("kind", "least"), [("gpu", 0.99), ("gpu-ivf", 0.99), pytest.param("gpu-cagra", 0.9, marks=needs_cagra)]
)
def test_finds_what_the_processor_finds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, least: float, d: int
) -> None:
    ours, exact = both(tmp_path, kind, 12_000, d)
    equal(ours, exact, least)
    for index in (ours, exact):
        index.put(np.arange(20_000, 20_500), clustered(500, d, 3))
    ours.save(tmp_path / "index.faiss")
    equal(load(tmp_path / "index.faiss"), exact, least)
    assert not caplog.records  # no step back to the processor


@needs_faiss
@needs_cagra
def test_links_of_several_parts_are_walked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As they are made by more GPUs than there are later on."""
    links = gpu_cagra._links
    with monkeypatch.context() as more:
        more.setattr(faiss, "get_num_gpus", lambda: 3)
        more.setattr(gpu_cagra, "_links", lambda number, rows, recipe: links(0, rows, recipe))
        made = build(tmp_path / "index.faiss", Recipe("gpu-cagra"), 256, [(np.arange(36_000), clustered(36_000, 256, 1))])
        made.stamp = Stamp("u", 1)
        made.save(tmp_path / "index.faiss")
    equal(load(tmp_path / "index.faiss"), FlatIndex.build(256, [(np.arange(36_000), clustered(36_000, 256, 1))]), 0.9)
    assert not caplog.records


@needs_torch
@pytest.mark.parametrize("d", [256, 4096])
def test_torch_finds_what_the_processor_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, d: int
) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with caplog.at_level(logging.INFO):
        equal(*both(tmp_path, "gpu", 12_000, d), 0.99)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["FAISS has no GPU"]
