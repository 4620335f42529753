"""Ranks of the right items: the one thing that every retrieval metric is made of.

A tie counts against the model: an item that is right ranks behind every wrong one of the same score. The paper's code
leaves the order of equals to torch.topk, which does not define it; in this way a run gives the same numbers everywhere,
whatever the order of the gallery, and a model that gives one vector to everything finds nothing. Products of the same
vectors are rounded otherwise at the edges of a matrix, so that cosines less than `TIE` apart count as the same.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

SCORES = 2**22  # scores held at once, 16 MB in float32: what a processor's cache still helps with
QUERIES = 32  # ... but of so many queries at least, lest a large gallery is read too often: 128 MB for a million items
TILE = 2**20  # scores held at once where both sides are queries
TIE = 2.0**-19  # four times the largest difference seen between cosines of the same two rows of 4,096 numbers

Items = Sequence[Sequence[int]]  # for each query, rows of the gallery


def positive_ranks(xq: np.ndarray, xb: np.ndarray, positives: Items, masked: Items | None = None) -> np.ndarray:
    """Ranks (n, P) of each query's right items among the gallery, from 1, best first; 0 fills rows with fewer than P.

    xq (n, d) queries, xb (m, d) gallery, compared by inner product; `masked` items of a query are no candidates. Scores
    are computed for some queries at a time, so that memory does not grow with n. Raises ValueError as `score_ranks` does.
    """
    ranks = np.zeros((len(xq), max(map(len, positives), default=0)), np.int64)
    for some, scores in score_blocks(xq, xb):
        found = score_ranks(scores, positives[some], masked[some] if masked is not None else None, tie=TIE)
        ranks[some, : found.shape[1]] = found
    return ranks


def ranks_both_ways(xa: np.ndarray, xb: np.ndarray, partners: Items) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (n, P) of the partners of each row of xa (n, d) among xb (m, d), and (m, P') the other way round.

    `partners` has for each row of xa those of xb. What `positive_ranks` gives in either direction, but from one product of
    the two instead of two, tile by tile; a row without a partner is all 0. The tiles that hold partners are computed once
    more, first: a score cannot be counted before it is known what it competes with. They are few where partners lie near
    the diagonal, as captions do that stand in the order of their pictures.
    """
    a = np.repeat(np.arange(len(xa)), [len(own) for own in partners])
    b = np.array([one for own in partners for one in own], np.int64)
    n_tiles = math.isqrt(len(xa) * len(xb) // TILE) + 1
    in_a, in_b = _parts(len(xa), n_tiles), _parts(len(xb), n_tiles)
    tile_a, tile_b = (np.searchsorted([s.stop for s in parts], at, "right") for parts, at in ((in_a, a), (in_b, b)))
    held = {}  # by tile: which pairs of partners are in it, and where
    for i, j in set(zip(tile_a.tolist(), tile_b.tolist(), strict=True)):
        pairs = np.flatnonzero((tile_a == i) & (tile_b == j))
        held[i, j] = pairs, (a[pairs] - in_a[i].start, b[pairs] - in_b[j].start)

    own = np.empty(len(a), np.float32)
    for (i, j), (pairs, there) in held.items():
        own[pairs] = (xa[in_a[i]] @ xb[in_b[j]].T)[there]
    own_a, own_b = _best_first(own, a, len(xa)), _best_first(own, b, len(xb))
    wrong_a, wrong_b = np.zeros(own_a.shape, np.int64), np.zeros(own_b.shape, np.int64)
    for i, rows in enumerate(in_a):
        for j, columns in enumerate(in_b):
            scores = xa[rows] @ xb[columns].T
            if (i, j) in held:
                scores[held[i, j][1]] = -np.inf
            wrong_a[rows] += _at_least(scores, own_a[rows] - TIE)
            wrong_b[columns] += _at_least(scores.T, own_b[columns] - TIE)
    return _ranked(own_a, wrong_a), _ranked(own_b, wrong_b)


def _parts(n: int, count: int) -> list[slice]:
    """Even parts of n rows, `count` of them at most: a product with few rows is slow, and with one it is rounded otherwise."""
    edges = np.linspace(0, n, max(1, min(count, n // QUERIES)) + 1).astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _best_first(own: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    """Scores `own`, of which the i-th is one of row `row[i]`, as (n, P), best first, filled up with infinity."""
    order = np.lexsort((-own, row))
    counts = np.bincount(row, minlength=n)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.full((n, counts.max(initial=0)), np.inf, np.float32)
    out[row[order], place] = own[order]
    return out


def _at_least(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Of each row of scores (n, m), how many are no less than each of own (n, P), which are filled up with infinity."""
    counts = np.zeros(own.shape, np.int64)
    for p, wanted in enumerate(np.isfinite(own).T):
        if not wanted.any():
            break
        some = slice(None) if wanted.all() else np.flatnonzero(wanted)
        counts[some, p] = (scores[some] >= own[some, p, None]).sum(axis=1, dtype=np.int32)
    return counts


def _ranked(own: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(own), wrong + np.arange(1, own.shape[1] + 1), 0)


def score_ranks(scores: np.ndarray, positives: Items, masked: Items | None = None, tie: float = 0.0) -> np.ndarray:
    """As `positive_ranks`, from scores (n, m), of which those at most `tie` apart count as the same.

    Raises ValueError for a query without a right item, or with one masked.
    """
    ranks = np.zeros((len(scores), max(map(len, positives), default=0)), np.int64)
    for i, row in enumerate(scores):
        hidden = masked[i] if masked is not None else ()
        if not len(positives[i]) or set(positives[i]) & set(hidden):
            raise ValueError(f"query {i} has no right item, or one that is masked")
        own, out = np.sort(row[list(positives[i])])[::-1], row[list(hidden)]
        for j, score in enumerate(own - row.dtype.type(tie)):
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
