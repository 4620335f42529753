"""Counts of a collection's facts, against plain counting and the filters' own arithmetic."""

import numpy as np
import pytest

from e5v_search.catalog import Overview
from e5v_search.filters import Near, parse
from e5v_search.filters.geo import distance

FOLDERS = ("/p/2019/Rome", "/p/2019/Paris (spring)", "/p/2020", "/p/2020/Rome", "/p/20")


@pytest.fixture(scope="module")
def rows() -> list[tuple[object, ...]]:
    """Photos crowded around a few cities, so that places reach into each other; some without any place."""
    rng = np.random.default_rng(5)
    cities = [(48.86, 2.35), (-17.6, 179.95), (64.1, -21.9), (89.8, 10.0)]
    found: list[tuple[object, ...]] = []
    for n in range(600):
        lat, lon = np.array(cities[n % 4]) + rng.normal(0, 0.4, 2)
        place = (None, None) if n % 7 == 0 else (float(min(lat, 90)), float((lon + 180) % 360 - 180))
        folder = FOLDERS[rng.integers(len(FOLDERS))]
        found.append((n + 1, "image", f"{2019 + n % 3}-0{n % 9 + 1}", folder, "Canon" if n % 2 else None, "JPEG", *place))
    return found


@pytest.mark.parametrize("step", [1, 3, 50])
def test_places_count_what_their_filter_passes(rows: list[tuple[object, ...]], step: int) -> None:
    chosen = {row[0]: row for row in rows[::step]}
    places = Overview(rows).facets(np.array(list(chosen)))["place"]
    assert len(places) > 10
    for place in places:
        near = parse([place["where"]])
        assert isinstance(near, Near)
        within = [
            row for row in chosen.values() if row[6] is not None and distance(near.lat, near.lon, row[6], row[7]) <= near.metres
        ]
        assert place["count"] == len(within), place


def test_values_and_filters_are_the_same_whichever_are_counted(rows: list[tuple[object, ...]]) -> None:
    overview = Overview(rows)
    whole = overview.facets()
    few = overview.facets(np.array([row[0] for row in rows if row[3] == "/p/2019/Rome"]))
    assert {place["where"] for place in few["place"]} <= {place["where"] for place in whole["place"]}
    assert [facet["value"] for facet in whole["folder"]] == ["/p", "/p/20", "/p/2019", *sorted(FOLDERS[:2]), *FOLDERS[2:4]]
    assert [facet["value"] for facet in few["folder"]] == ["/p", "/p/2019", "/p/2019/Rome"]
    assert {facet["count"] for facet in few["folder"]} == {few["total"]}
    for facet in whole["folder"]:
        below = [row for row in rows if f"{row[3]}/".startswith(f"{facet['value']}/")]
        assert facet["count"] == len(below)


def test_nothing_is_counted_of_nothing() -> None:
    found = Overview([]).facets()
    assert found.pop("total") == 0
    assert not any(found.values())
