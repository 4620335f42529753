"""What a filter selects in SQL is what plain Python says of every item."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e5v_search.catalog import VIEW, Catalog, Item, Put, where
from e5v_search.errors import CollectionError
from e5v_search.filters import EVERYTHING, And, Filter, Not, Or, parse

DIM = 4
ONE = {VIEW: np.full(DIM, 0.5, np.float32)}
CAMERAS = [None, "Canon EOS 5D", "canon eos r5", "NIKON D90", "Leica Café", "x_%'\";--", "a\\b", "K\u212a"]
FOLDERS = ["/p/2019", "/p/2019/2019-05 trip", "/p/2019/2019-06", "/p/2020", "/p/[x]", "/p/a*b", "/p/caf\udce9", "/q/2019 old"]
TEXTS = ["A dog on the GRASS", "50% off_", "naïve CAFÉ", 'it\'s "x"; DROP TABLE items;--', "one\ntwo\0three", ""]
FACTS: list[dict[str, Any]] = [
    {},
    {"stars": 4, "lang": "en", "ok": True},
    {"stars": 4.5, "lang": "EN", "source": {"name": "web", "n": [1, 2, 3]}},
    {"stars": "4", "lang": "d'é", "Photo ID": "7", "n": 10**30},
    {"stars": -1, "tags": ["dog", "Cat"], "none": None, "nan": math.nan, "big": 2**62 + 1},
    {"lang": "caf\udce9 %_", "stars": "many"},
]


def put(n: int, rng: np.random.Generator) -> Put:
    def one(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    common: dict[str, Any] = {"content_hash": str(n), "vectors": ONE, "facts": one(FACTS)}
    folder, kind = one(FOLDERS), one(["image", "image", "text", "rendered"])
    if kind != "image":
        path = one([None, f"{folder}/t{n}.txt"])
        return Put(kind=kind, text=one(TEXTS), path=path, size=n, **common)
    day = f"{one([2019, 2020, 2023])}-{one([1, 5, 12]):02d}-{one([1, 17, 31]):02d}"
    lat, lon = one([(None, None), (48.85, 2.35), (48.86, 2.36), (-33.9, 151.2), (89.99, 10.0), (0.0, 179.99), (0.0, -179.99)])
    return Put(
        kind="image",
        path=f"{folder}/{one(['IMG', 'pic*', 'a?'])}_{n}.{one(['jpg', 'PNG'])}",
        size=int(rng.integers(0, 5_000_000)),
        width=(width := one([None, 100, 640, 4000])),
        height=None if width is None else one([100, 480, 3000]),
        taken_at=one([None, f"{day}T10:20:30", f"{day}T23:59:59+02:00", f"{day}T00:00:00"]),
        lat=lat,
        lon=lon,
        camera=one(CAMERAS),
        format=one(["JPEG", "PNG", None]),
        **common,
    )


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    with Catalog.create(tmp_path_factory.mktemp("c") / "c") as made:
        made.bind("model@1", DIM, {})
        rng = np.random.default_rng(7)
        ids = made.commit([put(n, rng) for n in range(600)])
        made.commit(gone=ids[::9])
        changed = [put(1000 + n, rng) for n in range(60)]
        for n, each in enumerate(changed):
            each.item_id = ids[1::9][n]
        made.commit(changed)
        yield made


# the reference: an item, and its file's size, looked at in Python


def value(item: Item, size: int | None, name: str) -> Any:
    pixels = None if item.width is None or item.height is None else (item.width, item.height)
    return {
        "taken": item.taken_at,
        "width": item.width,
        "height": item.height,
        "megapixels": pixels and pixels[0] * pixels[1] / 1e6,
        "size": size,
        "orientation": pixels
        and ("landscape", "portrait", "square")[0 if pixels[0] > pixels[1] else 1 + (pixels[0] == pixels[1])],
        "kind": item.kind,
        "camera": item.camera,
        "format": item.format,
        "text": item.text,
        "path": item.path,
        "folder": item.path and item.path.rpartition("/")[0],
        "place": item.lat,
    }[name]


def facts_of(facts: Any, path: list[str]) -> list[Any]:
    if isinstance(facts, list):
        return [found for each in facts for found in facts_of(each, path)]
    if not path:
        return [] if facts is None or isinstance(facts, dict) or facts != facts else [facts]
    return facts_of(facts[path[0]], path[1:]) if isinstance(facts, dict) and path[0] in facts else []


def haversine_by_vectors(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle metres another way: the angle between two unit vectors."""

    def unit(p: tuple[float, float]) -> np.ndarray:
        lat, lon = np.radians(p)
        return np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])

    x, y = unit(a), unit(b)
    return float(6_371_008.8 * np.arctan2(np.linalg.norm(np.cross(x, y)), x @ y))


