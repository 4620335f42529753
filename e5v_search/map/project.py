"""From many dimensions to two: PCA by numpy, UMAP by umap-learn."""

import importlib
import warnings
from typing import Any

import numpy as np

from e5v_search.errors import MissingPackage, UsageError

METHODS = ("pca", "umap")
_SAMPLE = 20_000  # rows that the principal axes are found from; all rows are then laid along them
_BLOCK = 4096  # rows turned into float32 at once
_SPARE = 8  # directions carried along: the nearer the third variance is to the second, the more they help
_ITERATIONS = 300
_CONVERGED = 1e-7  # of the whole variance
_NEIGHBOURS = 15
_UMAP_LEAST = 5  # rows: with fewer its layout has no solution


def project(x: np.ndarray, method: str = "pca", seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """-> (xy (n, 2) float32, share of the variance along each axis, empty for UMAP) of rows x (n, d) of any float type.

    The same rows and seed give the same places. Raises UsageError for another method or too few rows for UMAP, and
    MissingPackage.
    """
    if method == "pca":
        return pca(x, seed)
    if method == "umap":
        return _umap(x, seed), []
    raise UsageError(f"{method!r} is no way to draw a map: take {' or '.join(METHODS)}")


def pca(x: np.ndarray, seed: int = 0) -> tuple[np.ndarray, list[float]]:
    """The two directions of most variance, by subspace iteration: time and memory grow with n · d, never with d²."""
    rng = np.random.default_rng(seed)
    sample = x if len(x) <= _SAMPLE else x[np.sort(rng.choice(len(x), _SAMPLE, replace=False))]
    mean = np.mean(sample, axis=0, dtype=np.float64).astype(np.float32)
    centred = sample.astype(np.float32) - mean
    total = float(np.sum(np.square(centred), dtype=np.float64))
    width = min(2 + _SPARE, x.shape[1])
    axes = np.linalg.qr(rng.normal(size=(x.shape[1], width)))[0].astype(np.float32)
    variances, found = np.zeros(width), axes
    for _ in range(_ITERATIONS):
        spread = centred @ axes
        before, (variances, turn) = variances, np.linalg.eigh(spread.T.astype(np.float64) @ spread)
        found = axes @ turn[:, :-3:-1].astype(np.float32)  # eigh puts the largest last
        if np.abs(variances - before).max() <= _CONVERGED * total:
            break
        axes = np.linalg.qr(centred.T @ spread)[0]
    # an axis has no direction of its own: let its largest entry be positive
    found *= np.sign(np.take_along_axis(found, np.abs(found).argmax(axis=0)[None], axis=0))
    xy = np.zeros((len(x), 2), np.float32)
    for start in range(0, len(x), _BLOCK):
        xy[start : start + _BLOCK, : found.shape[1]] = (x[start : start + _BLOCK].astype(np.float32) - mean) @ found
    return xy, [float(variance) / total if total else 0.0 for variance in variances[:-3:-1]]


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    if len(x) < _UMAP_LEAST:
        raise UsageError(f"UMAP needs {_UMAP_LEAST} items at least, and here are {len(x)}: take --method pca")
    layout = _load_umap().UMAP(
        n_components=2, metric="cosine", n_neighbors=min(_NEIGHBOURS, len(x) - 1), min_dist=0.1, random_state=seed, n_jobs=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small collections, equal rows: nothing that a user could act on
        xy: np.ndarray = layout.fit_transform(x.astype(np.float32))
    return xy.astype(np.float32)


def _load_umap() -> Any:
    try:
        return importlib.import_module("umap")
    except ImportError as error:
        raise MissingPackage("--method umap needs one more package: pip install umap-learn") from error
