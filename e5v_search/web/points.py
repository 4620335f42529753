"""The map of a collection as numbers, for the page to draw."""

import base64
from typing import Any

import numpy as np

from e5v_search.catalog import KINDS
from e5v_search.collection import Collection
from e5v_search.map.points import gather
from e5v_search.map.project import pca


def points(source: Collection) -> dict[str, Any]:
    """Items by id, their places and kinds, each as base64 of little-endian numbers; without any item, all empty."""
    found = gather(source, None, None)
    xy, explained = pca(found.x) if found.items else (np.empty((0, 2), np.float32), [])
    return {
        "ids": _packed(np.array([item.id for item in found.items], "<i8")),
        "xy": _packed(xy.astype("<f4")),
        "kinds": _packed(np.array([KINDS.index(item.kind) for item in found.items], np.uint8)),
        "explained": explained,
        "of": sum(found.of.values()),
    }


def _packed(x: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode("ascii")
