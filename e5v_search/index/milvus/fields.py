"""What Milvus is told of an item beside its vector, and filters in Milvus' own language over it.

Only what the catalog cannot change without writing the vector anew stands there, so that it is never out of date: of a
file its path, but not its size.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from e5v_search.filters import And, Choice, Compare, Filter, Has, Not, Or

TEXT_BYTES = 65_535  # the longest VARCHAR, and the largest JSON
TEXTS = ("kind", "path", "text", "taken_at", "camera", "format", "orientation")
WHOLE = ("width", "height", "pixels")
NUMBERS = ("lat", "lon")
_MOST = 2**63 - 1
_NAMES = {"taken": "taken_at", "megapixels": "pixels", "place": "lat"} | {
    name: name for name in ("camera", "format", "text", "path", "width", "height", "orientation")
}
_OPPOSITE = {"=": "!=", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


def fields(item: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all fields, None where there is none, of an item by the catalog's names."""
    values: dict[str, Any] = {name: _clipped(item.get(name)) for name in TEXTS}
    width, height = item["width"], item["height"]
    values |= {"width": width, "height": height, "pixels": None, "orientation": None}
    if width is not None and height is not None:
        values["pixels"] = max(-_MOST, min(width * height, _MOST))
        values["orientation"] = "landscape" if width > height else "portrait" if width < height else "square"
    for name in NUMBERS:
        values[name] = None if item[name] is None else max(-1e300, min(item[name], 1e300))
    facts = json.dumps(item["facts"])
    return values | {"facts": item["facts"] if len(facts) <= TEXT_BYTES else {}}


def _clipped(text: str | None) -> str | None:
    """What is no UTF-8, as names of files may be, is shown as a replacement."""
    if text is None:
        return None
    return text.encode("utf-8", "replace")[:TEXT_BYTES].decode("utf-8", "ignore")


def expression(where: Filter, yes: bool = True) -> str | None:
    """What passes the filter, or with `yes` False what does not; None for what Milvus cannot tell as the catalog does.

    A condition on something that is not known is false, and its negation true, whatever Milvus makes of NULL.
    """
    if isinstance(where, Not):
        return expression(where.part, not yes)
    if isinstance(where, And | Or):
        parts = [expression(part, yes) for part in where.parts]
        if None in parts:
            return None
        every = isinstance(where, And) == yes
        joined = (" and " if every else " or ").join(filter(None, parts))
        return f"({joined})" if joined else "id >= 0" if every else "id < 0"
    if isinstance(where, Has) and where.name in _NAMES:
        return f"{_NAMES[where.name]} is {'not ' * yes}null"
    if isinstance(where, Choice):
        return _compared(where.name, "=", json.dumps(where.value), yes, where.name != "kind")
    if isinstance(where, Compare) and where.name in _NAMES:
        return _taken(where, yes) if isinstance(where.value, str) else _number(where, where.value, yes)
    return None


def _compared(field: str, op: str, value: str, yes: bool, nullable: bool = True) -> str:
    op = op if yes else _OPPOSITE[op]
    test = f"{field} {'==' if op == '=' else op} {value}"
    return test if yes or not nullable else f"({field} is null or {test})"


def _taken(leaf: Compare, yes: bool) -> str:
    # dates are texts; ~ sorts after all that may follow the digits given
    first, end = json.dumps(leaf.value), json.dumps(f"{leaf.value}~")
    if leaf.op == "=":
        inside = _compared("taken_at", ">=", first, yes), _compared("taken_at", "<", end, yes)
        return f"({(' and ' if yes else ' or ').join(inside)})"
    op = {"<=": "<", ">": ">="}.get(leaf.op, leaf.op)
    return _compared("taken_at", op, first if op == leaf.op else end, yes)


def _number(leaf: Compare, value: float, yes: bool) -> str | None:
    """With whole numbers alone, as the fields hold."""
    if leaf.name == "megapixels":
        value = round(value * 1e6)
    if not abs(value) < _MOST or (leaf.op == "=" and value != int(value)):
        return None
    whole = math.ceil(value) if leaf.op in ("<", ">=") else math.floor(value)
    return _compared(_NAMES[leaf.name], leaf.op, str(whole), yes)
