"""The language of --where: what it means, and that whatever is wrong with it is said in one line with its place."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from e5v_search.catalog import KINDS
from e5v_search.errors import QueryError
from e5v_search.filters import (
    CHOICES,
    EVERYTHING,
    And,
    Choice,
    Compare,
    Fact,
    Has,
    Match,
    Near,
    Not,
    Or,
    box,
    distance,
    parse,
)
from e5v_search.filters.tree import Filter

IMAGE, TEXT = Choice("kind", "image"), Choice("kind", "text")
TAKEN = Compare("taken", ">=", "2023-05")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("kind=image", IMAGE),
        ("kind = IMAGE", IMAGE),
        ("kind=image|text", Or((IMAGE, TEXT))),
        ("kind!=image", Not(IMAGE)),
        ("kind!=image|text", Not(Or((IMAGE, TEXT)))),
        ("not kind=image", Not(IMAGE)),
        ("NOT(kind=image)", Not(IMAGE)),
        ("kind=image and taken>=2023-05", And((IMAGE, TAKEN))),
        ("kind=image or kind=text and taken>=2023-05", Or((IMAGE, And((TEXT, TAKEN))))),
        ("(kind=image OR kind=text) and not taken>=2023-05", And((Or((IMAGE, TEXT)), Not(TAKEN)))),
        ("(" * 300 + "kind=image" + ")" * 300, IMAGE),
        ("has taken", Has("taken")),
        ("not has facts.stars", Not(Has("facts.stars"))),
        ("taken=2023", Compare("taken", "=", "2023")),
        ("taken<='2023-05-17 18:30'", Compare("taken", "<=", "2023-05-17T18:30")),
        ("taken<2024-02-29T23:59:59", Compare("taken", "<", "2024-02-29T23:59:59")),
        ("width>=1920", Compare("width", ">=", 1920)),
        ("height<1080px", Compare("height", "<", 1080)),
        ("megapixels>0.5", Compare("megapixels", ">", 0.5)),
        ("size>2MB", Compare("size", ">", 2_000_000)),
        ("size>'1.5 GiB'", Compare("size", ">", 1.5 * 2**30)),
        ("size=0", Compare("size", "=", 0)),
        ("size<=3kb", Compare("size", "<=", 3000)),
        ("orientation=square", Choice("orientation", "square")),
        ("near=48.85,2.35,10km", Near(48.85, 2.35, 10_000)),
        ("near='-48.85, +2.35, 500 m'", Near(-48.85, 2.35, 500)),
        ("facts.stars>=4", Fact("stars", ">=", "4", 4)),
        ("facts.stars=-4.5e1", Fact("stars", "=", "-4.5e1", -45.0)),
        ("facts.stars='4'", Fact("stars", "=", "4")),
        ("facts.a.b=x", Fact("a.b", "=", "x")),
        ('facts."Photo ID".x=x', Fact("Photo ID.x", "=", "x")),
        ("facts.n=99999999999999999999", Fact("n", "=", "99999999999999999999", 1e20)),
        ("facts.n=1e999", Fact("n", "=", "1e999")),
        ("facts.Straße=ja", Fact("Straße", "=", "ja")),
        ("facts.lang=''", Fact("lang", "=", "")),
        (r"facts.q='it\'s \"x\"'", Fact("q", "=", 'it\'s "x"')),
        (r"facts.q=a\ b\|c", Fact("q", "=", "a b|c")),
        (r"facts.q=C:\new", Fact("q", "=", r"C:\new")),
        ("facts.q=O'Neill", Fact("q", "=", "O'Neill")),
        ("facts.not=and", Fact("not", "=", "and")),
    ],
)
def test_meaning(text: str, meaning: Filter) -> None:
    assert parse([text]) == meaning


def test_several_expressions_are_all_to_pass() -> None:
    assert parse([]) == EVERYTHING == And(())
    assert parse(["kind=image", "taken>=2023-05 or kind=text"]) == And((IMAGE, Or((TAKEN, TEXT))))


def test_kinds_are_those_of_the_catalog() -> None:
    assert CHOICES["kind"] == KINDS


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("taken>=20x3", 8, "'20x3' is no date; write 2023, 2023-05"),
        ("taken>=2023-02-29", 8, "is no date"),
        ("taken>=2023-13", 8, "is no date"),
        ("taken>=2023-1", 8, "is no date"),
        ("taken>=0000", 8, "is no date"),
        ("taken>=2023-05-17T25", 8, "is no date"),
        ("taken>=２０２３", 8, "is no date"),
        ("kind=photo", 6, "'photo' is no kind; write image, text or rendered"),
        ("kind=imgae", 6, "did you mean image?"),
        ("orientation=wide", 13, "landscape, portrait or square"),
        ("taken>2020 and kinds=image", 16, "'kinds' is nothing to filter by; did you mean kind?"),
        ("qqq=x", 1, "known are kind, folder"),
        ("facts=3", 1, "facts.NAME"),
        ("has near", 5, "place"),
        ("has kinds", 5, "known are taken"),
        ("kind<image", 5, "kind takes = !=, not <"),
        ("near>1,2,3km", 5, "near takes"),
        ("taken~2020", 6, "taken takes"),
        ("width>1|2", 9, "several values go with"),
        ("width>=-3", 8, "'-3' is no width; write 1920"),
        ("width>=1e3", 8, "is no width"),
        ("width>=9" + "9" * 20, 8, "too large"),
        ("width>=9" + "9" * 400, 8, "too large"),
        ("size>2XB", 6, "500kB"),
        ("near=48.85,2.35", 6, "latitude, longitude and distance"),
        ("near=48.85,2.35,10", 6, "latitude, longitude and distance"),
        ("near=nan,0,1km", 6, "latitude, longitude and distance"),
        ("near=91,0,1km", 6, "is nowhere"),
        ("near=0,-180.1,1km", 6, "is nowhere"),
        ("near=0,0,9" + "9" * 400 + "km", 6, "too far"),
        ("camera=''", 8, "not has camera"),
        ("path=''", 6, "empty"),
        ("facts.lang~''", 12, "empty"),
        ("", 1, "empty"),
        (" \n", 1, "empty"),
        ("kind", 5, "an operator is missing"),
        ("kind=", 6, "a value is missing"),
        ("kind==image", 6, "a value is missing"),
        ("kind=image|", 12, "a value is missing"),
        ("text~'dog", 6, "not closed"),
        ("kind=image and", 15, "a name is missing"),
        ("not", 4, "a name is missing"),
        ("()", 2, "a name is missing"),
        ("(kind=image", 12, "')'"),
        ("kind=image)", 11, "the end must come here"),
        ("camera=Canon EOS", 14, "in quotes"),
        ("folder=trip(1)", 12, "in quotes"),
        ("kind=image, kind=text", 13, "the end must come here"),
        ("x" * 5000, 4001, "at most 4000 characters"),
        ("not " * 30 + "kind=image", 1, "nested more than"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, column: int, said: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse(["kind=image", text])
    line = str(caught.value)
    assert f": column {column}: " in line
    assert said in line.partition(": column ")[2]
    assert "\n" not in line
    assert repr(text)[:150] in line
    assert len(line) < 600


WORDS = r"""kind folder path taken width size near text facts.a facts. has not and or ( ) | = != < <= > >= ~ image 2023-05
10km 1,2,3km ' " \ * ** ? [a-c] [ ] [!/] ~/ ./ / '' é , 'a b'"""
words = st.sampled_from([*WORDS.split(), "\0", "\udcff", "\n"])


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=()), max_size=30), st.lists(words, max_size=12).map(" ".join)))
@example("path='\0'")
@example("folder=\ud800")
@example("folder=[z-a]")
@example("folder=[[:alpha:]")
@example("path=~")
@example("camera=[^]]")
def test_any_text_is_a_filter_or_an_error(text: str) -> None:
    said = "--where '': column 1: nothing is wrong"
    try:
        parse([text])
    except QueryError as error:
        said = str(error)
    assert re.match(r"--where .*: column \d+: .", said)
    assert said.isprintable()


