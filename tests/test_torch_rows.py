"""A scan by torch, on the processor: all but the product itself is what runs on a GPU."""

import os

import numpy as np
import pytest
import torch
from forked import assert_child_finds_the_same
from hypothesis import given, settings
from hypothesis import strategies as st

from e5v_search.index import torch_rows
from e5v_search.index.rows import Rows, quantiser, search, view
from e5v_search.index.torch_rows import TorchRows, devices


def held(n: int, d: int, seed: int = 0, values: int = 0) -> tuple[Rows, np.ndarray]:
    """Rows, and the same as float32; of few `values` scores tie."""
    rng = np.random.default_rng(seed)
    x = (rng.integers(-values, values + 1, (n, d)) if values else rng.standard_normal((n, d))).astype(np.float16)
    return Rows(view(quantiser(d), np.ascontiguousarray(x).view(np.uint8))), x.astype(np.float32)


@given(
    n=st.integers(1, 200),
    d=st.integers(1, 9),
    nq=st.integers(1, 5),
    width=st.integers(1, 250),
    parts=st.integers(1, 4),
    at_once=st.integers(1, 500),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(n: int, d: int, nq: int, width: int, parts: int, at_once: int, seed: int) -> None:
    rows, x = held(n, d, seed, values=2 if seed % 2 else 0)
    xq = np.random.default_rng(seed + 1).integers(-3, 4, (nq, d)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_rows, "_NUMBERS", at_once)
        D, I = TorchRows(rows, ["cpu"] * parts).search(xq, width)  # noqa: E741
    scores = xq.astype(np.float64) @ x.T.astype(np.float64)
    k = min(width, n)
    assert I.shape == (nq, k)
    np.testing.assert_allclose(D, -np.sort(-scores, axis=1)[:, :k], atol=1e-3 * d)
    np.testing.assert_allclose(D, np.take_along_axis(scores, I, axis=1), atol=1e-3 * d)
    assert all(len(set(places)) == k for places in I.tolist())


@pytest.mark.parametrize("n", [31, 32, 33, 5000])
def test_finds_what_the_processor_finds(n: int) -> None:
    rows, x = held(n, 64)
    xq = x[:7] + 0.1
    found = TorchRows(rows, ["cpu"] * 3).search(xq, 20)
    expected = search(rows.index, xq, 20)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("d", [7, 256, 4096])
def test_copies_score_the_same_to_the_bit_and_come_by_their_places(d: int) -> None:
    rng = np.random.default_rng(d)
    kinds = rng.standard_normal((3, d)).astype(np.float16)
    which = rng.integers(0, 3, 300)
    rows = Rows(view(quantiser(d), kinds[which].view(np.uint8)))
    D, I = TorchRows(rows, ["cpu"] * 2).search(rng.standard_normal((4, d)).astype(np.float32), 300)  # noqa: E741
    for scores, places in zip(D, I, strict=True):
        assert len(set(scores.tolist())) == 3
        assert all((np.diff(places[scores == score]) > 0).all() for score in scores)


def test_rows_that_fill_up_a_group_are_never_found() -> None:
    rows, x = held(33, 8)
    xq = -x[:1] * 0 - x.sum(axis=0, keepdims=True)
    assert (search(rows.index, xq, 33)[0] < 0).any()
    assert sorted(TorchRows(rows, ["cpu"]).search(xq, 33)[1][0].tolist()) == list(range(33))


FORKED = """
import numpy as np
from e5v_search.index.rows import Rows, quantiser, view
from e5v_search.index.torch_rows import TorchRows

rows = TorchRows(Rows(view(quantiser(8), np.ones((9, 8), np.float16).view(np.uint8))), ["cpu"] * 2)
def found():
    return [x.tolist() for x in rows.search(np.ones((1, 8), np.float32), 5)]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_searches_too() -> None:
    assert_child_finds_the_same(FORKED, threads=1)


def test_devices_are_those_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices() == ["cuda:0", "cuda:1"]
