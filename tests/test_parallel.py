import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e5v_search.parallel import ahead, windows


@given(st.lists(st.integers()), st.integers(1, 8), st.integers(1, 20))
def test_ahead_is_map_in_order(items: list[int], workers: int, depth: int) -> None:
    assert list(ahead(lambda x: x * 2, items, workers, depth)) == [x * 2 for x in items]


def test_ahead_never_holds_more_than_depth() -> None:
    taken: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for i in range(100):
            taken.append(i)
            yield i

    results = ahead(lambda x: x, source(), workers=4, depth=8)
    for i in range(20):
        assert next(results) == i
        assert len(taken) <= i + 1 + 8
    results.close()
    assert len(taken) < 40


def test_error_comes_where_its_result_would_and_threads_end() -> None:
    before = threading.active_count()
    results = ahead(lambda x: 1 // x, [1, 1, 0, 1], workers=2)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threading.active_count() == before


def test_source_is_read_by_the_caller_and_work_is_not() -> None:
    threads: dict[str, set[int]] = {"source": set(), "work": set()}

    def source():  # type: ignore[no-untyped-def]
        for i in range(10):
            threads["source"].add(threading.get_ident())
            yield i

    def work(x: int) -> int:
        time.sleep(0.001)
        threads["work"].add(threading.get_ident())
        return x

    list(ahead(work, source(), workers=2))
    assert threads["source"] == {threading.get_ident()}
    assert threading.get_ident() not in threads["work"]


@given(st.lists(st.integers()), st.integers(1, 10))
def test_windows_cover_everything_once(items: list[int], n: int) -> None:
    parts = list(windows(items, n))
    assert [x for part in parts for x in part] == items
    assert all(len(part) == n for part in parts[:-1])
    assert all(0 < len(part) <= n for part in parts)
