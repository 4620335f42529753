"""The modality gap on made-up kinds of items whose gap is known."""

import numpy as np
import pytest
from scipy import linalg, stats

from e5v_search.evaluation import modality_gap


def cloud(n: int, d: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def shifted(n: int, by: float, d: int = 16, seed: int = 1) -> np.ndarray:
    x = cloud(n, d, seed)
    x[:, 0] += by
    return x


def test_one_distribution_has_no_gap() -> None:
    gap = modality_gap(cloud(1500), cloud(1500, seed=1))
    assert gap.accuracy == pytest.approx(gap.chance, abs=0.03)
    assert gap.distance == pytest.approx(np.sqrt(16 * 2 / 1500), rel=0.5)
    assert gap.spread == pytest.approx(4, rel=0.02)


def test_far_kinds_are_told_apart_without_error() -> None:
    gap = modality_gap(cloud(300), shifted(200, by=12))
    assert (gap.accuracy, gap.n) == (1.0, (300, 200))
    assert gap.distance == pytest.approx(12, abs=0.5)


@pytest.mark.parametrize("by", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("m", [1500, 150])
def test_accuracy_is_that_of_the_best_plane(by: float, m: int) -> None:
    """Two round normal distributions `by` apart: no plane is better than the one in the middle, right for Φ(by / 2)."""
    gap = modality_gap(cloud(1500), shifted(m, by))
    assert gap.accuracy == pytest.approx(stats.norm.cdf(by / 2), abs=0.03)


def test_a_plane_through_more_dimensions_than_rows() -> None:
    gap = modality_gap(cloud(40, d=200), shifted(40, by=40, d=200))
    assert gap.accuracy == 1.0
    assert modality_gap(cloud(400, d=900), cloud(400, d=900, seed=1)).accuracy == pytest.approx(0.5, abs=0.07)


def test_accuracy_against_plain_ridge_regression() -> None:
    """The same folds; the plane by weighted least squares with a column of ones and a penalty row for each weight."""
    a, b = cloud(30, d=6), shifted(20, by=1.5, d=6)
    rng = np.random.default_rng(0)
    a, b = a[rng.permutation(30)], b[rng.permutation(20)]
    recalls = np.zeros(2)
    for fold in range(5):
        train_a, train_b = a[np.arange(30) % 5 != fold], b[np.arange(20) % 5 != fold]
        x = np.vstack([train_a, train_b])
        weights = np.r_[np.full(len(train_a), 0.5 / len(train_a)), np.full(len(train_b), 0.5 / len(train_b))]
        centre = np.average(x, axis=0, weights=weights)
        penalty = 1e-3 * np.average((x - centre) ** 2, axis=0, weights=weights).mean()
        rows = np.c_[x, np.ones(len(x))] * np.sqrt(weights)[:, None]
        system = np.vstack([rows, np.c_[np.sqrt(penalty) * np.eye(6), np.zeros(6)]])
        target = np.r_[np.r_[np.ones(len(train_a)), -np.ones(len(train_b))] * np.sqrt(weights), np.zeros(6)]
        plane = linalg.lstsq(system, target)[0]
        for kind, (x_kind, sign) in enumerate(((a, 1), (b, -1))):
            test = x_kind[np.arange(len(x_kind)) % 5 == fold]
            recalls[kind] += (sign * (np.c_[test, np.ones(len(test))] @ plane) > 0).sum()
    assert modality_gap(cloud(30, d=6), shifted(20, by=1.5, d=6)).accuracy == pytest.approx((recalls / [30, 20]).mean())


def test_means_and_spread_are_those_of_all_rows() -> None:
    a, b = cloud(500).astype(np.float32), shifted(400, by=1).astype(np.float32)
    gap = modality_gap(a, b, sample=100)
    means = [x.astype(np.float64).sum(axis=0) / len(x) for x in (a, b)]
    own = [np.mean([np.sum((row - mean) ** 2) for row in x]) for x, mean in zip((a, b), means, strict=True)]
    assert gap.n == (500, 400)
    assert gap.distance == pytest.approx(np.sqrt(np.sum((means[0] - means[1]) ** 2)), rel=1e-9)
    assert gap.spread == pytest.approx(np.sqrt(np.mean(own)), rel=1e-6)


def test_sample_is_drawn_by_the_seed() -> None:
    a, b = cloud(500), shifted(400, by=1)
    first, again, other = (modality_gap(a, b, sample=100, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.accuracy != other.accuracy


def test_half_precision_and_few_rows() -> None:
    unit = cloud(9) / np.linalg.norm(cloud(9), axis=1, keepdims=True)
    gap = modality_gap(unit.astype(np.float16), (-unit).astype(np.float16)[:2])
    assert gap.n == (9, 2)
    assert 0 <= gap.accuracy <= 1
    same = modality_gap(np.ones((3, 4), np.float16), np.ones((3, 4), np.float16))
    assert (same.distance, same.spread) == (0, 0)
    with pytest.raises(ValueError, match="two rows of each kind"):
        modality_gap(unit, unit[:1])
    with pytest.raises(ValueError, match="different spaces"):
        modality_gap(unit, unit[:, :3])
