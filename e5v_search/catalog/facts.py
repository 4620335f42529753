"""An item's own facts, one row for each value: the form in which filters ask for them."""

import json
import math
from collections.abc import Iterator
from typing import Any

from e5v_search.catalog.connection import Database, to_sql

_INSERT = "INSERT OR IGNORE INTO facts (name, value, item_id) VALUES (CAST(? AS TEXT), {}, ?)"
_TEXT, _NUMBER = _INSERT.format("CAST(? AS TEXT)"), _INSERT.format("?")


def write_facts(db: Database, item_id: int, facts: str, replace: bool = False) -> None:
    """The rows of the facts (JSON) of one item; `replace`: it may have some already."""
    if replace:
        db.execute("DELETE FROM facts WHERE item_id = ?", (item_id,))
    if facts == "{}":
        return
    for name, value in _flat("", json.loads(facts)):
        if isinstance(value, str):
            db.execute(_TEXT, (to_sql(name), to_sql(value), item_id))
        else:
            db.execute(_NUMBER, (to_sql(name), value, item_id))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str | int | float]]:
    """Every value below `value`: {"a": {"b": [1, 2]}} has two of the name a.b."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(name, inner)
    elif isinstance(value, bool):
        yield name, "true" if value else "false"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield name, float(value) if abs(value) < 10**300 else str(value)
    elif isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        yield name, value
