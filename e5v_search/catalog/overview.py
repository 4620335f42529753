"""What a whole collection consists of: how many items of each kind, month, folder, camera, format and place."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e5v_search.catalog.records import KINDS
from e5v_search.catalog.where import FOLDER
from e5v_search.filters import quoted

_MOST = 300  # values of one fact that are told
_CELLS = 4  # per degree: places within a quarter of a degree are one
_REACH = 40  # km: from any point of a cell to any other

# the rows that an Overview is made of
ROWS = (
    f"SELECT i.id, i.kind, substr(i.taken_at, 1, 7), {FOLDER.replace('path', 'f.path')}, i.camera, i.format, i.lat, i.lon"
    " FROM items i LEFT JOIN files f ON f.item_id = i.id ORDER BY i.taken_at DESC, i.id DESC"
)


@dataclass(frozen=True)
class _Column:
    """A fact of every item as the number of its value; -1 for items without it."""

    values: list[str]
    codes: np.ndarray  # (n,) int32

    @classmethod
    def of(cls, found: Sequence[str | None]) -> "_Column":
        numbers: dict[str, int] = {}
        codes = np.fromiter((-1 if v is None else numbers.setdefault(v, len(numbers)) for v in found), np.int32, len(found))
        return cls(list(numbers), codes)

    def counts(self, chosen: np.ndarray) -> dict[str, int]:
        codes = self.codes[chosen]
        totals = np.bincount(codes[codes >= 0], minlength=len(self.values)).tolist()
        return {value: n for value, n in zip(self.values, totals, strict=True) if n}


class Overview:
    """The facts by which the items of one state of a catalog are counted, newest first: 40 bytes an item."""

    def __init__(self, rows: Sequence[tuple[Any, ...]]) -> None:
        ids, kinds, months, folders, cameras, formats, lat, lon = zip(*rows, strict=True) if rows else [()] * 8
        self.ids = np.array(ids, np.int64)
        self._kind, self._month, self._folder = _Column.of(kinds), _Column.of(months), _Column.of(folders)
        self._camera, self._format = _Column.of(cameras), _Column.of(formats)
        self._place = np.array([lat, lon], np.float64)  # NaN where there is none

    def newest(self, ids: np.ndarray, start: int, n: int) -> list[int]:
        """Of the items `ids` those from the `start`-th newest on, `n` at most."""
        found: list[int] = self.ids[np.isin(self.ids, ids)][start : start + n].tolist()
        return found

    def facets(self, ids: np.ndarray | None = None) -> dict[str, Any]:
        """How many of the items `ids` (all, if None) have which value; each value with the filter that passes it."""
        chosen = np.ones(len(self.ids), bool) if ids is None else np.isin(self.ids, ids)
        kinds = self._kind.counts(chosen)
        return {
            "total": int(chosen.sum()),
            "kind": [_facet("kind", kind, kinds[kind]) for kind in KINDS if kind in kinds],
            "taken": _years(self._month.counts(chosen)),
            "folder": _folders(self._folder.counts(chosen)),
            "camera": _commonest("camera", self._camera.counts(chosen)),
            "format": _commonest("format", self._format.counts(chosen)),
            "place": self._places(chosen),
        }

    def _places(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        """Cells of the map, the fullest first, each at the mean of its photos."""
        lat, lon = self._place[:, chosen & ~np.isnan(self._place).any(axis=0)]
        if not len(lat):
            return []
        cells, cell = np.unique(np.floor(np.stack([lat, lon]) * _CELLS), axis=1, return_inverse=True)
        n = np.bincount(cell, minlength=cells.shape[1])
        means = [np.bincount(cell, values, minlength=len(n)) / n for values in (lat, lon)]
        fullest = np.argsort(-n, kind="stable")[:_MOST]
        return [
            {"lat": float(lat), "lon": float(lon), "count": int(n[i]), "where": f"near={lat:.5f},{lon:.5f},{_REACH}km"}
            for i, lat, lon in zip(fullest.tolist(), *(mean[fullest].round(5) for mean in means), strict=True)
        ]


def _facet(name: str, value: str, n: int) -> dict[str, Any]:
    return {"value": value, "count": n, "where": f"{name}={quoted(value)}"}


def _commonest(name: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    return [_facet(name, value, counts[value]) for value in sorted(counts, key=lambda v: (-counts[v], v))[:_MOST]]


def _years(months: dict[str, int]) -> list[dict[str, Any]]:
    """Latest first, each year with its months."""
    years: dict[str, dict[str, int]] = {}
    for month, n in sorted(months.items(), reverse=True):
        years.setdefault(month[:4], {})[month] = n
    return [
        {**_facet("taken", year, sum(found.values())), "months": [_facet("taken", month, n) for month, n in found.items()]}
        for year, found in years.items()
    ]


def _folders(counts: dict[str, int]) -> list[dict[str, Any]]:
    """Every folder with what lies in it or anywhere below, down from the one that holds all; the fullest, by path."""
    within: dict[str, int] = {}
    for folder, n in counts.items():
        path = folder.rstrip(os.sep) or os.sep
        while True:
            within[path] = within.get(path, 0) + n
            parent = os.path.dirname(path)
            if parent == path:
                break
            path = parent
    total = sum(counts.values())
    top = max((path for path, n in within.items() if n == total), key=len, default="")
    below = [path for path in within if len(path) >= len(top)]
    fullest = sorted(below, key=lambda path: (-within[path], path))[:_MOST]
    return [_facet("folder", path, within[path]) for path in sorted(fullest)]