leaves = st.one_of(
    st.sampled_from([IMAGE, TEXT, Not(IMAGE), Has("taken"), TAKEN, Near(1.5, -2.5, 3000)]),
    st.builds(Fact, st.just("a"), st.sampled_from(["=", "<", "<=", ">", ">="]), st.text(max_size=5)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(Not, inner), st.builds(And, st.tuples(inner, inner)), st.builds(Or, st.tuples(inner, inner, inner))
    ),
    max_leaves=8,
)


def written(where: Filter) -> str:
    match where:
        case And(parts):
            return f"({' and '.join(map(written, parts))})"
        case Or(parts):
            return f"({' or '.join(map(written, parts))})"
        case Not(part):
            return f"not {written(part)}"
        case Has(name):
            return f"has {name}"
        case Near(lat, lon, metres):
            return f"near={lat},{lon},{metres}m"
        case Fact(name, op, text):
            escaped = re.sub(r"(['\"\\])", r"\\\1", text)
            return f"facts.{name}{op}'{escaped}'"
        case Choice(name, value):
            return f"{name}={value}"
        case Compare(name, op, value):
            return f"{name}{op}{value}"
    raise AssertionError(where)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_a_tree_that_is_written_down_is_read_back(where: Filter) -> None:
    assert parse([written(where)]) == where


