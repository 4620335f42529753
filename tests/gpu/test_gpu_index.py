"""The index on GPUs against the same rows in memory. Skipped, saying so, where FAISS finds no GPU."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from e5v_search.index import FlatIndex, Recipe, Stamp, build, load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs faiss-gpu and a CUDA device")]


@pytest.mark.parametrize("d", [256, 4096])
def test_equals_the_processor(tmp_path: Path, d: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, d)).astype(np.float32)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    ids = np.arange(5000)
    made = build(tmp_path / "index.faiss", Recipe("gpu"), d, [(ids, x)])
    made.stamp = Stamp("u", 1)
    made.save(tmp_path / "index.faiss")
    ours, exact = load(tmp_path / "index.faiss"), FlatIndex.build(d, [(ids, x)])
    for index in (ours, exact):
        index.remove(ids[::7])
    for nq, k in ((1, 10), (64, 100)):
        xq = rng.standard_normal((nq, d)).astype(np.float32)
        found, expected = ours.search(xq, k), exact.search(xq, k)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
        assert np.mean(found[1] == expected[1]) > 0.99
