"""What a whole collection consists of: how many items of each kind, month, folder, camera, format and place."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from e5v_search.catalog.records import KINDS
from e5v_search.catalog.where import FOLDER
from e5v_search.filters import quoted
from e5v_search.filters.geo import RADIUS, box

_MOST = 300  # values of one fact that are told
_CELLS = 4  # per degree: places within a quarter of a degree are one
_REACH = 40  # km: from any point of a cell to any other
_EARTH = RADIUS / 1000  # km

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
            "folder": self._folders(chosen),
            "camera": _commonest("camera", self._camera.counts(chosen)),
            "format": _commonest("format", self._format.counts(chosen)),
            "place": [
                {"lat": lat, "lon": lon, "count": n, "where": f"near={lat:.5f},{lon:.5f},{_REACH}km"}
                for lat, lon, near in self._places
                if (n := int(chosen[near].sum()))
            ],
        }

    # folders and places are those of all items, whichever are counted: the same values have the same filters

    def _folders(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        within = _within(self._folder.counts(chosen))
        return [_facet("folder", path, within[path]) for path in self._tree if path in within]

    @cached_property
    def _tree(self) -> list[str]:
        """The fullest folders, by path, down from the one that holds all."""
        counts = self._folder.counts(np.ones(len(self.ids), bool))
        within, total = _within(counts), sum(counts.values())
        top = max((path for path, n in within.items() if n == total), key=len, default="")
        below = [path for path in within if len(path) >= len(top)]
        return sorted(sorted(below, key=lambda path: (-within[path], path))[:_MOST])

    @cached_property
    def _places(self) -> list[tuple[float, float, np.ndarray]]:
        """Cells of the map, the fullest first: the mean of its photos, and which items (m,) are within reach of it."""
        known = np.flatnonzero(~np.isnan(self._place).any(axis=0))
        known = known[np.argsort(self._place[0, known], kind="stable")]
        lat, lon = self._place[:, known]
        if not len(known):
            return []
        cells, cell = np.unique(np.floor(np.stack([lat, lon]) * _CELLS), axis=1, return_inverse=True)
        n = np.bincount(cell, minlength=cells.shape[1])
        means = np.stack([np.bincount(cell, values, minlength=len(n)) / n for values in (lat, lon)]).round(5)
        found = []
        for y, x in means[:, np.argsort(-n, kind="stable")[:_MOST]].T.tolist():
            (south, north), spans = box(y, x, _REACH * 1000)
            first, last = np.searchsorted(lat, south), np.searchsorted(lat, north, side="right")
            inside = np.zeros(last - first, bool)
            for west, east in spans:
                inside |= (lon[first:last] >= west) & (lon[first:last] <= east)
            near = first + np.flatnonzero(inside)
            found.append((y, x, known[near[_kilometres(y, x, lat[near], lon[near]) <= _REACH]].astype(np.int32)))
        return found


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


def _within(counts: dict[str, int]) -> dict[str, int]:
    """Of every folder, how much lies in it or anywhere below."""
    within: dict[str, int] = {}
    for folder, n in counts.items():
        path = folder.rstrip(os.sep) or os.sep
        while True:
            within[path] = within.get(path, 0) + n
            parent = os.path.dirname(path)
            if parent == path:
                break
            path = parent
    return within


def _kilometres(lat: float, lon: float, lats: np.ndarray, lons: np.ndarray) -> np.ndarray:
    """From one point to others (n,), all in degrees."""
    a, b = np.radians(lat), np.radians(lats)
    h = np.sin((b - a) / 2) ** 2 + np.cos(a) * np.cos(b) * np.sin(np.radians(lons - lon) / 2) ** 2
    found: np.ndarray = 2 * _EARTH * np.arcsin(np.sqrt(np.minimum(h, 1.0)))
    return found
