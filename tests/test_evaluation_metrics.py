"""Metrics against rankings worked out by hand, against plain formulas, and against SciPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from e5v_search.evaluation import ranks
from e5v_search.evaluation.bootstrap import intervals, paired
from e5v_search.evaluation.metrics import Outcome, Ranked, Rated, spearman
from e5v_search.evaluation.ranks import positive_ranks, ranks_both_ways, score_ranks, top


def once(part: Ranked | Rated) -> dict[str, float]:
    return part.values(np.ones(part.n))


# Four queries over five items. In words, best first:
# query 0: item 2 (right), 0, 1, 3, 4                      right item at rank 1
# query 1: 4, 3 (right), 0, 1, 2 (right)                   right items at ranks 2 and 5
# query 2: 0 and 1 tie, 1 is right; then 2, 3, 4           a tie counts against us: rank 2
# query 3: everything ties, 0 and 4 are right              behind the three wrong ones: ranks 4 and 5
SCORES = np.array([[0.8, 0.7, 0.9, 0.1, 0.0], [0.5, 0.4, 0.1, 0.6, 0.9], [0.7, 0.7, 0.3, 0.2, 0.1], [0.5] * 5], np.float32)
RIGHT = [(2,), (2, 3), (1,), (0, 4)]


def test_ranks_by_hand() -> None:
    assert score_ranks(SCORES, RIGHT).tolist() == [[1, 0], [2, 5], [2, 0], [4, 5]]


def test_masked_items_are_no_candidates() -> None:
    # without item 4 query 1 finds item 3 first and item 2 last of four; without its rival query 2 wins its tie
    assert score_ranks(SCORES, RIGHT, [(), (4,), (0,), (1, 2, 3)]).tolist() == [[1, 0], [1, 4], [1, 0], [1, 2]]


def test_metrics_by_hand() -> None:
    values = once(Ranked(score_ranks(SCORES, RIGHT), ks=(1, 2, 4, 5)))
    third, fourth, fifth, sixth = (1 / math.log2(n) for n in (3, 4, 5, 6))
    expected = {
        "r@1": 1 / 4,
        "r@2": 3 / 4,
        "r@4": 1,
        "r@5": 1,
        "fraction@1": (1 + 0 + 0 + 0) / 4,
        "fraction@2": (1 + 1 / 2 + 1 + 0) / 4,
        "fraction@4": (1 + 1 / 2 + 1 + 1 / 2) / 4,
        "fraction@5": 1,
        "mrr": (1 + 1 / 2 + 1 / 2 + 1 / 4) / 4,
        "ndcg@10": (1 + (third + sixth) / (1 + third) + third + (fifth + sixth) / (1 + third)) / 4,
    }
    assert fourth == 0.5
    assert values.pop("median_rank") == 2
    assert values == pytest.approx({name: 100 * value for name, value in expected.items()}, abs=1e-12)


def test_ndcg_ideal_stops_at_ten() -> None:
    everything_right = Ranked(np.arange(1, 13)[None])
    assert once(everything_right)["ndcg@10"] == pytest.approx(100)


def test_a_query_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="query 1"):
        score_ranks(SCORES[:2], [(0,), ()])
    with pytest.raises(ValueError, match="masked"):
        score_ranks(SCORES[:1], [(0,)], [(0,)])


def plain_ranks(row: np.ndarray, right: set[int], hidden: set[int]) -> list[int]:
    """By sorting: wrong items before right ones of the same score."""
    order = sorted((i for i in range(len(row)) if i not in hidden), key=lambda i: (-row[i], i in right))
    return [rank for rank, i in enumerate(order, 1) if i in right]


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, ...]], list[tuple[int, ...]]]:
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    few = st.integers(0, 4)  # few different scores: many ties
    scores = np.array(draw(st.lists(st.lists(few, min_size=m, max_size=m), min_size=n, max_size=n)), np.float32)
    right, hidden = [], []
    for _ in range(n):
        own = draw(st.sets(st.integers(0, m - 1), min_size=1, max_size=4))
        right.append(tuple(sorted(own)))
        hidden.append(tuple(sorted(draw(st.sets(st.integers(0, m - 1), max_size=3)) - own)))
    return scores, right, hidden


@settings(max_examples=200, deadline=None)
@given(rankings())
def test_against_plain_python(case: tuple[np.ndarray, list[tuple[int, ...]], list[tuple[int, ...]]]) -> None:
    scores, right, hidden = case
    found = score_ranks(scores, right, hidden)
    plain = [plain_ranks(row, set(own), set(out)) for row, own, out in zip(scores, right, hidden, strict=True)]
    assert [[rank for rank in row if rank] for row in found.tolist()] == plain
    values = once(Ranked(found))
    for k in (1, 5, 10):
        assert abs(values[f"r@{k}"] / 100 - np.mean([any(r <= k for r in row) for row in plain])) < 1e-12
        fractions = [sum(r <= k for r in row) / len(row) for row in plain]
        assert abs(values.get(f"fraction@{k}", values[f"r@{k}"]) / 100 - np.mean(fractions)) < 1e-12
    gains = [sum(1 / math.log2(r + 1) for r in row if r <= 10) for row in plain]
    best = [sum(1 / math.log2(r + 2) for r in range(min(len(row), 10))) for row in plain]
    assert abs(values["ndcg@10"] / 100 - np.mean(np.divide(gains, best))) < 1e-12
    assert abs(values["mrr"] / 100 - np.mean([1 / row[0] for row in plain])) < 1e-12
    assert values["median_rank"] == np.median([row[0] for row in plain])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    xq, xb = rng.integers(-2, 3, (90, 4)).astype(np.float32), rng.integers(-2, 3, (50, 4)).astype(np.float32)
    right = [tuple(rng.choice(50, rng.integers(1, 4), replace=False)) for _ in range(90)]
    whole = score_ranks(xq @ xb.T, right)
    for queries in (1, 7, 90):
        monkeypatch.setattr(ranks, "QUERIES", queries)
        monkeypatch.setattr(ranks, "SCORES", 0)
        assert (positive_ranks(xq, xb, right) == whole).all()


@st.composite
def partners(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """Whole numbers, so that scores are exact and often tie; partners anywhere, of a and of b from none to several."""
    n, m = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    xa, xb = (rng.integers(-1, 2, (size, 3)).astype(np.float32) for size in (n, m))
    own = draw(st.lists(st.sets(st.integers(0, m - 1), max_size=4).map(sorted).map(tuple), min_size=n, max_size=n))
    return xa, xb, own


@settings(max_examples=150, deadline=None)
@given(partners(), st.sampled_from([1, 4, 30, 10_000]), st.sampled_from([1, 3]))
def test_both_ways_at_once_is_either_way_alone(
    case: tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]], tile: int, rows: int
) -> None:
    xa, xb, own = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "TILE", tile)
        patch.setattr(ranks, "QUERIES", rows)
        there, back = ranks_both_ways(xa, xb, own)
    of_b = [[i for i, some in enumerate(own) if j in some] for j in range(len(xb))]
    for found, scores, right in ((there, xa @ xb.T, own), (back, xb @ xa.T, of_b)):
        plain = [plain_ranks(row, set(some), set()) for row, some in zip(scores, right, strict=True)]
        assert [[rank for rank in row if rank] for row in found.tolist()] == plain
        assert found.shape == (len(right), max(map(len, right)))


def test_scores_that_differ_by_rounding_alone_tie() -> None:
    """Rows of ±1 made to length 1: a score is a number of agreements, which products in float32 round in several ways."""
    rng = np.random.default_rng(0)
    signs_b = rng.choice([-1, 1], (300, 40))
    signs_a = np.repeat(signs_b, 5, axis=0) * rng.choice([-1, 1], (1500, 40), p=[0.3, 0.7])
    xa, xb = ((signs / np.sqrt(40)).astype(np.float32) for signs in (signs_a, signs_b))
    scores = xa @ xb.T
    assert len(np.unique(scores)) > len(np.unique(signs_a @ signs_b.T))
    for order in (np.arange(1500), rng.permutation(1500)):
        owners = [(int(i // 5),) for i in order]
        captions = [tuple(np.flatnonzero(order // 5 == i)) for i in range(300)]
        exact = signs_a[order] @ signs_b.T
        expected = score_ranks(exact, owners), score_ranks(exact.T, captions)
        assert (positive_ranks(xa[order], xb, owners) == expected[0]).all()
        assert (positive_ranks(xb, xa[order], captions) == expected[1]).all()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "TILE", 20_000)
            there, back = ranks_both_ways(xa[order], xb, owners)
        assert (there == expected[0]).all()
        assert (back == expected[1]).all()


def test_collapsed_vectors_find_nothing() -> None:
    x = np.ones((20, 3), np.float32)
    values = once(Ranked(positive_ranks(x, x, [(i,) for i in range(20)])))
    assert values["r@10"] == 0
    assert values["median_rank"] == 20
    there, back = ranks_both_ways(
        np.ones((600, 7), np.float32) / 7, np.ones((120, 7), np.float32) / 7, [(i // 5,) for i in range(600)]
    )
    assert (there == 120).all()
    assert (back == np.arange(596, 601)).all()


def test_top_is_in_gallery_order_where_scores_tie() -> None:
    xb = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    assert top(xb[:2], xb, 3, [(0,), ()]).tolist() == [[2, 1, 3], [1, 3, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40))
def test_spearman_against_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert spearman(a, b) == 0


def test_spearman_by_hand() -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    assert spearman(np.array([1, 2, 2, 3]), np.array([0.1, 0.7, 0.4, 0.9])) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8).filter(sum), st.integers(0, 2**32 - 1))
def test_weights_mean_repeating_queries(weights: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = np.sort(rng.permuted(np.tile(np.arange(1, 13), (8, 1)), axis=1)[:, :2], axis=1)
    again = np.repeat(np.arange(8), weights)
    assert Ranked(found).values(np.array(weights, float)) == pytest.approx(once(Ranked(found[again])))
    a, b = rng.integers(0, 4, 8).astype(float), rng.integers(0, 4, 8).astype(float)
    assert Rated(a, b).values(np.array(weights, float)) == pytest.approx(once(Rated(a[again], b[again])))


def test_names_and_averages() -> None:
    parts = {"a": Rated(np.arange(3.0), np.arange(3.0)), "b": Rated(np.arange(3.0), np.arange(3.0)[::-1])}
    assert Outcome(parts, {"average": ("a", "b")}).metrics() == pytest.approx({"a": 100, "b": -100, "average": 0})
    subset = Ranked(np.array([[1], [3]]), (1, 3), recalls_only=True)
    assert Outcome({"subset": subset}).metrics() == {"subset_r@1": 50, "subset_r@3": 100}


def normal_95(p: float, n: int) -> tuple[float, float]:
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    return 100 * (p - half), 100 * (p + half)


def test_interval_of_a_recall_is_that_of_a_proportion() -> None:
    first = np.where(np.arange(2000) < 600, 1, 99)[:, None]
    low, high = intervals(Outcome({"": Ranked(first)}))["r@1"]
    assert (low, high) == pytest.approx(normal_95(0.3, 2000), abs=0.25)


def test_intervals_are_seeded() -> None:
    outcome = Outcome({"": Ranked(np.random.default_rng(0).integers(1, 30, (50, 1)))})
    assert intervals(outcome, 50) == intervals(outcome, 50)
    assert intervals(outcome, 50) != intervals(outcome, 50, seed=1)


def test_paired_bootstrap_sees_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(2, 40, 100)[:, None]
    after = np.maximum(1, before - 1)  # a little better everywhere
    a, b = Outcome({"": Ranked(before)}), Outcome({"": Ranked(after)})
    (_, high_a), (low_b, _) = intervals(a)["mrr"], intervals(b)["mrr"]
    assert low_b < high_a
    found = paired(a, b)["mrr"]
    assert found.low > 0
    assert found.p < 0.01
    assert found.difference == pytest.approx(b.metrics()["mrr"] - a.metrics()["mrr"])
    same = paired(a, a)["mrr"]
    assert (same.low, same.high, same.p) == (0, 0, 1)


def test_paired_p_is_that_of_a_sign_test() -> None:
    # 20 queries changed, 15 of them for the better: sign test 0.041; the bootstrap is a little more sure
    a = np.array([[9]] * 15 + [[1]] * 5 + [[1]] * 30)
    b = np.array([[1]] * 15 + [[9]] * 5 + [[1]] * 30)
    assert 0.005 < paired(Outcome({"": Ranked(a)}), Outcome({"": Ranked(b)}))["r@1"].p < 0.06


def test_runs_of_different_length_are_not_compared() -> None:
    a, b = (Outcome({"": Ranked(np.ones((n, 1), int))}) for n in (3, 4))
    with pytest.raises(ValueError, match="same queries"):
        paired(a, b)
