"""Filters in SQL. Whatever a user wrote reaches SQLite as a bound parameter.

A filter is written in two ways: as a test on one row, and, where an index can tell, as terms: SELECTs whose ids together
are those that pass, or, with a `rest` to be tested on each, hold all that pass.
"""

import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np

from e5v_search.catalog.connection import Database, to_sql
from e5v_search.filters import CHOICES, EVERYTHING, And, Choice, Compare, Fact, Filter, Has, Match, Near, Not, Or, box, distance

Row = tuple[Any, ...]
Sql = tuple[str, tuple[Any, ...]]
Leaf = Choice | Compare | Fact | Has | Match | Near

# the folder of a path with the separator at its end; written just so in the index files_folder, where only the CAST
# makes it a text like those that it is compared with
FOLDER = f"CAST(rtrim(path, replace(path, '{os.sep}', '')) AS TEXT)"
_COLUMNS = {
    "kind": "i.kind",
    "taken": "i.taken_at",
    "width": "i.width",
    "height": "i.height",
    "megapixels": "i.width * i.height",
    "orientation": "i.width - i.height",
    "camera": "i.camera",
    "format": "i.format",
    "place": "i.lat",
    "text": "i.text",
    "size": "f.size",
    "path": "f.path",
    "folder": FOLDER.replace("path", "f.path"),
}
_SIDES = {"landscape": ">", "portrait": "<", "square": "="}
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_OF_MOMENTS = {"<": "<", "<=": "<", ">": ">=", ">=": ">="}
_IN_FILES = {"size", "path", "folder"}
_FEW_VALUES = {"camera", "format", "folder"}  # shared by many items: their index tells all that there are
_TABLES = {"i": ("i.id", "items i"), "f": ("f.item_id", "files f"), "x": ("x.item_id", "facts x")}
_JOINED = "items i LEFT JOIN files f ON f.item_id = i.id"
_COMPOUND = 100  # terms of one statement; SQLite takes 500
_MANY = 20_000  # values of a column, too many to look at each
_REMEMBERED = 100  # answers of a catalog that has not changed
_VALUES = 500  # ids looked up by one statement
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)  # what SQLite's lower() does
_MAP = 1 << 30  # bytes


@dataclass(frozen=True)
class Plan:
    """How to find what passes."""

    terms: tuple[Sql, ...] | None  # None: by testing every row
    rest: Filter
    effort: int  # about how many entries of an index it costs


