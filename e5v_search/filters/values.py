"""One condition: its name, operator and values become a typed leaf of the tree."""

import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from e5v_search.filters import globs
from e5v_search.filters.tree import CHOICES, Choice, Compare, Fact, Filter, Has, Match, Near, Not, Or

if TYPE_CHECKING:
    from lark import Token

OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "~")
_EQUAL = ("=", "!=")
_TEXTUAL = ("=", "!=", "~")
_ORDERED = ("=", "!=", "<", "<=", ">", ">=")
_FIELDS: dict[str, tuple[str, ...]] = {
    "kind": _EQUAL,
    "folder": _TEXTUAL,
    "path": _TEXTUAL,
    "taken": _ORDERED,
    "width": _ORDERED,
    "height": _ORDERED,
    "megapixels": _ORDERED,
    "size": _ORDERED,
    "orientation": _EQUAL,
    "camera": _TEXTUAL,
    "format": _TEXTUAL,
    "near": _EQUAL,
    "text": _TEXTUAL,
}
NAMES = ", ".join([*_FIELDS, "facts.NAME"])
_MAY_LACK = ("taken", "width", "height", "size", "camera", "format", "place", "text", "path")

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2})(?:[T ]([0-9]{2})(?::([0-9]{2})(?::([0-9]{2}))?)?)?)?)?")
_DIGITS = r"[0-9]+(?:\.[0-9]+)?"
_POINT = re.compile(rf"\s*([+-]?{_DIGITS})\s*,\s*([+-]?{_DIGITS})\s*,\s*({_DIGITS})\s*(m|km)\s*", re.IGNORECASE)
_NUMBER = re.compile(rf"({_DIGITS})\s*([a-z]*)", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE)
_BYTES = {"": 1, "b": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("kmgt", start=1) for unit, base in (("b", 1000), ("ib", 1024))
}
_UNITS = {"width": {"": 1, "px": 1}, "height": {"": 1, "px": 1}, "megapixels": {"": 1, "mp": 1}, "size": _BYTES}
_EXAMPLES = {"width": "1920", "height": "1080", "megapixels": "12 or 0.5", "size": "500kB, 2MB or 1.5GB"}
_LARGEST = 1e15
_FORMATS = {"jpg": "jpeg", "heic": "heif", "tif": "tiff"}


class Wrong(Exception):
    """What is wrong, and at which place (0-based) of the expression."""

    def __init__(self, at: int, message: str) -> None:
        super().__init__(message)
        self.at = at


def condition(name: "Token", operator: "Token", found: Sequence["Token"]) -> Filter:
    """The filter of `name operator value|value…`. Raises Wrong."""
    op = str(operator)
    field = _name(name, tuple(_FIELDS))
    allowed = OPERATORS if field.startswith("facts.") else _FIELDS[field]
    if op not in allowed:
        raise Wrong(_at(operator), f"{field} takes {' '.join(allowed)}, not {op}")
    if len(found) > 1 and op not in _TEXTUAL:
        raise Wrong(_at(found[1]), f"several values go with {' '.join(_TEXTUAL)} only, not with {op}")
    if op == "!=":
        return Not(condition(name, operator.update(value="="), found))
    parts = tuple(_leaf(field, op, value) for value in found)
    return parts[0] if len(parts) == 1 else Or(parts)


def has(name: "Token") -> Filter:
    return Has(_name(name, _MAY_LACK))


def _name(token: "Token", known: Sequence[str]) -> str:
    if token.lower().startswith("facts."):
        return f"facts.{token[6:].replace(chr(34), '')}"
    name = token.lower()
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join([*known, 'facts.NAME'])}"
    raise Wrong(_at(token), f"{_shown(token)} is nothing to filter by; {hint}")


def _leaf(field: str, op: str, token: "Token") -> Filter:
    value, quoted = _unquoted(token)
    if not value and (op == "~" or not field.startswith("facts.")):
        raise Wrong(_at(token), "the value is empty" + (f"; what lacks it: not has {field}" if field in _MAY_LACK else ""))
    if field.startswith("facts."):
        text = globs.plain(value)
        return _contains(field, text) if op == "~" else Fact(field[6:], op, text, None if quoted else _plain_number(text))
    return _READERS.get(field, _match)(field, op, value, _at(token))


