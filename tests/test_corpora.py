"""Files of texts as people have them: every format, every line end, and what is wrong with a line said with its number."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e5v_search import corpora
from e5v_search.corpora import Bad, Text, lines, read
from e5v_search.errors import UnreadableFile, UsageError

BOM = b"\xef\xbb\xbf"


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def texts(path: Path) -> list[tuple[str, str]]:
    return [(one.part, one.text) for one in read(path) if isinstance(one, Text)]


def bad(path: Path) -> list[tuple[int, str]]:
    return [(one.line, one.reason) for one in read(path) if isinstance(one, Bad)]


# lines


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("last", [True, False])
def test_lines_of_text(tmp_path: Path, end: str, bom: bytes, last: bool) -> None:
    body = end.join(["a dog", "", "  zwei Kinder, größer ", "\t", "日本"]) + end * last
    path = write(tmp_path, "c.TXT", bom + body.encode())
    assert texts(path) == [("1", "a dog"), ("3", "zwei Kinder, größer"), ("5", "日本")]
    assert bad(path) == []


def test_bad_lines_end_nothing(tmp_path: Path) -> None:
    long = b"x" * (corpora.MAX_LINE + 5)
    path = write(tmp_path, "c.txt", b"good\n\xff\xfe\nca\xe9\n" + long + b"\nend\n" + long)
    assert texts(path) == [("1", "good"), ("5", "end")]
    too_long = "longer than 1,048,576 bytes"
    assert bad(path) == [
        (2, "not UTF-8 (byte 1 of the line)"),
        (3, "not UTF-8 (byte 3 of the line)"),
        (4, too_long),
        (6, too_long),
    ]


def test_the_longest_line_is_whole(tmp_path: Path) -> None:
    longest = "x" * (corpora.MAX_LINE - 1)
    path = write(tmp_path, "c.txt", f"{longest}\nb\n")
    assert [text for _, text in texts(path)] == [longest, "b"]


def test_a_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    """A file larger than memory must not be read whole: what follows the first line may be anything."""
    path = write(tmp_path, "c.txt", "first\n")
    source = lines(path)
    assert next(source).text == "first"
    with path.open("a") as file:
        file.write("written later\n")
    assert next(source).text == "written later"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="no such file"):
        list(read(tmp_path / "none.txt"))
    with pytest.raises(UnreadableFile, match="UTF-16; save it as UTF-8"):
        list(read(write(tmp_path, "a.txt", "a dog".encode("utf-16"))))
    with pytest.raises(UsageError, match=r"a\.log is no file of texts: .* \.csv \.jsonl \.md \.txt"):
        read(tmp_path / "a.log")
    assert list(read(write(tmp_path, "empty.csv", ""))) == []
    assert list(read(write(tmp_path, "empty.jsonl", BOM))) == []


# JSON lines


def test_rows_of_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a dog", "id": "d1", "year": 1990, "good": True, "score": 0.5, "place": "Köln", "none": None},
        {"text": " a cat ", "id": 7},
        {"text": "no id"},
    ]
    path = write(tmp_path, "r.jsonl", "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n")
    facts = {"year": 1990, "good": True, "score": 0.5, "place": "Köln"}
    assert list(read(path)) == [Text("d1", "a dog", 1, facts), Text("7", "a cat", 2), Text("3", "no id", 3)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not JSON"),
        ('{"text": "a"', "not JSON"),
        ('["a"]', "not of the form"),
        ('{"id": "x"}', "no text"),
        ('{"text": null}', "no text"),
        ('{"text": 5}', "not a string"),
        ('{"text": "  "}', "text is empty"),
        (r'{"text": "\ud800"}', "half a character"),
        ('{"text": "a", "id": 1.5}', "id is neither"),
        ('{"text": "a", "id": true}', "id is neither"),
        (r'{"text": "a", "id": "x\ny"}', "cannot be printed"),
        (f'{{"text": "a", "id": "{"x" * 501}"}}', "longer than 500"),
        ('{"text": "a", "tags": ["x"]}', "fact 'tags' is neither"),
        ('{"text": "a", "at": {"x": 1}}', "fact 'at' is neither"),
        ('{"text": "a", "n": NaN}', "NaN is not a number"),
        ('{"text": "a", "n": -Infinity}', "-Infinity is not a number"),
        (f'{{"text": "a", "n": {1 << 70}}}', "fact 'n' is neither"),
        ('{"text": "a", "id": "first"}', "the id 'first' was given to an earlier text"),
        ('{"text": "a", "id": "3"}', "the id '3' was given to an earlier text"),  # the third line has no other
        ('{"text": ' + "[" * 100_000, "not JSON"),
    ],
)
def test_bad_rows_of_json(tmp_path: Path, line: str, reason: str) -> None:
    start = '{"text": "one", "id": "first"}\n\n{"text": "two"}\n'
    path = write(tmp_path, "r.jsonl", f'{start}{line}\n{{"text": "end"}}')
    assert texts(path) == [("first", "one"), ("3", "two"), ("5", "end")]
    [(number, said)] = bad(path)
    assert number == 4
    assert reason in said


def test_a_bad_row_says_which_text_it_would_have_been(tmp_path: Path) -> None:
    path = write(tmp_path, "r.jsonl", '{"id": "a"}\n{"id": 7, "text": ""}\n{"id": "b", "text": "x", "f": []}\n[]')
    assert [one.part for one in read(path) if isinstance(one, Bad)] == ["a", "7", "b", None]


# tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_a_table(tmp_path: Path, delimiter: str, end: str) -> None:
    rows = [
        ["id", " text ", "year", "rating", "code", ""],
        ["a", 'say "hi", you; there\tnow', "1990", "-0.5", "007", "x"],
        ["", "two\nlines", "", "1e5", "1.5e3", ""],
        ["3b", "short"],
    ]
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerows(rows)
    path = write(tmp_path, "t.csv", BOM + buffer.getvalue().encode() + end.encode())
    assert list(read(path)) == [
        Text("a", 'say "hi", you; there\tnow', 2, {"year": 1990, "rating": -0.5, "code": "007"}),
        Text("3", "two\nlines", 3, {"rating": "1e5", "code": 1500.0}),
        Text("3b", "short", 5, {}),
    ]


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    rows = [b"text,id", b"one,a", b"caf\xe9,b", b",c", b"x,d,e", b'"a"b,f', b"two,a", b"three,g", b'"no end', b"of it"]
    path = write(tmp_path, "t.csv", b"\n".join(rows))
    assert texts(path) == [("a", "one"), ("g", "three")]
    found = bad(path)
    assert [line for line, _ in found] == [3, 4, 5, 6, 7, 9]
    for (_, reason), said in zip(
        found, ["not UTF-8", "text is empty", "3 values for 2 columns", "not CSV", "earlier text", "not CSV"], strict=True
    ):
        assert said in reason


@pytest.mark.parametrize("header", ["text\rid", "text," + "x" * 200_000])
def test_a_header_that_is_no_csv(tmp_path: Path, header: str) -> None:
    [bad] = read(write(tmp_path, "t.csv", f"{header}\nx,y\n"))
    assert isinstance(bad, Bad)
    assert bad.line == 1
    assert bad.reason.startswith("not CSV (")


@pytest.mark.parametrize("header", ["caption,id", "text,text", "text,a,a", "Text,id"])
def test_a_table_without_a_column_of_texts(tmp_path: Path, header: str) -> None:
    path = write(tmp_path, "t.csv", f"{header}\nx,y,z\n")
    [(line, reason)] = bad(path)
    assert line == 1
    assert "one column text" in reason
    assert texts(path) == []


# Markdown


def test_paragraphs(tmp_path: Path) -> None:
    source = """---
