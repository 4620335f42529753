"""The modality gap: how far apart two kinds of items lie in one space (figures 3 and 5 of the paper, as numbers)."""

from dataclasses import dataclass

import numpy as np

SAMPLE = 1_000  # rows of each kind that the classifier sees; the accuracy is then right to about 0.01
FOLDS = 5
_RIDGE = 1e-3  # of the mean variance of a coordinate


@dataclass(frozen=True)
class Gap:
    """What `modality_gap` found. Without any gap `distance` is near 0 and `accuracy` near `chance`."""

    n: tuple[int, int]  # rows of each kind
    distance: float  # between the two means; on unit vectors 0 to 2
    spread: float  # root mean square distance of the rows to their own mean, what `distance` is to be seen against
    accuracy: float  # of a linear classifier on rows that it was not fitted to; mean of both kinds' recalls
    chance: float = 0.5


def modality_gap(x_a: np.ndarray, x_b: np.ndarray, *, sample: int = SAMPLE, folds: int = FOLDS, seed: int = 0) -> Gap:
    """The gap between rows x_a (n, d) and x_b (m, d): their means, and how well a classifier tells them apart.

    The classifier is ridge regression onto +1 and -1, both kinds weighing the same however many rows they have, fitted
    `folds` times to all but one part of the rows and asked about that part. What it costs grows with the cube of the rows,
    so it is given at most `sample` of each kind, drawn by `seed`. Raises ValueError for fewer than two rows of a kind, or
    rows of different lengths.
    """
    if min(len(x_a), len(x_b)) < 2:
        raise ValueError(f"a gap needs two rows of each kind at least, not {len(x_a)} and {len(x_b)}")
    if x_a.shape[1] != x_b.shape[1]:
        raise ValueError(f"rows of {x_a.shape[1]} and of {x_b.shape[1]} numbers lie in different spaces")
    rng = np.random.default_rng(seed)
    (mean_a, variance_a), (mean_b, variance_b) = _moments(x_a), _moments(x_b)
    drawn_a, drawn_b = (_drawn(x, sample, rng) for x in (x_a, x_b))
    return Gap(
        n=(len(x_a), len(x_b)),
        distance=float(np.linalg.norm(mean_a - mean_b)),
        spread=((variance_a + variance_b) / 2) ** 0.5,
        accuracy=_accuracy(drawn_a, drawn_b, min(folds, len(drawn_a), len(drawn_b))),
    )


def _moments(x: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean (d,) of rows, and their mean squared distance to it, in float64 without a copy of x."""
    mean = x.mean(axis=0, dtype=np.float64)
    square = float(np.einsum("nd,nd->", x, x, dtype=np.float64)) / len(x)
    return mean, max(0.0, square - float(mean @ mean))


def _drawn(x: np.ndarray, sample: int, rng: np.random.Generator) -> np.ndarray:
    """At most `sample` rows in random order, so that any part of them is a fair one; float64."""
    return np.asarray(x[rng.permutation(len(x))[:sample]], dtype=np.float64)


def _accuracy(x_a: np.ndarray, x_b: np.ndarray, folds: int) -> float:
    parts_a, parts_b = (np.arange(len(x)) % folds for x in (x_a, x_b))
    right_a, right_b = 0, 0
    for fold in range(folds):
        w, bias = _fit(x_a[parts_a != fold], x_b[parts_b != fold])
        right_a += int((x_a[parts_a == fold] @ w + bias > 0).sum())
        right_b += int((x_b[parts_b == fold] @ w + bias < 0).sum())
    return (right_a / len(x_a) + right_b / len(x_b)) / 2


def _fit(x_a: np.ndarray, x_b: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (d,) and bias of the plane between the kinds: positive on the side of x_a."""
    x = np.concatenate([x_a, x_b])
    y = np.concatenate([np.ones(len(x_a)), -np.ones(len(x_b))])
    weight = np.concatenate([np.full(len(x_a), 0.5 / len(x_a)), np.full(len(x_b), 0.5 / len(x_b))])
    mean = weight @ x
    centred = (x - mean) * np.sqrt(weight)[:, None]
    target = y * np.sqrt(weight)
    ridge = _RIDGE * float((centred**2).sum()) / x.shape[1] + np.finfo(np.float64).tiny
    if len(x) < x.shape[1]:  # the same solution from the smaller of the two systems
        w = centred.T @ np.linalg.solve(centred @ centred.T + ridge * np.eye(len(x)), target)
    else:
        w = np.linalg.solve(centred.T @ centred + ridge * np.eye(x.shape[1]), centred.T @ target)
    return w, -float(mean @ w)