# globs


def matches(expression: str, value: str) -> bool:
    where = parse([expression])
    assert isinstance(where, Match)
    folded = value.lower() if where.folded else value
    found = re.compile(where.regex, re.DOTALL | (re.IGNORECASE if where.folded else 0)).match(value) is not None
    if found:  # what spares the regex must never contradict it
        assert where.needle in folded
        assert value.startswith(where.start)
    return found


PHOTO = "/home/me/Pictures/2019/2019-05 trip/IMG_1.jpg"


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("2019", True),  # subfolders are in it
        ("2019*", True),
        ("2019-05*", True),
        ("Pictures/2019", True),
        ("Pictures/*/*trip", True),
        ("Pictures/2019/", True),
        ("Pictures/**/*trip", True),
        ("me/**/2019/**/2019*", True),
        ("/", True),
        ("/home", True),
        ("/home/me/Pictures/2019", True),
        ("/home/*/Pictures", True),
        ("/**/2019-05\\ trip", True),
        ("/home/**", True),
        ("**", True),
        ("20[12]9", True),
        ("20[!3]9", True),
        ("201?", True),
        ("201", False),
        ("019*", False),
        ("pictures", False),  # as on disk
        ("IMG_1.jpg", False),  # a file is no folder
        ("/home/me/Pictures/2019/*/IMG*", False),
        ("Pictures/*trip", False),  # a star stays in its name
        ("Pictures?2019", False),
        ("Pictures[/]2019", False),
        ("Pictures[!x]2019", False),
        ("/2019", False),
        ("/home/*/2019", False),
        ("201\\?", False),
        ("me/**/2018/**", False),
    ],
)
def test_folder_globs(glob: str, found: bool) -> None:
    assert matches(f"folder='{glob}'", PHOTO) is found
    assert matches(f"folder='{glob}'", os.path.dirname(PHOTO) + "/") is found


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.jpg", True),
        ("IMG_?.jpg", True),
        ("2019*/*", True),
        ("/home/**/*.jpg", True),
        ("/home/**", True),
        (PHOTO.replace(" ", "\\ "), True),
        ("2019", False),
        ("*.JPG", False),
        ("/*.jpg", False),
        ("*trip", False),
    ],
)
def test_path_globs(glob: str, found: bool) -> None:
    assert matches(f"path={glob}", PHOTO) is found


@pytest.mark.parametrize(
    ("expression", "value", "found"),
    [
        ("camera='canon eos*'", "Canon EOS 5D", True),
        ("camera=canon", "Canon EOS 5D", False),
        ("camera=*d", "Canon EOS 5D", True),
        ("camera='*o?*5*'", "Canon\nEOS/5D", True),
        ("camera~eos", "Canon EOS 5D", True),
        ("camera~*", "Canon EOS 5D", False),  # contains knows no globs
        ("camera~CAFÉ", "le café", True),
        ("text~'50% off_'", "Now 50% OFF_!", True),
        ("format=jpg", "JPEG", True),
        ("camera='[x] 5'", "x 5", True),
        (r"camera='\[x\] 5'", "[x] 5", True),
        ("camera=[]a]5", "]5", True),
        ("camera=[]5", "[]5", True),
        ("camera=[!]a]5", "b5", True),
        ("camera=[a-]5", "-5", True),
        ("camera=[z-a]5", "m5", False),
        ("camera=[.*]", "x", False),
        ("camera=a.c", "abc", False),
    ],
)
def test_text_globs(expression: str, value: str, found: bool) -> None:
    assert matches(expression, value) is found


glob_signs = st.text(st.sampled_from("ab/*?.[]!é\n"), min_size=1, max_size=8)
names = st.text(st.sampled_from("ab.é\n["), min_size=1, max_size=4)


def plain_match(glob: list[str], names: list[str]) -> bool:
    """The textbook way, by all possibilities."""
    if not glob:
        return not names
    if glob[0] == "**":
        return any(plain_match(glob[1:], names[n:]) for n in range(len(names) + 1))
    return bool(names) and plain_name(glob[0], names[0]) and plain_match(glob[1:], names[1:])