def has(name: str) -> Callable[[Item, int | None], bool]:
    return lambda item, size: value(item, size, name) is not None


def on(name: str, test: Callable[[Any], bool]) -> Callable[[Item, int | None], bool]:
    return lambda item, size: (v := value(item, size, name)) is not None and test(v)


def fact(name: str, test: Callable[[Any], bool]) -> Callable[[Item, int | None], bool]:
    return lambda item, size: any(test(v) for v in facts_of(item.facts, name.split(".")))


def near(lat: float, lon: float, metres: float) -> Callable[[Item, int | None], bool]:
    return lambda item, _: item.lat is not None and haversine_by_vectors((lat, lon), (item.lat, item.lon or 0.0)) <= metres


def numeric(test: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and test(v)


def text(test: Callable[[str], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and test(v)


FIELDS: dict[str, Callable[[Item, int | None], bool]] = {
    "kind=image": on("kind", lambda v: v == "image"),
    "kind=text|rendered": on("kind", lambda v: v != "image"),
    "taken=2019": on("taken", lambda v: v[:4] == "2019"),
    "taken=2019-05": on("taken", lambda v: v[:7] == "2019-05"),
    "taken=2019-05-17": on("taken", lambda v: v[:10] == "2019-05-17"),
    "taken=2019-05-17T10": on("taken", lambda v: v[:13] == "2019-05-17T10"),
    "taken=2019-05-17T10:20:30": on("taken", lambda v: v[:19] == "2019-05-17T10:20:30"),
    "taken=2019-05-17T23:59:59": on("taken", lambda v: v[:19] == "2019-05-17T23:59:59"),
    "taken<2020": on("taken", lambda v: int(v[:4]) < 2020),
    "taken<=2020-05": on("taken", lambda v: (int(v[:4]), int(v[5:7])) <= (2020, 5)),
    "taken>2020-05": on("taken", lambda v: (int(v[:4]), int(v[5:7])) > (2020, 5)),
    "taken>=2020-05-17T23:59:59": on("taken", lambda v: v[:19] >= "2020-05-17T23:59:59"),
    "taken<2019-05-17": on("taken", lambda v: v[:10] < "2019-05-17"),
    "taken>2019-05-17T10:20:30": on("taken", lambda v: v[:19] > "2019-05-17T10:20:30"),
    "width=640": on("width", lambda v: v == 640),
    "width<640": on("width", lambda v: v < 640),
    "height>=480": on("height", lambda v: v >= 480),
    "height>480": on("height", lambda v: v > 480),
    "megapixels>=12": on("megapixels", lambda v: v >= 12),
    "megapixels=0.3072": on("megapixels", lambda v: round(v * 1e6) == 307_200),
    "megapixels<=0.01": on("megapixels", lambda v: v <= 0.01),
    "size>2MB": on("size", lambda v: v > 2_000_000),
    "size<=500": on("size", lambda v: v <= 500),
    "orientation=landscape": on("orientation", lambda v: v == "landscape"),
    "orientation=portrait|square": on("orientation", lambda v: v != "landscape"),
    "camera=canon*": on("camera", lambda v: v.lower().startswith("canon")),
    "camera='canon eos 5d'": on("camera", lambda v: v == "Canon EOS 5D"),
    "camera='leica café'": on("camera", lambda v: v == "Leica Café"),
    "camera~EOS": on("camera", lambda v: "eos" in v.lower()),
    "camera~CAFÉ": on("camera", lambda v: "café" in v.lower()),
    "camera~'x_%'": on("camera", lambda v: v.startswith("x_%")),
    r"camera='x_%\'\";--'": on("camera", lambda v: v.startswith("x_%")),
    r"camera='a\\b'": on("camera", lambda v: v == "a\\b"),
    "camera~k": on("camera", lambda v: re.search("[kK]", v) is not None),
    "camera=kk": on("camera", lambda v: False),
    "camera~'; DROP TABLE items'": on("camera", lambda v: False),
    "format=jpg": on("format", lambda v: v == "JPEG"),
    "format=p*|jp*": on("format", lambda v: True),
    "folder=2019": on("folder", lambda v: "2019" in v.split("/")),
    "folder=2019*": on("folder", lambda v: any(part.startswith("2019") for part in v.split("/"))),
    "folder=/p/2019": on("folder", lambda v: (v + "/").startswith("/p/2019/")),
    "folder='/p/2019/*trip'": on("folder", lambda v: v == FOLDERS[1]),
    "folder=/p/*": on("folder", lambda v: v.startswith("/p/")),
    r"folder=/p/\[x\]": on("folder", lambda v: v == "/p/[x]"),
    "folder=/p/[x]": on("folder", lambda v: False),
    r"folder=a\*b": on("folder", lambda v: v == "/p/a*b"),
    "folder=/p/caf\udce9": on("folder", lambda v: v == "/p/caf\udce9"),
    f"folder=/p/caf{chr(0xDCEA)}": on("folder", lambda v: False),
    "folder=caf?": on("folder", lambda v: v == "/p/caf\udce9"),
    "folder~TRIP": on("folder", lambda v: "trip" in v),
    "folder~IMG": on("folder", lambda v: False),
    "folder=/": on("folder", lambda v: True),
    "path=*.png": on("path", lambda v: False),
    "path=*.PNG": on("path", lambda v: v.endswith(".PNG")),
    r"path=pic\**": on("path", lambda v: "/pic*" in v),
    r"path=/p/**/a\?*": on("path", lambda v: v.startswith("/p/") and "/a?" in v),
    "path~.png": on("path", lambda v: ".png" in v.lower()),
    "path~\udce9": on("path", lambda v: "\udce9" in v),
    "near=48.85,2.35,0m": near(48.85, 2.35, 0),
    "near=48.85,2.35,2km": near(48.85, 2.35, 2000),
    "near=48.85,2.35,1km": near(48.85, 2.35, 1000),
    "near=0,180,3km": near(0, 180, 3000),
    "near=0,-179.995,3km": near(0, -179.995, 3000),
    "near=90,0,20km": near(90, 0, 20_000),
    "near=89.99,-170,20km": near(89.99, -170, 20_000),
    "near=0,0,30000km": near(0, 0, 3e7),
    "near=-33.9,151.2,16000km": near(-33.9, 151.2, 1.6e7),
    "text~dog": on("text", lambda v: "dog" in v.lower()),
    "text~CAFÉ": on("text", lambda v: "café" in v.lower()),
    "text~THREE": on("text", lambda v: "three" in v),
    "text='a dog*'": on("text", lambda v: v.lower().startswith("a dog")),
    "text='*%*_'": on("text", lambda v: v == "50% off_"),
    "text~'; DROP TABLE'": on("text", lambda v: "DROP" in v),
    "facts.stars>=4": fact("stars", numeric(lambda v: v >= 4)),
    "facts.stars<4.5": fact("stars", numeric(lambda v: v < 4.5)),
    "facts.stars=4": fact("stars", lambda v: v in (4, "4")),
    "facts.stars='4'": fact("stars", lambda v: v == "4"),
    "facts.stars>a": fact("stars", text(lambda v: v > "a")),
    "facts.stars<='4'": fact("stars", text(lambda v: v <= "4")),
    "facts.lang=en": fact("lang", lambda v: v == "en"),
    "facts.lang~EN": fact("lang", text(lambda v: "en" in v.lower())),
    "facts.lang~É": fact("lang", text(lambda v: "é" in v.lower())),
    r"facts.lang='d\'é'": fact("lang", lambda v: v == "d'é"),
    "facts.lang~%_": fact("lang", text(lambda v: "%_" in v)),
    "facts.lang~\udce9": fact("lang", text(lambda v: "\udce9" in v)),
    "facts.ok=true": fact("ok", lambda v: v is True),
    "facts.source.name=web": fact("source.name", lambda v: v == "web"),
    "facts.source.n=2": fact("source.n", lambda v: v == 2),
    "facts.tags=dog|cat": fact("tags", lambda v: v in ("dog", "cat")),
    "facts.tags~CAT": fact("tags", text(lambda v: "cat" in v.lower())),
    "facts.n>=1e29": fact("n", numeric(lambda v: v >= 1e29)),
    "facts.big=4611686018427387905": fact("big", lambda v: v == 2**62 + 1),
    'facts."Photo ID"=7': fact("Photo ID", lambda v: v == "7"),
    "facts.none=x": fact("none", lambda v: False),
    'facts.lang="\' OR 1=1 --"': fact("lang", lambda v: False),
    **{f"has {name}": has(name) for name in ("taken", "width", "size", "camera", "format", "place", "text", "path")},
    "has facts.stars": fact("stars", lambda v: True),
    "has facts.none": fact("none", lambda v: False),
    "has facts.source.n": fact("source.n", lambda v: True),
}


@pytest.fixture(scope="module")
def items(c: Catalog) -> dict[int, tuple[Item, int | None]]:
    sizes = {row.item_id: row.size for row in c.paths_under(["/"])}
    return {i: (item, sizes.get(i)) for i, item in c.items(range(1, 2000)).items()}


@pytest.fixture(scope="module")
def truth(items: dict[int, tuple[Item, int | None]]) -> dict[str, set[int]]:
    return {e: {i for i, (item, size) in items.items() if test(item, size)} for e, test in FIELDS.items()}


@pytest.mark.parametrize("expression", FIELDS)
def test_each_field(c: Catalog, items: dict[int, object], truth: dict[str, set[int]], expression: str) -> None:
    expected = sorted(truth[expression])
    others = sorted(set(items) - set(expected))
    for form, ids in ((expression, expected), (f"not {expression}", others), (f"not not {expression}", expected)):
        found = c.select(parse([form]))
        assert found.dtype == np.int64
        assert found.tolist() == ids
        assert c.passing(list(items), parse([form])).tolist() == ids
    assert c.passing([*others[:3], *expected[:3], 99_999], parse([expression])).tolist() == expected[:3]
    negated = re.sub(r"^([^=<>~]+)=", r"\1!=", expression)
    if negated != expression:
        assert c.select(parse([negated])).tolist() == others


def test_most_fields_pass_some_and_not_all(items: dict[int, object], truth: dict[str, set[int]]) -> None:
    mixed = [e for e, ids in truth.items() if 0 < len(ids) < len(items)]
    assert len(mixed) > 0.8 * len(FIELDS)


trees = st.recursive(
    st.sampled_from([e for e in FIELDS if "|" not in e]),
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("and"), inner, inner, inner),
        st.tuples(st.sampled_from(["and", "or"]), inner, inner),
    ),
    max_leaves=7,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees, st.sampled_from([0, 10, 10**6]))
def test_mixes(c: Catalog, items: dict[int, object], truth: dict[str, set[int]], tree: Any, enough: int) -> None:
    def build(node: Any) -> tuple[Filter, set[int]]:
        if isinstance(node, str):
            return parse([node]), truth[node]
        parts, ids = zip(*map(build, node[1:]), strict=True)
        if node[0] == "not":
            return Not(parts[0]), set(items) - ids[0]
        return (And(parts), set.intersection(*ids)) if node[0] == "and" else (Or(parts), set.union(*ids))

    filter_, expected = build(tree)
    assert c.select(filter_).tolist() == sorted(expected)
    # whichever way is taken: every index that there is, the best of several, none
    assert c.select(filter_, c._where._plan(filter_, enough)).tolist() == sorted(expected)
    assert c.passing(list(items), filter_).tolist() == sorted(expected)


def test_nothing_and_everything(c: Catalog, items: dict[int, object]) -> None:
    assert c.select(EVERYTHING).tolist() == sorted(items) == c.passing(list(items), EVERYTHING).tolist()
    assert c.passing([], EVERYTHING).tolist() == []
    assert c.passing([0, -1, 99_999, 2**62], EVERYTHING).tolist() == []
    assert c.select(Or(())).tolist() == []
    assert c.select(Not(EVERYTHING)).tolist() == []


anything = st.text(st.characters(exclude_categories=()), max_size=12)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    anything,
    st.sampled_from(["camera=", "camera~", "text~", "text=", "path~", "folder~", "facts.lang=", "facts.lang<", "facts.lang~"]),
)
def test_no_value_reaches_sql_as_sql(c: Catalog, items: dict[int, object], wild: str, name: str) -> None:
    before = c.count()
    quoted = re.sub(r"(['\"\\*?~\[\]])", r"\\\1", wild)
    if wild or name in ("facts.lang=", "facts.lang<"):
        where_ = parse([f"{name}'{quoted}'"])
        passing, others = set(c.select(where_)), set(c.select(Not(where_)))
        assert not passing & others
        assert passing | others == set(items)
    assert c.count() == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wild=anything.filter(bool))
