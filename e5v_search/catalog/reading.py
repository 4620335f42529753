"""A file of texts is read again: which items it had are met once more, be it in another place, and which are not."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from e5v_search.catalog.connection import Database, to_sql, transaction

_CHUNK = 500
_HERE = (
    "i.kind = ? AND f.kind = i.kind AND f.path = CAST(? AS TEXT) AND i.id <= ? AND i.id NOT IN (SELECT item_id FROM claimed)"
)
_FIELDS = "f.part, i.content_hash, i.facts FROM items i JOIN files f ON f.item_id = i.id"


@dataclass(frozen=True, slots=True)
class Part:
    """An item of the file, as the catalog has it."""

    item_id: int
    part: str
    content_hash: str
    facts: dict[str, Any]


class Reading:
    """Each item is claimed by one text at most; what nobody has claimed in the end is not in the file any more.

    What is claimed is kept in a temporary table: a file may hold more texts than memory.
    """

    def __init__(self, db: Database, path: str, kind: str) -> None:
        self._db = db
        newest = db.execute("SELECT max(id) FROM items").fetchone()[0] or 0  # what is put meanwhile is not of before
        self._of = (kind, to_sql(path), newest)
        db.execute("CREATE TEMP TABLE claimed (item_id INTEGER PRIMARY KEY)")

    def close(self) -> None:
        self._db.execute("DROP TABLE claimed")

    @property
    def is_first(self) -> bool:
        """Whether the catalog has nothing of the file yet."""
        return (
            self._db.execute("SELECT 1 FROM files WHERE kind = ? AND path = CAST(? AS TEXT)", self._of[:2]).fetchone() is None
        )

    def match(self, texts: Sequence[tuple[str, str]]) -> list[Part | None]:
        """The items, claimed now, with the content of these texts (part, content hash); None where there is none.

        An item in the very place comes first, then any that the file had elsewhere.
        """
        found: list[Part | None] = [None] * len(texts)
        there = self.at([part for part, _ in texts])
        elsewhere: dict[str, list[int]] = {}
        for n, (part, content_hash) in enumerate(texts):
            row = there.get(part)
            if row is not None and row.content_hash == content_hash:
                found[n] = row
            else:
                elsewhere.setdefault(content_hash, []).append(n)
        self.claim(row.item_id for row in found if row is not None)
        moved: list[int] = []
        for content_hash, row in self._first_with(list(elsewhere)).items():
            first, *more = elsewhere[content_hash]
            found[first] = row
            moved.append(row.item_id)
            if more:  # the same text several times
                for n, other in zip(more, self._more_with(content_hash, row.item_id, len(more)), strict=False):
                    found[n] = other
                    moved.append(other.item_id)
        self.claim(moved)
        return found

    def at(self, parts: Sequence[str]) -> dict[str, Part]:
        """The items in these places that nobody has claimed, by place."""
        return {row.part: row for row in self._among("i.id", "f.part", parts)}

    def claim(self, ids: Iterable[int]) -> None:
        with transaction(self._db, "DEFERRED"):
            self._db.conn.executemany("INSERT INTO claimed VALUES (?)", ((item_id,) for item_id in ids))

    def unclaimed(self) -> Iterator[int]:
        """Ids of the items that the file has no more."""
        last = 0
        query = f"SELECT i.id FROM files f JOIN items i ON i.id = f.item_id WHERE {_HERE} AND i.id > ? ORDER BY i.id LIMIT 4096"
        while rows := self._db.execute(query, (*self._of, last)).fetchall():
            yield from (row[0] for row in rows)
            last = rows[-1][0]

    def _first_with(self, hashes: Sequence[str]) -> dict[str, Part]:
        # the other columns are then those of the row with the smallest id
        return {row.content_hash: row for row in self._among("min(i.id)", "i.content_hash", hashes, "GROUP BY i.content_hash")}

    def _more_with(self, content_hash: str, but: int, n: int) -> Iterator[Part]:
        return self._among("i.id", "i.content_hash", [content_hash], f"AND i.id != {but} ORDER BY i.id LIMIT {n}")

    def _among(self, item_id: str, column: str, values: Sequence[str], tail: str = "") -> Iterator[Part]:
        for start in range(0, len(values), _CHUNK):
            chunk = [to_sql(value) for value in values[start : start + _CHUNK]]
            slots = ", ".join("CAST(? AS TEXT)" for _ in chunk)
            query = f"SELECT {item_id}, {_FIELDS} WHERE {_HERE} AND {column} IN ({slots}) {tail}"
            for row_id, part, content_hash, facts in self._db.execute(query, (*self._of, *chunk)).fetchall():
                yield Part(row_id, part, content_hash, json.loads(facts))
