"""A collection's database: one transaction makes an item, its file and its vectors visible together."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.catalog import writing
from e5v_search.catalog.checks import problems
from e5v_search.catalog.connection import Database, damaged, guarded, now, to_sql, transaction
from e5v_search.catalog.files import BLOCK, Files
from e5v_search.catalog.overview import ROWS, Overview
from e5v_search.catalog.records import KINDS, VIEW, Corpus, Failed, FileRow, Item, Put
from e5v_search.catalog.store import Row
from e5v_search.catalog.transfer import Transfer
from e5v_search.catalog.where import Plan, Where
from e5v_search.errors import CatalogDamaged
from e5v_search.filters import Filter

_ITEM = (
    "SELECT i.id, i.kind, f.path, f.part, i.text, i.content_hash, i.width, i.height, i.taken_at, i.lat, i.lon, i.camera,"
    " i.format, i.facts FROM items i LEFT JOIN files f ON f.item_id = i.id"
)


class Catalog(Files, Transfer):
    """Items and their vectors, and the files that they come from."""

    def __init__(self, path: Path, db: Database) -> None:
        super().__init__(path, db)
        self._where = Where(db, self._rows, lambda: self.state)

    # items

    def items(self, ids: Iterable[int]) -> dict[int, Item]:
        """The items among `ids` that exist, by id."""
        rows = self._among(f"{_ITEM} WHERE i.id IN ({{}})", [int(i) for i in ids])
        with guarded(self.path):
            return {row[0]: _item(row) for row in rows}

    def item_by_path(self, path: str) -> Item | None:
        """The photo at `path`."""
        rows = self._rows(f"{_ITEM} WHERE f.path = CAST(? AS TEXT) AND f.kind = 'image'", (to_sql(path),))
        with guarded(self.path):
            return _item(rows[0]) if rows else None

    def count(self) -> dict[str, int]:
        """Number of items of each kind, kinds without any included."""
        return dict.fromkeys(KINDS, 0) | dict(self._rows("SELECT kind, count(*) FROM items GROUP BY kind"))

    def same_content(self, hashes: Sequence[str], kind: str) -> dict[str, int]:
        """The first item of `kind` with a vector for each content hash that has one."""
        query = (
            "SELECT content_hash, min(id) FROM items i WHERE kind = ? AND content_hash IN ({})"
            " AND EXISTS (SELECT 1 FROM vectors v WHERE v.item_id = i.id) GROUP BY content_hash"
        )
        return dict(self._among(query, [to_sql(h) for h in hashes], before=(kind,)))

    def ids_of_content(self, content_hash: str) -> list[int]:
        """Every item, of any kind, with this content."""
        rows = self._rows("SELECT id FROM items WHERE content_hash = CAST(? AS TEXT) ORDER BY id", (to_sql(content_hash),))
        return [row[0] for row in rows]

    def sample(self, n: int) -> np.ndarray:
        """Ids (m,) int64, ascending, of at most n items from all over the catalog, the same each time."""
        least, most = self._rows("SELECT coalesce(min(id), 0), coalesce(max(id), -1) FROM items")[0]
        drawn = np.random.default_rng(0).integers(least, most, n, endpoint=True).tolist() if least <= most else []
        query = f"SELECT (SELECT min(id) FROM items WHERE id >= column1) FROM (VALUES {', '.join(['(?)'] * n)})"
        return np.unique(np.array([row[0] for row in self._rows(query, drawn)] if drawn else [], dtype=np.int64))

    def newest(self, start: int, n: int) -> list[int]:
        """Ids of the items from the `start`-th newest on, by date, those without one last, then by id; `n` at most."""
        query = "SELECT id FROM items ORDER BY taken_at DESC, id DESC LIMIT ? OFFSET ?"
        return [row[0] for row in self._rows(query, (n, start))]

    def overview(self) -> Overview:
        """What all items together consist of. Reads a row of each."""
        return Overview(self._rows(ROWS))

    # filters

    def select(self, where: Filter, plan: Plan | None = None) -> np.ndarray:
        """Ids (n,) int64, ascending, of the items that pass."""
        with self.snapshot():  # what a plan was made from must be what is then read
            return self._where.select(where, plan)

    def passing(self, ids: Sequence[int] | np.ndarray, where: Filter) -> np.ndarray:
        """Ids (m,) int64, ascending, of those items among `ids` that exist and pass."""
        return self._where.passing(ids, where)

    def plan(self, where: Filter) -> Plan:
        """How `select` would go about it, and what that would cost."""
        return self._where.plan(where)

    # vectors

    def vectors(
        self, after: int = 0, ids: Sequence[int] | np.ndarray | None = None, view: str = VIEW, item: int = -1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks (ids int64 (n,), x float16 (n, dim)) of the vectors written by states later than `after`; n <= BLOCK.

        They come by state, and then by id; of the state after `after`, those of ids up to `item` are left out.

        Each block is read by itself: no transaction stays open while the caller works. What is written in the meantime is
        left out, so read `state` first; `vectors(after=state)` later brings whatever was missed.
        """
        if ids is not None:
            query = "SELECT item_id, embedding FROM vectors WHERE view = ? AND state > ? AND item_id IN ({})"
            for start in range(0, len(ids), BLOCK):
                chosen = [int(i) for i in ids[start : start + BLOCK]]
                if rows := list(self._among(query, chosen, before=(view, after))):
                    yield self._block(rows)
            return
        query = (
            "SELECT item_id, embedding, state FROM vectors WHERE view = ? AND (state, item_id) > (?, ?) AND state <= ?"
            " ORDER BY state, item_id LIMIT ?"
        )
        upto, last = self.state, (after + 1, item)
        while rows := self._rows(query, (view, *last, upto, BLOCK)):
            yield self._block(rows)
            last = rows[-1][2], rows[-1][0]

    def _block(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        dim = self.dim or 0
        wrong = [row[0] for row in rows if len(row[1]) != 2 * dim]
        if wrong:
            raise damaged(self.path, f"the vector of item {wrong[0]} has not {dim} numbers")
        x = np.frombuffer(b"".join(row[1] for row in rows), "<f2").astype(np.float16, copy=False)
        return np.array([row[0] for row in rows], dtype=np.int64), x.reshape(-1, dim)

    def written(self, item_id: int, view: str) -> int:
        """The state that wrote the vector of an item."""
        return int(self._rows("SELECT state FROM vectors WHERE item_id = ? AND view = ?", (item_id, view))[0][0])

    def pending(self, view: str) -> np.ndarray:
        """Ids (n,) int64, ascending, of the items that have no vector in `view` yet."""
        rows = self._rows(
            "SELECT id FROM items WHERE id NOT IN (SELECT item_id FROM vectors WHERE view = ?) ORDER BY id", (view,)
        )
        return np.array([row[0] for row in rows], dtype=np.int64)

    def removed(self, after: int = 0, view: str = VIEW) -> np.ndarray:
        """Ids (n,) int64 of the items removed, or written without a vector in `view`, by states later than `after`."""
        query = (
            "SELECT item_id FROM removed WHERE state > ?"
            " UNION SELECT w.item_id FROM vectors w WHERE w.view = ? AND w.state > ?"
            " AND NOT EXISTS (SELECT 1 FROM vectors v WHERE v.item_id = w.item_id AND v.view = ?)"
        )
        rows = self._rows(query, (after, VIEW, after, view))
        return np.array([row[0] for row in rows], dtype=np.int64)

    def count_vectors(self, view: str) -> int:
        """Number of items with a vector in `view`."""
        return int(self._rows("SELECT count(*) FROM vectors WHERE view = ?", (view,))[0][0])

    def changes(self, after: int, view: str, most: int) -> int:
        """How many vectors of `view` were written, and items removed, by states later than `after`; counts to `most`."""
        written = "SELECT count(*) FROM (SELECT 1 FROM vectors WHERE view = ? AND state > ? LIMIT ?)"
        removed = "SELECT count(*) FROM (SELECT 1 FROM removed WHERE state > ? LIMIT ?)"
        n = self._rows(written, (view, after, most))[0][0] + self._rows(removed, (after, most))[0][0]
        return min(int(n), most)

    # writing

    def commit(
        self,
        puts: Sequence[Put] = (),
        touched: Sequence[FileRow] = (),
        gone: Sequence[int] = (),
        failed: Sequence[Failed] = (),
        recovered: Sequence[tuple[str, str]] = (),
        moved: Sequence[FileRow] = (),
        completed: Sequence[tuple[int, str, np.ndarray]] = (),
        read: Sequence[Corpus] = (),
    ) -> list[int]:
        """All of it or, on any error, nothing, in one transaction.

        Removes the items `gone`, gives the parts `moved` their new names, writes `puts` with their files and vectors and
        the vectors (item, view, (dim,)) of `completed`, gives the photos `touched` their new size and time, clears the
        failures of `recovered` (path, kind) and of the photos of `puts`, records those of `failed`, and notes the files
        that were `read` whole. Returns the ids of the puts, in order. The state moves on if an item or a vector changed.
        """
        with guarded(self.path), transaction(self._db):
            ids = writing.write_items(self._db, puts, gone, moved, completed, self.dim)
            writing.touch(self._db, touched)
            mended = [(put.path, put.kind) for put in puts if put.path is not None and not put.part]
            writing.clear_failures(self._db, [*recovered, *mended])
            writing.record_failures(self._db, failed)
            writing.close_corpora(self._db, read)
        return ids

    def start_run(self) -> int:
        """Record that a run begins; a run without an end was killed."""
        with guarded(self.path):
            return int(self._db.execute("INSERT INTO runs (started_at) VALUES (?)", (now(),)).lastrowid or 0)

    def finish_run(self, run: int, counts: dict[str, Any]) -> None:
        self._write_many("UPDATE runs SET finished_at = ?, counts = ? WHERE id = ?", [(now(), json.dumps(counts), run)])

    def verify(self) -> list[str]:
        """One line per problem of the database; empty when all is well. Reads every vector."""
        found: list[str] = []
        try:
            with self.snapshot():
                for problem in problems(self._db, self.dim):
                    found.append(problem)
        except CatalogDamaged as error:
            found.append(str(error))
        return found


def _named(part: str | None) -> str | None:
    return part if part and not part.startswith(writing.DISPLACED) else None


def _item(row: Row) -> Item:
    values: list[Any] = [*row[:3], _named(row[3]), *row[4:-1], json.loads(row[-1])]
    return Item(*values)