def test_whatever_was_put_is_found_by_its_own_value(tmp_path_factory: pytest.TempPathFactory, wild: str) -> None:
    quoted = re.sub(r"(['\"\\*?~\[\]])", r"\\\1", wild)
    with Catalog.create(tmp_path_factory.mktemp("w") / "c") as c:
        c.bind("m", DIM, {})
        name = wild.replace("/", "-")
        path = f"/r/{name}/x" if name not in (".", "..") else "/r/y/x"
        put_ = Put(kind="image", content_hash="h", path=path, camera=wild, text=wild, facts={"f": wild}, vectors=ONE)
        (item_id, _) = c.commit(
            [put_, Put(kind="image", content_hash="i", path="/some other folder/x", camera="~", vectors=ONE)]
        )
        for form in ("camera=", "text=", "facts.f=", "camera~", "text~", "facts.f~"):
            assert item_id in c.select(parse([f"{form}'{quoted}'"])), form
            assert item_id not in c.select(parse([f"not {form}'{quoted}'"])), form
        if "\0" not in name and name not in (".", ".."):
            folder = re.sub(r"(['\"\\*?~\[\]])", r"\\\1", name)
            assert c.select(parse([f"folder='{folder}'"])).tolist() == [item_id]


def test_facts_follow_their_item(tmp_path: Path) -> None:
    with Catalog.create(tmp_path / "c") as c:
        c.bind("m", DIM, {})

        def stars(n: int) -> list[int]:
            found: list[int] = c.select(parse([f"facts.stars={n}"])).tolist()
            return found

        (a,) = c.commit([Put(kind="image", content_hash="t", path="/a.jpg", facts={"stars": 1}, vectors=ONE)])
        (b,) = c.commit([Put(kind="image", content_hash="t", copy_from=a, path="/b.jpg")])
        assert stars(1) == [a, b]
        c.commit([Put(kind="image", content_hash="t2", facts={"stars": 2}, item_id=a, vectors=ONE)])
        assert (stars(1), stars(2)) == ([b], [a])
        c.commit([Put(kind="image", content_hash="t3", item_id=a, vectors=ONE)], gone=[b])
        assert (stars(1), stars(2)) == ([], [])
        with pytest.raises(CollectionError, match="changed in the meantime"):
            c.commit(
                [
                    Put(kind="image", content_hash="t4", facts={"stars": 1}, item_id=a, vectors=ONE),
                    Put(kind="image", content_hash="?", copy_from=b),
                ]
            )
        assert stars(1) == []


