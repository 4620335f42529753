"""Files of texts, read text by text: a line of .txt, a row of .jsonl or .csv, a paragraph of .md.

Files are UTF-8, with or without a byte order mark, with either line end, and may be larger than memory. What cannot be
used is a `Bad` that names its line, and the reading goes on behind it.
"""

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

from e5v_search.errors import UnreadableFile, UsageError

Fact = str | int | float | bool

MAX_LINE = 1 << 20  # bytes of a line, characters of a paragraph or of a row that spans lines
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")  # 007 is a name, not a number
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)?\.\d+([eE][+-]?\d{1,2})?")
_MAX_ID = 500  # characters


@dataclass(frozen=True, slots=True)
class Line:
    number: int  # from 1
    text: str  # without its end
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """`part` names the text within its file: its id where it has one, else the number of its line or paragraph."""

    part: str
    text: str
    line: int  # where it begins
    facts: dict[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bad:
    line: int
    reason: str
    part: str | None = None  # where an id says which text it would have been


def read(path: str | os.PathLike[str]) -> Iterator[Text | Bad]:
    """The texts of the file at `path`, in order, each with its own part.

    Raises UsageError for a suffix that is not known, UnreadableFile where the file cannot be read (on).
    """
    check_suffix(path)
    return _READERS[_suffix(path)](path)


def check_suffix(path: str | os.PathLike[str]) -> None:
    if _suffix(path) not in SUFFIXES:
        raise UsageError(f"{os.fspath(path)} is no file of texts: its name must end in one of {' '.join(sorted(SUFFIXES))}")


def _suffix(path: str | os.PathLike[str]) -> str:
    return os.path.splitext(path)[1].lower()


def lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    """The lines of a UTF-8 file, one at a time. Raises UnreadableFile; the reason does not repeat the path."""
    try:
        with open(path, "rb") as file:
            number = 0
            while data := file.readline(MAX_LINE):
                number += 1
                if number == 1:
                    if data.startswith(_UTF_16):
                        raise UnreadableFile("it is in UTF-16; save it as UTF-8")
                    data = data.removeprefix(_BOM)
                if len(data) == MAX_LINE and not data.endswith(b"\n"):
                    _skip_line(file)
                    yield Line(number, "", f"longer than {MAX_LINE:,} bytes")
                    continue
                try:
                    yield Line(number, data.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8"))
                except UnicodeDecodeError as error:
                    yield Line(number, "", f"not UTF-8 (byte {error.start + 1} of the line)")
    except OSError as error:
        raise UnreadableFile((error.strerror or str(error)).lower()) from error


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
        pass


# text


def _read_txt(path: str | os.PathLike[str]) -> Iterator[Text | Bad]:
    for line in lines(path):
        if line.problem is not None:
            yield Bad(line.number, line.problem)
        elif text := line.text.strip():
            yield Text(str(line.number), text, line.number)


# JSON lines


def _read_jsonl(path: str | os.PathLike[str]) -> Iterator[Text | Bad]:
    names = _Names()
    for line in lines(path):
        if line.problem is not None:
            yield Bad(line.number, line.problem)
        elif line.text.strip():
            yield _from_json(line, names)


def _from_json(line: Line, names: "_Names") -> Text | Bad:
    try:
        row = json.loads(line.text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        return Bad(line.number, f"not JSON ({error})")
    if not isinstance(row, dict):
        return Bad(line.number, 'not of the form {"text": "…"}')
    text, name = row.pop("text", None), row.pop("id", None)
    if type(name) is int:
        name = str(name)
    if name is not None and not isinstance(name, str):
        return Bad(line.number, "the id is neither a string nor a whole number")
    facts = {key: value for key, value in row.items() if value is not None}
    wrong = next((key for key, value in facts.items() if not _is_plain(value)), None)
    if wrong is not None:
        return Bad(line.number, f"the fact {wrong!r} is neither a string, a number, true nor false", name)
    if text is None:
        return Bad(line.number, "it has no text", name)
    if not isinstance(text, str):
        return Bad(line.number, "the text is not a string", name)
    return names.text(line.number, name, text, facts)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _is_plain(value: Any) -> bool:
    if type(value) is int:
        return bool(abs(value) < 1 << 63)
    return isinstance(value, Fact)


class _Names:
    """Gives every text of a file its part, and each part to one text only."""

    def __init__(self) -> None:
        self._given: set[int] = set()  # hashes: the names themselves might not fit into memory

    def text(self, line: int, name: str | None, text: str, facts: dict[str, Fact]) -> Text | Bad:
        part = name or str(line)
        if len(part) > _MAX_ID or not part.isprintable():
            return Bad(line, f"the id is longer than {_MAX_ID} characters, or has some that cannot be printed")
        text = text.strip()
        if not text:
            return Bad(line, "the text is empty", name)
        if not _is_whole(text):
            return Bad(line, "the text holds half a character (a lone surrogate)", name)
        if hash(part) in self._given:
            return Bad(line, f"the id {part!r} was given to an earlier text")
        self._given.add(hash(part))
        return Text(part, text, line, facts)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# tables


class _BadLine(Exception):
    pass


class _Rows:
    """The lines of a table for csv.reader: one that is bad is raised, and the next call goes on behind it."""

    def __init__(self, source: Iterator[Line]) -> None:
        self._source = source
        self.number = 0

    def __iter__(self) -> "_Rows":
        return self

    def __next__(self) -> str:
        line = next(self._source)
        self.number = line.number
        if line.problem is not None:
            raise _BadLine(line.problem)
        return line.text + "\n"


def _read_csv(path: str | os.PathLike[str]) -> Iterator[Text | Bad]:
    source = lines(path)
    first = next(source, None)
    if first is None:
        return
    if first.problem is not None:
        yield Bad(1, first.problem)
        return
    delimiter = max(",;\t", key=first.text.count)  # of equals the comma
    try:
        [header] = csv.reader([first.text], delimiter=delimiter)
    except csv.Error as error:
        yield Bad(1, f"not CSV ({error})")
        return
    columns = [name.strip() for name in header]
    if columns.count("text") != 1 or len(set(columns)) < len(columns):
        yield Bad(1, f"the header must name one column text, and no column twice; it has: {', '.join(columns)}")
        return
    rows = _Rows(source)
    reader = csv.reader(rows, delimiter=delimiter, strict=True)
    names = _Names()
    while True:
        before = rows.number or 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except _BadLine as error:
            yield Bad(rows.number, str(error))
            continue
        except csv.Error as error:
            yield Bad(before + 1, f"not CSV ({error})")
            continue
        if any(value.strip() for value in values):
            yield _from_row(before + 1, columns, values, names)


def _from_row(line: int, columns: list[str], values: list[str], names: _Names) -> Text | Bad:
    if len(values) > len(columns):
        return Bad(line, f"{len(values)} values for {len(columns)} columns")
    row = {column: value.strip() for column, value in zip(columns, values, strict=False)}
    text, name = row.pop("text", ""), row.pop("id", "") or None
    return names.text(line, name, text, {column: _typed(value) for column, value in row.items() if column and value})


def _typed(value: str) -> Fact:
    if _INTEGER.fullmatch(value):
        return int(value)
    return float(value) if _DECIMAL.fullmatch(value) else value


# Markdown

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*")
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}")


class _Paragraphs:
    """Collects lines into paragraphs, each with the heading that it stands under."""

    def __init__(self) -> None:
        self._number = 0
        self._heading = ""
        self._begin()

    def _begin(self) -> None:
        self._lines: list[str] = []
        self._first = self._size = 0
        self._problem: str | None = None

    @property
    def one_line(self) -> bool:
        return len(self._lines) == 1 and self._problem is None

    def add(self, line: Line) -> None:
        self._first = self._first or line.number
        self._size += len(line.text) + 1
        if self._size > MAX_LINE:
            self._problem = self._problem or f"the paragraph is longer than {MAX_LINE:,} characters"
            self._lines.clear()
        elif self._problem is None:
            self._problem = line.problem and f"line {line.number}: {line.problem}"
            self._lines.append(line.text)

    def head(self, heading: str) -> None:
        self._heading = heading.strip()

    def underlined(self) -> None:
        """What was taken for a paragraph of one line is a heading."""
        self.head(self._lines[0])
        self._begin()

    def end(self, code: str | None = None) -> Iterator[Text | Bad]:
        """The paragraph so far. Lines of prose are joined; those of `code`, its language, stay as they are."""
        joined = " ".join(line.strip() for line in self._lines) if code is None else "\n".join(self._lines)
        if self._problem is not None or joined.strip():
            self._number += 1
            if self._problem is not None:
                yield Bad(self._first, self._problem)
            else:
                facts: dict[str, Fact] = {"heading": self._heading} if self._heading else {}
                yield Text(
                    str(self._number), joined.strip(), self._first, facts | ({"code": code or True} if code is not None else {})
                )
        self._begin()


def _read_md(path: str | os.PathLike[str]) -> Iterator[Text | Bad]:
    paragraphs = _Paragraphs()
    fence = ""  # that of the code which we are in
    language = ""
    front_matter = False
    for line in lines(path):
        if line.number == 1 and line.text.rstrip() == "---":
            front_matter = True
        elif front_matter:
            front_matter = line.text.rstrip() not in ("---", "...")
        elif fence:
            mark = line.text.strip()
            if len(mark) >= len(fence) and set(mark) == set(fence):
                yield from paragraphs.end(language)
                fence = ""
            else:
                paragraphs.add(line)
        elif line.problem is not None:
            paragraphs.add(line)
        elif match := _FENCE.fullmatch(line.text):
            yield from paragraphs.end()
            fence, language = match[1], match[2]
        elif match := _HEADING.fullmatch(line.text):
            yield from paragraphs.end()
            paragraphs.head(match[1] or "")
        elif paragraphs.one_line and _UNDERLINE.fullmatch(line.text):
            paragraphs.underlined()
        elif not line.text.strip() or _RULE.fullmatch(line.text):
            yield from paragraphs.end()
        else:
            paragraphs.add(line)
    yield from paragraphs.end(language if fence else None)
    if front_matter:
        yield Bad(1, "the front matter that begins here has no end")


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".md": _read_md}
SUFFIXES = frozenset(_READERS)