def plain_name(glob: str, name: str) -> bool:
    if not glob:
        return not name
    if glob[0] == "*":
        return any(plain_name(glob[1:], name[n:]) for n in range(len(name) + 1))
    return bool(name) and glob[0] in ("?", name[0]) and plain_name(glob[1:], name[1:])


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.one_of(st.just("**"), st.text(st.sampled_from("ab?*.é"), min_size=1, max_size=5)), min_size=1, max_size=5),
    st.lists(names, min_size=1, max_size=6),
)
def test_globs_find_what_the_textbook_way_finds(glob: list[str], path: list[str]) -> None:
    glob = [re.sub(r"\*+", "*", part) if part != "**" else part for part in glob if part not in (".", "..")]
    assume(glob)
    folder = "/nowhere/" + "/".join(glob)
    expected = any(plain_match(["nowhere", *glob], ["nowhere", *path[:n]]) for n in range(len(path)))
    if glob[-1] != "**":  # of which see test_folder_globs
        assert matches(f"folder='{folder}'", "/nowhere/" + "/".join(path)) is expected
        expected = plain_match(["nowhere", *glob], ["nowhere", *path])
        assert matches(f"path='{folder}'", "/nowhere/" + "/".join(path)) is expected


@pytest.mark.parametrize("glob", ["*a" * 30 + "b", "/**/a*a*a*/**/a*a*a*/**/a*a*a*/**/b", "**/a/" * 20 + "b", "*?" * 40 + "b"])
def test_no_glob_takes_long(glob: str) -> None:
    start = time.process_time()
    for value in ("a" * 4000, "/a" * 2000, "/" + "a" * 200 + "/aaa" * 500):
        assert not matches(f"path={glob}", value)
        assert not matches(f"camera={glob}", value)
    # the naive way would take until the sun goes out
    assert time.process_time() - start < 60


def test_home_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real [1]"
    (real / "Pictures").mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    monkeypatch.chdir(real)
    photo = f"{os.path.realpath(real)}/Pictures/a.jpg"
    for folder in ("~", "~/Pictures", "~/P*", ".", "./Pictures", "../real*/Pictures", str(tmp_path / "link")):
        assert matches(f"folder='{folder}'", photo), folder
    assert not matches("folder=./Pic", photo)
    assert matches("path=~/Pictures/*.jpg", photo)


# distances


@pytest.mark.parametrize(
    ("here", "there", "km"),
    [
        ((48.8566, 2.3522), (51.5074, -0.1278), 343.6),  # Paris, London
        ((40.7128, -74.0060), (35.6762, 139.6503), 10_848.8),  # New York, Tokyo
        ((0, 179.9), (0, -179.9), 22.24),
        ((89.9, 0), (89.9, 180), 22.24),
        ((0, 0), (0, 180), 20_015.1),
        ((10, 20), (10, 20), 0),
    ],
)
def test_distances(here: tuple[float, float], there: tuple[float, float], km: float) -> None:
    assert distance(*here, *there) / 1000 == pytest.approx(km, rel=1e-3, abs=1e-6)


lats, lons = st.floats(-90, 90), st.floats(-180, 180)


@settings(max_examples=300, deadline=None)
@given(lats, lons, st.floats(0, 2.1e7), st.integers(0, 2**32))
@example(90, 0, 10, 1)
@example(-90, 30, 1e6, 1)
@example(0, 180, 0, 1)
@example(60, -180, 1e5, 1)
def test_a_box_holds_all_that_is_near(lat: float, lon: float, metres: float, seed: int) -> None:
    (south, north), sides = box(lat, lon, metres)
    rng = np.random.default_rng(seed)
    for bearing, part in zip(rng.uniform(0, 2 * math.pi, 50), rng.uniform(0, 1, 50) ** 0.1, strict=True):
        # the point that lies this far in that direction, by a formula other than the one tested
        arc = part * min(metres / 6_371_008.8, math.pi)
        a = math.radians(lat)
        b = math.asin(max(-1.0, min(1.0, math.sin(a) * math.cos(arc) + math.cos(a) * math.sin(arc) * math.cos(bearing))))
        turn = math.atan2(math.sin(bearing) * math.sin(arc) * math.cos(a), math.cos(arc) - math.sin(a) * math.sin(b))
        other_lat, other_lon = math.degrees(b), (lon + math.degrees(turn) + 540) % 360 - 180
        if distance(lat, lon, other_lat, other_lon) <= metres:
            assert south <= other_lat <= north
            assert any(west <= other_lon <= east for west, east in sides) or abs(abs(other_lat) - 90) < 1e-6


def test_lark_is_loaded_only_when_there_is_a_filter() -> None:
    code = (
        "import sys\nfrom e5v_search.filters import parse\nparse([])\nassert 'lark' not in sys.modules\n"
        "parse(['kind=image'])\nassert 'lark' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
