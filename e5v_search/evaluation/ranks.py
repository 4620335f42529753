"""Ranks of the right items: the one thing that every retrieval metric is made of.

A tie counts against the model: an item that is right ranks behind every wrong one of the same score. The paper's code
leaves the order of equals to torch.topk, which does not define it; in this way a run gives the same numbers everywhere,
whatever the order of the gallery, and a model that gives one vector to everything finds nothing.
"""

from collections.abc import Iterator, Sequence

import numpy as np

SCORES = 2**22  # scores held at once, 16 MB in float32: what a processor's cache still helps with
QUERIES = 32  # ... but of so many queries at least, lest a large gallery is read too often: 128 MB for a million items

Items = Sequence[Sequence[int]]  # for each query, rows of the gallery


def positive_ranks(xq: np.ndarray, xb: np.ndarray, positives: Items, masked: Items | None = None) -> np.ndarray:
    """Ranks (n, P) of each query's right items among the gallery, from 1, best first; 0 fills rows with fewer than P.

    xq (n, d) queries, xb (m, d) gallery, compared by inner product; `masked` items of a query are no candidates. Scores
    are computed for some queries at a time, so that memory does not grow with n. Raises ValueError as `score_ranks` does.
    """
    ranks = np.zeros((len(xq), max(map(len, positives), default=0)), np.int64)
    for some, scores in score_blocks(xq, xb):
        found = score_ranks(scores, positives[some], masked[some] if masked is not None else None)
        ranks[some, : found.shape[1]] = found
    return ranks


def score_ranks(scores: np.ndarray, positives: Items, masked: Items | None = None) -> np.ndarray:
    """As `positive_ranks`, from scores (n, m). Raises ValueError for a query without a right item, or with one masked."""
    ranks = np.zeros((len(scores), max(map(len, positives), default=0)), np.int64)
    for i, row in enumerate(scores):
        hidden = masked[i] if masked is not None else ()
        if not len(positives[i]) or set(positives[i]) & set(hidden):
            raise ValueError(f"query {i} has no right item, or one that is masked")
        own, out = np.sort(row[list(positives[i])])[::-1], row[list(hidden)]
        for j, score in enumerate(own):
            at_least = np.count_nonzero(row >= score)
            wrong = at_least - np.count_nonzero(own >= score) - np.count_nonzero(out >= score)
            ranks[i, j] = wrong + j + 1
    return ranks


def top(xq: np.ndarray, xb: np.ndarray, k: int, masked: Items) -> np.ndarray:
    """Rows of the gallery (n, k), best first, without those masked; equals in the order of the gallery."""
    best = np.empty((len(xq), k), np.int64)
    for some, scores in score_blocks(xq, xb):
        for i, row, hidden in zip(range(len(xq))[some], scores, masked[some], strict=True):
            row[list(hidden)] = -np.inf
            best[i] = np.argsort(-row, kind="stable")[:k]
    return best


def score_blocks(xq: np.ndarray, xb: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Scores of some queries at a time with the whole gallery."""
    step = max(QUERIES, SCORES // max(1, len(xb)))
    for start in range(0, len(xq), step):
        some = slice(start, start + step)
        yield some, xq[some] @ xb.T
