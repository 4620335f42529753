"""Vectors side by side."""

import numpy as np


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, d) and (n, d), rows of length 1 -> (n,)"""
    return np.asarray((a * b).sum(axis=1))
