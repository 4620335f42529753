"""Queries as values: what makes sense, how they are written on a command line, what is refused and where."""

import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from e5v_search.errors import QueryError
from e5v_search.query import Input, Query, Term, parse_input, parse_term, terms


@pytest.mark.parametrize(
    ("written", "term"),
    [
        ("snow", Term(Input("snow"))),
        ("snow:0.5", Term(Input("snow"), 0.5)),
        ("a dog on grass:2", Term(Input("a dog on grass"), 2.0)),
        ("image:beach.jpg", Term(Input(image="beach.jpg"))),
        ("image:beach.jpg:1.5", Term(Input(image="beach.jpg"), 1.5)),
        ("image:17", Term(Input(image=17))),
        ("image:17:0.25", Term(Input(image=17), 0.25)),
        ("text:image", Term(Input("image"))),
        ("text:7", Term(Input("7"))),
        ("text:image:3", Term(Input("image"), 3.0)),
        ("note: a dog", Term(Input("note: a dog"))),
        ("at 10:30am", Term(Input("at 10:30am"))),
        ("at 10:30:1", Term(Input("at 10:30"), 1.0)),
        ("snow:1e-3", Term(Input("snow"), 0.001)),
        ("two\nlines:2", Term(Input("two\nlines"), 2.0)),
    ],
)
def test_terms_as_written(written: str, term: Term, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_term(written) == term


@pytest.mark.parametrize(
    ("written", "column"),
    [("snow:0", 6), ("snow:-1", 6), ("snow:nan", 6), ("a:inf", 3), ("snow:0.5.3", 6), ("snow:0,5", 6), ("image:a.jpg:-2", 13)],
)
def test_a_wrong_weight_is_named_with_its_place(written: str, column: int) -> None:
    with pytest.raises(QueryError) as refused:
        parse_term(written)
    [line] = str(refused.value).splitlines()
    assert repr(written) in line
    assert f"(column {column})" in line
    assert written[column - 1 :] in line


@given(st.text(min_size=1).filter(str.strip), st.floats(min_value=1e-6, max_value=1e6))
def test_any_text_with_a_weight_comes_back(text: str, weight: float) -> None:
    term = parse_term(f"text:{text}:{weight!r}")
    assert (term.input.text, term.weight) == (text, weight)


@given(st.text())
def test_whatever_is_written_is_a_term_or_refused_in_one_line(text: str) -> None:
    with suppress(QueryError):
        term = parse_term(text)
        assert 0 < term.weight < math.inf
        assert (term.input.text or "").strip() or term.input.image is not None


def test_a_number_is_an_item_unless_there_is_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_input("12") == Input(image=12)
    Path("12").write_bytes(b"")
    assert parse_input("12") == Input(image="12")
    assert parse_input("text:12") == Input(text="12")


def test_a_missing_file_is_perhaps_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryError, match="there is no file 'a dog'; a text is written 'text:a dog'"):
        parse_input("a dog")


def test_terms_of_python() -> None:
    picture = Image.new("RGB", (4, 4))
    assert terms(["snow", ("rain", 0.5), 12, (Path("a.jpg"), 2), picture, Term(Input("x"), 3)]) == (
        Term(Input("snow")),
        Term(Input("rain"), 0.5),
        Term(Input(image=12)),
        Term(Input(image=Path("a.jpg")), 2),
        Term(Input(image=picture)),
        Term(Input("x"), 3),
    )
    with pytest.raises(QueryError, match="the weight -1 is not a number above 0"):
        terms([("snow", -1)])


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ({}, "nothing to search for"),
        ({"minus": terms(["snow"])}, "only what to avoid"),
        ({"text": " \n"}, "the query text is empty"),
        ({"image": "a.jpg", "modify": ""}, "the modify text is empty"),
        ({"modify": "at night"}, "--modify changes a picture"),
        ({"text": "a", "image": "a.jpg", "modify": "b"}, "not both"),
    ],
)
def test_queries_that_make_no_sense(query: dict[str, object], complaint: str) -> None:
    with pytest.raises(QueryError, match=complaint):
        Query(**query).inputs  # type: ignore[arg-type]  # noqa: B018


def test_a_query_as_json() -> None:
    query = Query("dogs", "a.jpg", plus=terms([("snow", 0.5)]), minus=terms([7]), where=("kind=image",))
    assert query.to_json() == {
        "text": "dogs",
        "image": "a.jpg",
        "plus": [{"text": "snow", "weight": 0.5}],
        "minus": [{"image": 7, "weight": 1.0}],
        "where": ["kind=image"],
    }
    assert Query(image=b"bytes", modify="at night").to_json() == {"image": "<picture>", "modify": "at night"}