def test_what_another_process_writes_is_seen(tmp_path: Path) -> None:
    with Catalog.create(tmp_path / "c") as c, Catalog.open(tmp_path / "c") as other:
        c.bind("m", DIM, {})
        (a,) = c.commit([Put(kind="image", content_hash="a", path="/p/one/a", camera="Canon", vectors=ONE)])
        filters = [parse([e]) for e in ("folder=*", "camera~canon", "not camera~nikon", "not folder=two", "folder=/p")]
        assert [other.select(f).tolist() for f in filters] == [[a]] * 5
        (b,) = c.commit([Put(kind="image", content_hash="b", path="/p/three/a", camera="Canon EOS", vectors=ONE)])
        assert [other.select(f).tolist() for f in filters] == [[a, b]] * 5
        with other.snapshot():
            assert other.count()["image"] == 2  # from here on it is of one moment
            c.commit(gone=[a])
            assert other.select(filters[0]).tolist() == [a, b]
        assert [other.select(f).tolist() for f in filters] == [[b]] * 5


def test_a_catalog_that_cannot_be_written_can_be_filtered(c: Catalog) -> None:
    with Catalog.open(c.path.parent, readonly=True) as opened:
        assert opened.select(parse(["camera~canon"])).tolist() == c.select(parse(["camera~canon"])).tolist()


