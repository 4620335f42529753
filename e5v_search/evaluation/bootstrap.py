"""How far a metric may be off because these queries were asked and not others: bootstrap over queries, seeded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from e5v_search.evaluation.metrics import Outcome

SAMPLES = 1_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Of one metric, b minus a: the value, its 95 % interval, and the two-sided bootstrap p-value of no difference."""

    a: float
    b: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        return self.b - self.a


def intervals(outcome: Outcome, samples: int = SAMPLES, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % interval of every metric: its percentiles over `samples` draws of the queries of each part, with replacement."""
    drawn = [outcome.metrics(weights) for weights in _weights(outcome, samples, seed)]
    return {name: _percentiles(np.array([values[name] for values in drawn])) for name in drawn[0]}


def paired(a: Outcome, b: Outcome, samples: int = SAMPLES, seed: int = 0) -> dict[str, Difference]:
    """Two runs on the same queries, compared on the same draws of them. Raises ValueError when the queries' numbers differ."""
    if {name: part.n for name, part in a.parts.items()} != {name: part.n for name, part in b.parts.items()}:
        raise ValueError("the two runs did not answer the same queries")
    in_a, in_b = a.metrics(), b.metrics()
    draws = [(a.metrics(weights), b.metrics(weights)) for weights in _weights(a, samples, seed)]
    found = {}
    for name in in_a:
        gains = np.array([ours[name] - theirs[name] for theirs, ours in draws])
        # the observed runs count as one draw, so that p is never 0
        tail = min((gains <= 0).sum(), (gains >= 0).sum()) + 1
        found[name] = Difference(in_a[name], in_b[name], *_percentiles(gains), min(1.0, 2 * tail / (samples + 1)))
    return found


def _weights(outcome: Outcome, samples: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield {
            name: np.bincount(rng.integers(part.n, size=part.n), minlength=part.n).astype(np.float64)
            for name, part in outcome.parts.items()
        }


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