title: not a text

---
Before any heading.

# Trip to the *sea* #
We went
  to the sea.
- one
- two
***
| a | b |

Second
------
```python
# no heading
a = 1

b = 2
```
Last words.
#hashtag is no heading
###
~~~~
```
~~~
~~~~
"""
    assert list(read(write(tmp_path, "n.md", source.replace("\n", "\r\n")))) == [
        Text("1", "Before any heading.", 5),
        Text("2", "We went to the sea. - one - two", 8, {"heading": "Trip to the *sea*"}),
        Text("3", "| a | b |", 13, {"heading": "Trip to the *sea*"}),
        Text("4", "# no heading\na = 1\n\nb = 2", 18, {"heading": "Second", "code": "python"}),
        Text("5", "Last words. #hashtag is no heading", 23, {"heading": "Second"}),
        Text("6", "```\n~~~", 27, {"code": True}),
    ]


def test_bad_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path, "n.md", b"one\n\ntwo\n\xff\nthree\n\nfour\n\n" + b"long\n" * 300_000 + b"\nfive\n")
    assert texts(path) == [("1", "one"), ("3", "four"), ("5", "five")]
    assert bad(path) == [
        (3, "line 4: not UTF-8 (byte 1 of the line)"),
        (9, "the paragraph is longer than 1,048,576 characters"),
    ]


def test_what_has_no_end(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.md", "```\na\n\nb\n")) == [("1", "a\n\nb")]
    assert bad(write(tmp_path, "b.md", "---\ntitle: x\ntext\n")) == [(1, "the front matter that begins here has no end")]


# whatever is in a file


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode),
    suffix=st.sampled_from(sorted(corpora.SUFFIXES)),
    header=st.sampled_from([b"", b"text,id\n"]),
)
def test_any_bytes_give_texts_and_bad_lines(tmp_path: Path, data: bytes, suffix: str, header: bytes) -> None:
    path = write(tmp_path, f"any{suffix}", header + data)
    if path.read_bytes().startswith((b"\xff\xfe", b"\xfe\xff")):
        with pytest.raises(UnreadableFile, match="UTF-16"):
            list(read(path))
        return
    found = list(read(path))
    good = [one for one in found if isinstance(one, Text)]
    assert len({one.part for one in good}) == len(good)
    count = (header + data).count(b"\n") + 1
    for one in found:
        assert 1 <= one.line <= count
    for text in good:
        assert text.text == text.text.strip() != ""
        assert text.part.isprintable()
        text.text.encode()
        json.dumps(text.facts, allow_nan=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8))
def test_json_lines_round_trip(tmp_path: Path, written: list[str]) -> None:
    path = write(tmp_path, "r.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in written))
    expected = [(str(n), text.strip()) for n, text in enumerate(written, start=1) if text.strip()]
    assert texts(path) == expected
    assert len(bad(path)) == len(written) - len(expected)