def test_many_different_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_MANY", 50)
    with Catalog.create(tmp_path / "c") as c:
        c.bind("m", DIM, {})
        ids = c.commit(
            [
                Put(kind="image", content_hash=str(n), path=f"/p/{n % 40}/{n}", camera=f"cam {n}", vectors=ONE)
                for n in range(150)
            ]
        )
        even = parse([" or ".join(f"folder=*{digit}" for digit in "02468")])
        assert c.select(even).tolist() == ids[::2]
        assert c.plan(parse(["camera~cam"])).terms is None  # too many to look at each
        assert c.select(parse(["camera~'cam 7'"])).tolist() == [ids[n] for n in (7, *range(70, 80))]
        assert c.select(parse(["not camera~'cam 1'"])).tolist() == [i for n, i in enumerate(ids) if not str(n).startswith("1")]


def test_filters_use_the_indexes(c: Catalog) -> None:
    """None of these reads a table, or an index from end to end."""
    plans = {
        e: c._rows(
            "EXPLAIN QUERY PLAN " + " UNION ALL ".join(query for query, _ in plan.terms),
            [v for _, vs in plan.terms for v in vs],
        )
        for e in FIELDS
        if (plan := c.plan(parse([e]))).terms and e not in ("has size", "has path", "folder=/") and not e.startswith("path")
    }
    for expression, steps in plans.items():
        for *_, step in steps:
            if step.startswith(("SEARCH", "SCAN")):
                assert step.startswith("SEARCH"), (expression, step)
                assert "INDEX" in step or "PRIMARY KEY" in step, (expression, step)
    assert len(plans) > 60


def test_the_migration_fills_the_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from e5v_search.catalog import migrations, writing

    steps = migrations.MIGRATIONS
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", tuple(step for step in steps if step[0] != "filters"))
        patch.setattr(writing, "write_facts", lambda *_, **__: None)
        with Catalog.create(tmp_path / "c") as old:
            old.bind("m", DIM, {})
            ids = old.commit(
                [
                    Put(kind="text", content_hash=str(n), text="x", facts={"n": n} if n % 2 else {}, vectors=ONE)
                    for n in range(9)
                ]
            )
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", steps)
        with Catalog.open(tmp_path / "c") as new:
            assert new.select(parse(["facts.n>=4"])).tolist() == [ids[5], ids[7]]
            assert new.select(parse(["not has facts.n"])).tolist() == ids[::2]