def _choice(field: str, op: str, value: str, at: int) -> Filter:
    known = CHOICES[field]
    if value.lower() in known:
        return Choice(field, value.lower())
    close = difflib.get_close_matches(value.lower(), known, 1)
    hint = f"did you mean {close[0]}?" if close else f"write {', '.join(known[:-1])} or {known[-1]}"
    raise Wrong(at, f"{_shown(value)} is no {field}; {hint}")


def _taken(field: str, op: str, value: str, at: int) -> Filter:
    found = _DATE.fullmatch(value)
    parts = found.groups() if found else (None,) * 6
    try:
        # what is not said is the first there is; year 0, which no date has, where nothing is
        year, month, day, hour, minute, second = [int(part or first) for part, first in zip(parts, "011000", strict=True)]
        datetime(year, month, day, hour, minute, second)
    except ValueError:
        raise Wrong(at, f"{_shown(value)} is no date; write 2023, 2023-05, 2023-05-17 or 2023-05-17T18:30") from None
    return Compare(field, op, value.replace(" ", "T"))


def _number(field: str, op: str, value: str, at: int) -> Filter:
    found, units = _NUMBER.fullmatch(value), _UNITS[field]
    if found is None or found[2].lower() not in units:
        raise Wrong(at, f"{_shown(value)} is no {field}; write {_EXAMPLES[field]}")
    number = float(found[1]) * units[found[2].lower()]
    if number > _LARGEST:
        raise Wrong(at, f"{_shown(value)} is too large; at most {_LARGEST:g}")
    return Compare(field, op, number)


def _near(field: str, op: str, value: str, at: int) -> Filter:
    found = _POINT.fullmatch(value)
    if found is None:
        raise Wrong(at, f"{_shown(value)} is no place; write latitude, longitude and distance: near=48.85,2.35,10km")
    lat, lon, reach = (float(part) for part in found.groups()[:3])
    if not (-90 <= lat <= 90 and -180 <= lon <= 180):
        raise Wrong(at, f"{_shown(value)} is nowhere; latitudes go from -90 to 90, longitudes from -180 to 180")
    metres = reach * (1000 if found[4].lower() == "km" else 1)
    if not math.isfinite(metres):
        raise Wrong(at, f"{_shown(value)} is too far; half around the earth are 20,015 km")
    return Near(lat, lon, metres)


def _match(field: str, op: str, value: str, at: int) -> Filter:
    if op == "~":
        return _contains(field, globs.plain(value))
    if field not in ("folder", "path"):
        if field == "format":
            value = _FORMATS.get(value.lower(), value)
        needle = max(globs.start(value), globs.literal(value), key=len)
        return Match(field, globs.text_glob(value), needle.lower() if needle.isascii() else "")
    try:
        value = globs.anchored(value)
    except ValueError:  # a NUL, or what no file name can hold
        raise Wrong(at, f"{_shown(value)} is no {field}") from None
    if field == "folder":
        value = globs.inside(value)
    needle, start = (text.replace("/", os.sep) for text in (globs.literal(value), globs.start(value)))
    return Match(field, globs.path_glob(value), needle, start, folded=False)


def _contains(field: str, text: str) -> Match:
    # without regard to case: of ASCII letters SQLite knows that too, of others only the regex
    simple = text.isascii()
    return Match(field, globs.contains(text), text.lower() if simple else "", sufficient=simple)


_READERS: dict[str, Callable[[str, str, str, int], Filter]] = {
    "kind": _choice,
    "orientation": _choice,
    "taken": _taken,
    "near": _near,
    **dict.fromkeys(_UNITS, _number),
}


def _unquoted(token: "Token") -> tuple[str, bool]:
    if token.type == "QUOTED":
        return str(token)[1:-1], True
    return str(token), False


def _plain_number(text: str) -> int | float | None:
    if _PLAIN_NUMBER.fullmatch(text) is None:
        return None
    number = float(text)
    if not math.isfinite(number):
        return None
    whole = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else 2**63
    return whole if -(2**63) <= whole < 2**63 else number


def _shown(value: str) -> str:
    return repr(str(value) if len(value) <= 80 else value[:79] + "…")


def _at(token: "Token") -> int:
    return token.start_pos or 0
