"""Metrics over queries, each as a function of how often every query counts: once, or as a bootstrap sample has it.

Recalls, MRR, nDCG and Spearman are in percent, as papers print them; the median rank is a rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from e5v_search.evaluation.gap import Gap

NDCG = 10


class Part(Protocol):
    """The queries of one direction, category or task, and what was measured of each."""

    @property
    def n(self) -> int: ...

    def values(self, weights: np.ndarray) -> dict[str, float]:
        """Metrics by name, when query i counts `weights[i]` times; weights (n,), not all zero."""
        ...


@dataclass(frozen=True)
class Ranked:
    """Ranks (n, P) of the right items of each query, as `ranks.positive_ranks` gives them.

    `r@K` is any-hit recall, the papers': one right item among the first K is enough. `fraction@K` is the share of a
    query's right items among them (what mteb calls recall), given where a query has several. With `recalls_only` there
    are no others: median rank of the first right item, MRR, nDCG@10 with gains of 0 and 1.
    """

    ranks: np.ndarray
    ks: tuple[int, ...] = (1, 5, 10)
    recalls_only: bool = False

    @property
    def n(self) -> int:
        return len(self.ranks)

    @property
    def first(self) -> np.ndarray:
        first: np.ndarray = self.ranks[:, 0]
        return first

    @cached_property
    def per_query(self) -> dict[str, np.ndarray]:
        """What each query (n,) contributes to the metrics that are means over queries; from 0 to 1."""
        there = self.ranks > 0
        right = there.sum(axis=1)
        found = {f"r@{k}": (self.first <= k).astype(np.float64) for k in self.ks}
        if self.recalls_only:
            return found
        if self.ranks.shape[1] > 1:
            found |= {f"fraction@{k}": (there & (self.ranks <= k)).sum(axis=1) / right for k in self.ks}
        gains = np.where(there & (self.ranks <= NDCG), 1 / np.log2(np.maximum(self.ranks, 1) + 1), 0).sum(axis=1)
        ideal = np.cumsum(1 / np.log2(np.arange(NDCG) + 2))[np.minimum(right, NDCG) - 1]
        return found | {"mrr": 1 / self.first, f"ndcg@{NDCG}": gains / ideal}

    @cached_property
    def _matrix(self) -> np.ndarray:
        return np.stack(list(self.per_query.values()), axis=1)

    @cached_property
    def _by_rank(self) -> np.ndarray:
        return np.argsort(self.first, kind="stable")

    def values(self, weights: np.ndarray) -> dict[str, float]:
        means = 100 * (weights @ self._matrix) / weights.sum()
        values = dict(zip(self.per_query, map(float, means), strict=True))
        return values if self.recalls_only else values | {"median_rank": self._median(weights)}

    def _median(self, weights: np.ndarray) -> float:
        ranks, upto = self.first[self._by_rank], np.cumsum(weights[self._by_rank])
        half = upto[-1] / 2
        low, high = np.searchsorted(upto, half), np.searchsorted(upto, half, side="right")
        return float(ranks[low] + ranks[min(high, len(ranks) - 1)]) / 2


@dataclass(frozen=True)
class Rated:
    """Pairs of sentences: similarities (n,) by the model and gold scores (n,) by people; the metric is Spearman's."""

    similarities: np.ndarray
    gold: np.ndarray

    @property
    def n(self) -> int:
        return len(self.gold)

    @cached_property
    def _groups(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return _ties(self.similarities), _ties(self.gold)

    def values(self, weights: np.ndarray) -> dict[str, float]:
        a, b = (_mean_ranks(weights, *groups) for groups in self._groups)
        a, b = a - weights @ a / weights.sum(), b - weights @ b / weights.sum()
        spread = np.sqrt((weights @ (a * a)) * (weights @ (b * b)))
        return {"spearman": float(100 * (weights @ (a * b)) / spread) if spread else 0.0}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of a (n,) with b (n,), from -1 to 1, equals at their mean rank; 0 when one is constant."""
    return Rated(a, b).values(np.ones(len(a)))["spearman"] / 100


def _ties(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each value the number (n,) of its group of equals, groups in ascending order; and how many groups there are."""
    _, inverse = np.unique(values, return_inverse=True)
    return inverse, np.arange(inverse.max(initial=-1) + 1)


def _mean_ranks(weights: np.ndarray, group: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks (n,), equals at their mean, among values of which the i-th is there `weights[i]` times."""
    sizes = np.bincount(group, weights, minlength=len(groups))
    ranks: np.ndarray = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    return ranks


@dataclass(frozen=True)
class Outcome:
    """What an evaluation measured: its parts by name, and metrics that are the mean of others ("average_r@10").

    A metric's name is its part's, `_` and its own; the part "" leaves the name alone, and a rated part is named itself.
    `gap` is that between pictures and captions, where there are both and two of each.
    """

    parts: Mapping[str, Part]
    averages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gap: Gap | None = None

    def metrics(self, weights: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
        """All metrics; `weights` by part, as `Part.values` takes them, else every query once."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            values = part.values(weights[name] if weights is not None else np.ones(part.n))
            found |= {_join(name, metric): value for metric, value in values.items()}
        return found | {name: float(np.mean([found[of] for of in ofs])) for name, ofs in self.averages.items()}


def _join(part: str, metric: str) -> str:
    return part if metric == "spearman" else f"{part}_{metric}" if part else metric
