"""Batches: what is cut, what goes side by side, and what torch's threads are afterwards."""

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e5v_search.backbones import batches
from e5v_search.backbones.batches import Batches


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def on_a_processor(tokens: int = 2048) -> Batches:
    made = Batches(torch.device("cpu"), lambda: 0)
    made.tokens = tokens
    return made


@given(st.lists(st.integers(1, 900), max_size=80), st.integers(1, 4000), st.integers(1, 9))
def test_every_row_is_in_one_list_within_the_budget(lengths: list[int], tokens: int, into: int) -> None:
    cut = list(on_a_processor(tokens).cut(range(len(lengths)), lambda i: lengths[i], into))
    assert sorted(i for some in cut for i in some) == list(range(len(lengths)))
    for some in cut:
        longest = max(lengths[i] for i in some)
        assert len(some) == 1 or len(some) * longest <= tokens
        assert longest == lengths[some[0]]


@pytest.mark.parametrize(
    ("n", "length", "into", "sizes"),
    [
        (32, 223, 2, [8, 8, 8, 8]),  # 2,048 tokens would be nine rows, and leave one core with five
        (64, 32, 2, [32, 32]),
        (20, 32, 2, [20]),  # too little to be worth while
        (20, 32, 1, [20]),
        (3, 1435, 2, [1, 1, 1]),
        (100, 32, 4, [25, 25, 25, 25]),
    ],
)
def test_what_there_is_to_do_is_dealt_out_evenly(n: int, length: int, into: int, sizes: list[int]) -> None:
    assert [len(some) for some in on_a_processor().cut(range(n), lambda _: length, into)] == sizes


def test_a_row_much_shorter_than_the_first_begins_a_list_when_there_is_enough_in_the_one_before() -> None:
    lengths = [100] * 2 + [95] + [50] * 5 + [40] * 3  # 2,048 tokens, of which one in eight is enough
    assert [len(some) for some in on_a_processor().cut(lengths, lambda n: n)] == [3, 8 - 3 + 1, 2]


@given(st.lists(st.integers(1, 900), max_size=80), st.integers(1, 4000))
def test_packed_lists_are_as_full_as_the_budget_allows(lengths: list[int], tokens: int) -> None:
    batches = on_a_processor(tokens)
    batches.packed = True
    cut = [[lengths[i] for i in some] for some in batches.cut(range(len(lengths)), lambda i: lengths[i])]
    assert [n for some in cut for n in some] == sorted(lengths, reverse=True)
    assert all(len(some) == 1 or sum(some) <= tokens for some in cut)
    assert all(sum(some) + after[0] > tokens for some, after in pairwise(cut))


def test_two_batches_are_under_way_at_a_time_with_a_thread_each(two_threads: None) -> None:
    both = threading.Barrier(2, timeout=60)
    threads = []

    def forward(rows: list[int]) -> list[int]:
        both.wait()  # for ever alone, were the other one behind this one
        threads.append(torch.get_num_threads())
        return [10 * row for row in rows]

    assert on_a_processor().run([3, 1, 2, 4], lambda _: 1100, forward) == [30, 10, 20, 40]
    assert threads == [1, 1, 1, 1]
    assert torch.get_num_threads() == 2


def test_a_single_batch_has_all_threads(two_threads: None) -> None:
    def forward(rows: list[int]) -> list[tuple[int, str]]:
        return [(torch.get_num_threads(), threading.current_thread().name) for _ in rows]

    assert on_a_processor().run([1, 2], lambda _: 100, forward) == [(2, threading.current_thread().name)] * 2


def test_an_error_of_one_batch_comes_through(two_threads: None) -> None:
    def forward(rows: list[int]) -> list[int]:
        if 7 in rows:
            raise ValueError("seven")
        return rows

    with pytest.raises(ValueError, match="seven"):
        on_a_processor().run(list(range(20)), lambda _: 1000, forward)
    assert torch.get_num_threads() == 2


def test_side_by_side_equals_one_after_the_other(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((int(n), 16)).astype(np.float32) for n in rng.integers(1, 700, 40)]
    w = torch.from_numpy(rng.standard_normal((16, 8)).astype(np.float32))

    def forward(some: list[np.ndarray]) -> list[np.ndarray]:
        return [(torch.from_numpy(row) @ w).sum(0).numpy() for row in some]

    abreast = on_a_processor().embed(rows, len, forward, 8)
    monkeypatch.setattr(batches, "_ABREAST", 1)
    np.testing.assert_allclose(abreast, on_a_processor().embed(rows, len, forward, 8), atol=1e-6)


def test_two_batches_go_to_a_device_at_a_time_where_that_keeps_it_busy() -> None:
    both, names = threading.Barrier(2, timeout=60), set()

    def forward(rows: list[int]) -> list[int]:
        both.wait()
        names.add(threading.current_thread().name)
        return [10 * row for row in rows]

    device = Batches(torch.device("cuda"), lambda: 0, abreast=2)
    device.tokens = 200
    assert device.run([3, 1, 2, 4], lambda _: 100, forward) == [30, 10, 20, 40]
    assert len(names) == 2
    one = device.run([1, 2], lambda _: 100, lambda rows: [threading.current_thread().name for _ in rows])
    assert one == [threading.current_thread().name] * 2  # a single batch is worth no thread


def test_batches_that_were_cut_before_memory_ran_out_do_not_halve_them_again() -> None:
    device = Batches(torch.device("cuda"), lambda: 0, abreast=2)
    device.tokens = 400

    def forward(rows: list[int]) -> list[int]:
        if len(rows) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return rows

    assert device.run(list(range(16)), lambda _: 100, forward) == list(range(16))
    assert device.tokens == 200