class Where:
    """The filters of one catalog. `state` tells when what was learned of its contents is no longer so."""

    def __init__(self, db: Database, rows: Callable[[str, Sequence[Any]], list[Row]], state: Callable[[], int]) -> None:
        self._db, self._rows, self._state = db, rows, state
        self._known: tuple[int, dict[Hashable, Any]] = (-1, {})
        self._prepared = False

    def select(self, where: Filter, plan: Plan | None = None) -> np.ndarray:
        """Ids (n,) int64, ascending, of the items that pass."""
        self._prepare()
        plan = plan or self.plan(where)
        if plan.terms is None:
            test, parameters = _test(where)
            found = [self._ids(f"SELECT i.id FROM {_JOINED} WHERE {test}", parameters)]
        else:
            test, parameters = _test(plan.rest)
            found = [np.empty(0, np.int64)]
            for query, before in _compounds(plan.terms):
                if plan.rest != EVERYTHING:
                    # CROSS keeps SQLite from turning the order round
                    query = (
                        f"SELECT i.id FROM ({query}) d CROSS JOIN items i ON i.id = d.id"
                        f" LEFT JOIN files f ON f.item_id = i.id WHERE {test}"
                    )
                found.append(self._ids(query, (*before, *parameters)))
        return np.unique(np.concatenate(found))

    def passing(self, ids: Sequence[int] | np.ndarray, where: Filter) -> np.ndarray:
        """Ids (m,) int64, ascending, of the items among `ids` that exist and pass."""
        self._prepare()
        test, parameters = _test(where)
        found = [np.empty(0, np.int64)]
        for start in range(0, len(ids), _VALUES):
            chunk = [int(i) for i in ids[start : start + _VALUES]]
            slots = ", ".join("?" * len(chunk))
            found.append(self._ids(f"SELECT i.id FROM {_JOINED} WHERE i.id IN ({slots}) AND {test}", (*chunk, *parameters)))
        return np.unique(np.concatenate(found))

    def plan(self, where: Filter) -> Plan:
        self._prepare()
        n = int(self._rows("SELECT coalesce(max(id), 0) FROM items", ())[0][0])
        found = self._plan(where, max(1000, n // 40))
        return Plan(None, EVERYTHING, n) if found is None else found

    def _prepare(self) -> None:
        if not self._prepared:
            self._db.conn.create_function("matches", 3, _matches, deterministic=True)
            self._db.conn.create_function("metres", 4, distance, deterministic=True)
            # Rows looked up all over a large file cost a third through a map, which only those who filter pay for:
            # its pages count as this process's memory.
            self._db.execute(f"PRAGMA mmap_size = {_MAP}")
            self._prepared = True

    def _ids(self, query: str, parameters: Sequence[Any]) -> np.ndarray:
        # as one text: a Python object for each takes four times as long
        [[text]] = self._rows(f"SELECT group_concat(id) FROM ({query})", parameters)
        return np.empty(0, np.int64) if text is None else np.fromstring(text, np.int64, sep=",")

    # plans

    def _plan(self, where: Filter, enough: int) -> Plan | None:
        """None where no index helps. Of the parts of an And, all of which help, the one with the fewest ids is taken,
        if they are fewer than `enough`."""
        if isinstance(where, And):
            plans = {part: plan for part in where.parts if (plan := self._plan(part, enough)) is not None}
            if not plans:
                return None
            # to join all items with their files takes longer than any index
            limits = (enough // 4, enough) + ((8 * enough,) if re.search(r"\bf\.", _test(where)[0]) else ())
            for limit in limits:  # where one part is narrow, the others are not counted far
                efforts = {part: self._count(plan.terms or (), limit) for part, plan in plans.items()}
                best = min(efforts, key=efforts.__getitem__)
                if efforts[best] < limit:
                    break
            else:
                return None
            others = tuple(part for part in where.parts if part is not best)
            return Plan(plans[best].terms, _both(others, plans[best].rest), 10 * efforts[best])
        if isinstance(where, Or):
            found = [self._plan(part, enough) for part in where.parts]
            plans_of_all = [plan for plan in found if plan is not None]
            if len(plans_of_all) < len(found):
                return None
            exact = all(plan.rest == EVERYTHING for plan in plans_of_all)
            terms = tuple(term for plan in plans_of_all for term in plan.terms or ())
            return Plan(terms, EVERYTHING if exact else where, sum(plan.effort for plan in plans_of_all))
        if isinstance(where, Not):
            opposite = _opposite(where.part)
            return self._absent(where.part) if opposite is None else self._plan(opposite, enough)
        terms_of_leaf = self._terms(where)
        return None if terms_of_leaf is None else Plan(terms_of_leaf, EVERYTHING, 0)

    def _terms(self, leaf: Leaf) -> tuple[Sql, ...] | None:
        if isinstance(leaf, Match) and leaf.name in _FEW_VALUES:
            return self._with_values(leaf, wanted=True)
        if isinstance(leaf, Match | Has) and leaf.name == "text":
            return None
        return (_term(*_leaf(leaf)),)

    def _absent(self, leaf: Filter) -> Plan | None:
        """What lacks a fact, or has other values of those that are few."""
        terms: tuple[Sql, ...] | None = None
        if isinstance(leaf, Match) and leaf.name in _FEW_VALUES:
            others = self._with_values(leaf, wanted=False)
            lacking = self._absent(Has(leaf.name))
            terms = None if others is None or lacking is None else others + (lacking.terms or ())
        elif isinstance(leaf, Has) and leaf.name in _IN_FILES:
            query = "SELECT (SELECT count(*) FROM items) = (SELECT count(*) FROM files)"
            terms = () if self._learn("files", lambda: self._rows(query, ())[0][0]) else None
        elif isinstance(leaf, Has) and leaf.name in _COLUMNS and leaf.name != "text":
            terms = (_term(f"{_COLUMNS[leaf.name]} IS NULL", ()),)
        return None if terms is None else Plan(terms, EVERYTHING, 0)

    def _with_values(self, leaf: Match, wanted: bool) -> tuple[Sql, ...] | None:
        """A term for each run of neighbouring values of a column that match, or do not."""
        terms: tuple[Sql, ...] | None = self._learn((leaf, wanted), lambda: self._runs(leaf, wanted))
        return terms

    def _runs(self, leaf: Match, wanted: bool) -> tuple[Sql, ...] | None:
        column = _COLUMNS[leaf.name]
        table = _TABLES[_alias(column)][1]
        query = (
            f"WITH RECURSIVE d(v) AS (SELECT min({column}) FROM {table} UNION ALL SELECT"
            f" (SELECT min({column}) FROM {table} WHERE {column} > d.v) FROM d WHERE d.v IS NOT NULL)"
            f" SELECT v FROM d WHERE v IS NOT NULL LIMIT {_MANY + 1}"
        )
        values = self._learn(leaf.name, lambda: [row[0] for row in self._rows(query, ())])
        if len(values) > _MANY:
            return None
        runs: list[tuple[str, str]] = []
        was_in = False
        for value in values:
            is_in = _is_match(leaf, value) == wanted
            if is_in and was_in:
                runs[-1] = (runs[-1][0], value)
            elif is_in:
                runs.append((value, value))
            was_in = is_in
        test = f"{column} BETWEEN CAST(? AS TEXT) AND CAST(? AS TEXT)"
        return tuple(_term(test, (to_sql(first), to_sql(last))) for first, last in runs)

    def _learn(self, key: Hashable, ask: Callable[[], Any]) -> Any:
        """What `ask` answers, asked again only when the catalog has changed."""
        state = self._state()
        if self._known[0] != state or len(self._known[1]) > _REMEMBERED:
            self._known = state, {}
        known = self._known[1]
        if key not in known:
            known[key] = ask()
        return known[key]

    def _count(self, terms: Sequence[Sql], enough: int) -> int:
        """How many ids there are, at most `enough`."""
        n = 0
        for query, parameters in _compounds(terms):
            if n < enough:
                n += self._rows(f"SELECT count(*) FROM ({query} LIMIT ?)", (*parameters, enough - n))[0][0]
        return n


def _both(parts: tuple[Filter, ...], rest: Filter) -> Filter:
    return And(parts) if rest == EVERYTHING else And((*parts, rest))


def _opposite(where: Filter) -> Filter | None:
    """`not where` without the not, where that can be said."""
    if isinstance(where, And):
        return Or(tuple(Not(part) for part in where.parts))
    if isinstance(where, Or):
        return And(tuple(Not(part) for part in where.parts))
    if isinstance(where, Not):
        return where.part
    if isinstance(where, Choice):
        others = tuple(Choice(where.name, value) for value in CHOICES[where.name] if value != where.value)
        return Or(others) if where.name == "kind" else Or((*others, Not(Has(where.name))))
    if isinstance(where, Compare):
        ops = (_OPPOSITE[where.op],) if where.op in _OPPOSITE else ("<", ">")
        return Or((*(Compare(where.name, op, where.value) for op in ops), Not(Has(where.name))))
    return None


def _alias(column: str) -> str:
    found = re.search(r"\b([ifx])\.", column)
    assert found is not None
    return found[1]


def _term(test: str, parameters: tuple[Any, ...]) -> Sql:
    item_id, table = _TABLES[_alias(test)]
    return f"SELECT {item_id} AS id FROM {table} WHERE {test}", parameters


def _compounds(terms: Sequence[Sql]) -> Iterator[Sql]:
    for start in range(0, len(terms), _COMPOUND):
        chunk = terms[start : start + _COMPOUND]
        yield " UNION ALL ".join(query for query, _ in chunk), tuple(value for _, values in chunk for value in values)


# tests on one row


def _test(where: Filter) -> Sql:
    if isinstance(where, And | Or):
        tests = [_test(part) for part in where.parts]
        joined = (" AND " if isinstance(where, And) else " OR ").join(test for test, _ in tests)
        return f"({joined or int(isinstance(where, And))})", tuple(value for _, values in tests for value in values)
    if isinstance(where, Not):
        test, values = _test(where.part)
        return f"NOT {test}", values
    test, values = _leaf(where)
    if "x." in test:
        return f"EXISTS (SELECT 1 FROM facts x WHERE x.item_id = i.id AND {test})", values
    # CASE leaves off at the first part that fails, the functions of our own coming last
    return f"CASE WHEN {test} THEN 1 ELSE 0 END", values


def _leaf(leaf: Leaf) -> Sql:
    """A test that may be NULL, which is false. Of facts it is one on a row of `facts x`."""
    if isinstance(leaf, Fact):
        return _fact(leaf)
    if isinstance(leaf, Near):
        return _near(leaf)
    if isinstance(leaf, Has):
        if leaf.name.startswith("facts."):
            return "x.name = CAST(? AS TEXT)", (to_sql(leaf.name[6:]),)
        return f"{_COLUMNS[leaf.name]} IS NOT NULL", ()
    if isinstance(leaf, Match) and leaf.name.startswith("facts."):
        test, values = _match(leaf, "x.value")
        return f"x.name = CAST(? AS TEXT) AND x.value >= '' AND {test}", (to_sql(leaf.name[6:]), *values)
    column = _COLUMNS[leaf.name]
    if isinstance(leaf, Match):
        return _match(leaf, column)
    if isinstance(leaf, Choice):
        return (f"{column} = ?", (leaf.value,)) if leaf.name == "kind" else (f"{column} {_SIDES[leaf.value]} 0", ())
    if isinstance(leaf.value, str):
        return _taken(leaf, column)
    # a photo has whole pixels: twelve and a half megapixels are 12,500,000 of them
    return f"{column} {leaf.op} ?", (round(leaf.value * 1e6) if leaf.name == "megapixels" else leaf.value,)


def _taken(leaf: Compare, column: str) -> Sql:
    # dates are texts; ~ sorts after all that may follow the digits given
    first, end = str(leaf.value), f"{leaf.value}~"
    if leaf.op == "=":
        return f"{column} >= ? AND {column} < ?", (first, end)
    return f"{column} {_OF_MOMENTS[leaf.op]} ?", (end if leaf.op in ("<=", ">") else first,)


def _match(leaf: Match, column: str) -> Sql:
    if leaf.name == "folder" and not leaf.folded:
        column = "f.path"  # a glob for all that a folder holds finds its files too, and a path is at hand
    tests: list[str] = []
    values: list[Any] = []
    if leaf.start:
        tests.append(f"{column} >= CAST(? AS TEXT) AND {column} < CAST(? AS TEXT)")
        values += [to_sql(leaf.start), to_sql(leaf.start) + b"\xff"]  # a byte that no text holds
    if leaf.needle:
        tests.append(f"instr({f'lower({column})' if leaf.folded else column}, CAST(? AS TEXT)) > 0")
        values.append(to_sql(leaf.needle))
    if not leaf.sufficient:
        tests.append(f"matches(?, ?, CAST({column} AS BLOB))")
        values += [to_sql(leaf.regex), leaf.folded]
    return " AND ".join(tests), tuple(values)


def _near(leaf: Near) -> Sql:
    (south, north), sides = box(leaf.lat, leaf.lon, leaf.metres)
    between = " OR ".join("i.lon BETWEEN ? AND ?" for _ in sides)
    test = f"i.lat BETWEEN ? AND ? AND ({between}) AND metres(i.lat, i.lon, ?, ?) <= ?"
    return test, (south, north, *(degrees for side in sides for degrees in side), leaf.lat, leaf.lon, leaf.metres)


def _fact(leaf: Fact) -> Sql:
    name, text = to_sql(leaf.name), to_sql(leaf.text)
    named, slot = "x.name = CAST(? AS TEXT) AND ", "CAST(? AS TEXT)"
    if leaf.number is None:  # numbers sort before all texts
        return f"{named}x.value {leaf.op} {slot} AND x.value >= ''", (name, text)
    if leaf.op == "=":
        return f"{named}x.value IN (?, {slot})", (name, leaf.number, text)
    return f"{named}x.value {leaf.op} ? AND x.value < ''", (name, leaf.number)


def _is_match(leaf: Match, value: str) -> bool:
    """What the SQL of `_match` says of a value."""
    if leaf.needle not in (value.translate(_LOWER) if leaf.folded else value):
        return False
    return leaf.sufficient or _compiled(leaf.regex, leaf.folded).match(value) is not None


def _matches(regex: bytes, folded: int, value: bytes | None) -> bool:
    if value is None:
        return False
    text = value.decode("utf-8", "surrogatepass")
    return _compiled(regex.decode("utf-8", "surrogatepass"), bool(folded)).match(text) is not None


@lru_cache(maxsize=256)
def _compiled(regex: str, folded: bool) -> re.Pattern[str]:
    return re.compile(regex, re.DOTALL | (re.IGNORECASE if folded else 0))
