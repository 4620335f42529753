"""A collection's database: one transaction makes an item, its file and its vector visible together."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

import numpy as np
from sqlite_utils import Database

from e5v_search.catalog import connection, writing
from e5v_search.catalog.checks import problems
from e5v_search.catalog.connection import damaged, guarded, now, to_sql, transaction
from e5v_search.catalog.migrations import migrate, newest, schema_version
from e5v_search.catalog.records import KINDS, VIEW, FileRow, Item, Put
from e5v_search.errors import (
    CatalogDamaged,
    CollectionError,
    CollectionNotFound,
    FingerprintMismatch,
    SchemaTooNew,
    from_os_error,
)

CATALOG = "catalog.sqlite"
BLOCK = 4096  # rows read at once
_CHUNK = 500  # values looked up by one statement: older SQLite takes 999

Row = tuple[Any, ...]

_FILE = "SELECT f.path, f.item_id, f.size, f.mtime_ns, f.on_mount, i.content_hash FROM files f JOIN items i ON i.id = f.item_id"
_ITEM = (
    "SELECT i.id, i.kind, f.path, i.text, i.content_hash, i.width, i.height, i.taken_at, i.lat, i.lon, i.camera, i.format,"
    " i.facts FROM items i LEFT JOIN files f ON f.item_id = i.id"
)


class Catalog:
    """One connection to the catalog of the collection in a folder.

    Belongs to the thread that opened it. Any number of readers, in any process, go on reading while one writes. Every
    method raises the errors of the tree below CollectionError where the disk or the file fails.
    """

    def __init__(self, path: Path, db: Database) -> None:
        self.path = path
        self._db = db
        self.uid: str = self._meta("uid")  # random, made at creation: tells this catalog from another in the same place

    @classmethod
    def create(cls, folder: Path) -> Self:
        """A new, empty catalog in `folder`, which is made where it is missing. Raises CollectionError if there is one.

        Of several that make one in the same folder at the same moment, all get the same.
        """
        path = folder / CATALOG
        # under a name of its own first, so that a kill never leaves a half-made catalog under the real one
        unfinished = folder / f"{CATALOG}.{secrets.token_hex(4)}.new"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                raise CollectionError(f"{folder} holds a collection already")
            with guarded(path):
                db = connection.create(unfinished)
                try:
                    migrate(db)
                    db.execute("INSERT INTO meta VALUES ('uid', ?)", (secrets.token_hex(16),))
                finally:
                    db.close()
            _publish(unfinished, path)
        except OSError as error:
            raise from_os_error(error, path) from error
        finally:
            for suffix in ("", "-wal", "-shm"):
                with suppress(OSError):
                    unfinished.with_name(unfinished.name + suffix).unlink()
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, readonly: bool = False) -> Self:
        """The catalog in `folder`, brought up to this version's schema.

        With `readonly` nothing can be written, and a folder without write permission serves too. Raises CollectionNotFound,
        CatalogDamaged, SchemaTooNew, CollectionReadOnly.
        """
        path = folder / CATALOG
        if not path.exists():
            raise CollectionNotFound(f"there is no collection in {folder}; `e5v-search index PATH...` makes one")
        if not path.is_file():
            raise damaged(path, "it is not a file")
        with guarded(path):
            db = connection.connect(path, readonly)
            try:
                version = schema_version(db)
                if not version:
                    raise damaged(path, "it is no catalog of e5v-search")
                if version > newest():
                    raise SchemaTooNew(
                        f"{path} has schema {version}, of a newer e5v-search; this one knows up to {newest()}: "
                        "upgrade it with `pip install -U e5v-search`"
                    )
                if version < newest():
                    writer = connection.connect(path) if readonly else db
                    try:
                        migrate(writer)
                    finally:
                        if writer is not db:
                            writer.close()
                return cls(path, db)
            except BaseException:
                db.close()
                raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # what the catalog is bound to

    @property
    def state(self) -> int:
        """Number of the last commit that changed items or vectors."""
        return int(self._meta("state"))

    @property
    def fingerprint(self) -> str | None:
        value: str | None = self._meta("fingerprint")
        return value

    @property
    def dim(self) -> int | None:
        value: int | None = self._meta("dim")
        return value

    @property
    def model(self) -> dict[str, Any] | None:
        """How to load the model again, as given to `bind`."""
        value = self._meta("model")
        with guarded(self.path):
            model: dict[str, Any] | None = None if value is None else json.loads(value)
            return model

    @property
    def views(self) -> list[str]:
        """The prompt sets under which items have vectors, VIEW first."""
        value = self._meta("views")
        with guarded(self.path):
            views: list[str] = [VIEW] if value is None else json.loads(value)
            return views

    def add_views(self, views: Iterable[str]) -> None:
        """From now on every item is to have a vector in these views too."""
        with guarded(self.path), transaction(self._db):
            value = json.dumps(list(dict.fromkeys([*self.views, *views])))
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('views', ?)", (value,))

    def bind(self, fingerprint: str, dim: int, model: dict[str, Any]) -> None:
        """Bind the catalog to what makes its vectors, once for all. Raises FingerprintMismatch if it is bound to another."""
        with guarded(self.path), transaction(self._db):
            bound, bound_dim = self.fingerprint, self.dim
            if bound is None:
                rows = [("fingerprint", fingerprint), ("dim", dim), ("model", json.dumps(model))]
                self._db.conn.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            elif (bound, bound_dim) != (fingerprint, dim):
                raise FingerprintMismatch(
                    f"the collection {self.path.parent} was made by {bound} ({bound_dim} numbers a vector), "
                    f"not by {fingerprint} ({dim})"
                )

    # files

    def known(self, paths: Sequence[str]) -> dict[str, FileRow]:
        """The recorded files among `paths`, by path."""
        rows = self._among(f"{_FILE} WHERE f.path IN ({{}})", [to_sql(path) for path in paths])
        return {row[0]: _file_row(row) for row in rows}

    def paths_under(self, paths: Iterable[str]) -> Iterator[FileRow]:
        """Recorded files that are, or lie below, one of `paths` (absolute), each once."""
        return self._files_under(paths)

    def unseen(self, roots: Iterable[str], seen: Iterable[str]) -> Iterator[FileRow]:
        """Recorded files that are, or lie below, one of `roots` (absolute) and are not in `seen`, each once.

        `seen` may be larger than memory. One such iteration at a time; nothing of the catalog is locked by it.
        """
        with guarded(self.path):
            self._db.execute("CREATE TEMP TABLE seen (path TEXT PRIMARY KEY) WITHOUT ROWID")
            try:
                with transaction(self._db, "DEFERRED"):
                    insert = "INSERT OR IGNORE INTO seen VALUES (CAST(? AS TEXT))"
                    self._db.conn.executemany(insert, ((to_sql(path),) for path in seen))
                yield from self._files_under(roots, "AND f.path NOT IN (SELECT path FROM seen)")
            finally:
                self._db.execute("DROP TABLE seen")

    def _files_under(self, paths: Iterable[str], condition: str = "") -> Iterator[FileRow]:
        for path in _outermost(paths):
            yield from map(_file_row, self._rows(f"{_FILE} WHERE f.path = CAST(? AS TEXT) {condition}", (to_sql(path),)))
            last = path if path.endswith(os.sep) else path + os.sep
            end = last[: -len(os.sep)] + chr(ord(os.sep) + 1)
            # page by page, so that the caller may commit what it has learned while it reads on
            while rows := self._rows(
                f"{_FILE} WHERE f.path > CAST(? AS TEXT) AND f.path < CAST(? AS TEXT) {condition} ORDER BY f.path LIMIT ?",
                (to_sql(last), to_sql(end), BLOCK),
            ):
                yield from map(_file_row, rows)
                last = rows[-1][0]

    def roots(self) -> list[tuple[str, str]]:
        """What was given to be indexed: (absolute path, kind), in the order of first use."""
        return [(path, kind) for path, kind in self._rows("SELECT path, kind FROM roots ORDER BY rowid")]

    def add_roots(self, roots: Iterable[tuple[str, str]]) -> None:
        insert = (
            "INSERT INTO roots (path, kind, added_at) VALUES (CAST(? AS TEXT), ?, ?)"
            " ON CONFLICT (path) DO UPDATE SET kind = excluded.kind"
        )
        self._write_many(insert, [(to_sql(path), kind, now()) for path, kind in roots])

    def drop_roots(self, paths: Iterable[str]) -> None:
        self._write_many("DELETE FROM roots WHERE path = CAST(? AS TEXT)", [(to_sql(path),) for path in paths])

    def failures(self) -> list[tuple[str, str]]:
        """(path, reason) of the files that could not be used, by path."""
        return [(path, reason) for path, reason in self._rows("SELECT path, reason FROM failures ORDER BY path")]

    # items

    def items(self, ids: Iterable[int]) -> dict[int, Item]:
        """The items among `ids` that exist, by id."""
        rows = self._among(f"{_ITEM} WHERE i.id IN ({{}})", [int(i) for i in ids])
        return {row[0]: self._item(row) for row in rows}

    def item_by_path(self, path: str) -> Item | None:
        rows = self._rows(f"{_ITEM} WHERE f.path = CAST(? AS TEXT)", (to_sql(path),))
        return self._item(rows[0]) if rows else None

    def _item(self, row: Row) -> Item:
        with guarded(self.path):
            return Item(*[*row[:-1], json.loads(row[-1])])

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

    # vectors

    def vectors(
        self, after: int = 0, ids: Sequence[int] | np.ndarray | None = None, view: str = VIEW
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks (ids int64 (n,), x float16 (n, dim)) of the vectors written by states later than `after`; n <= BLOCK.

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
        upto, last = self.state, (after, 2**63 - 1)
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

    def removed(self, after: int = 0) -> np.ndarray:
        """Ids (n,) int64 of the items removed by states later than `after`."""
        rows = self._rows("SELECT item_id FROM removed WHERE state > ? ORDER BY item_id", (after,))
        return np.array([row[0] for row in rows], dtype=np.int64)

    # writing

    def commit(
        self,
        puts: Sequence[Put] = (),
        touched: Sequence[FileRow] = (),
        gone: Sequence[int] = (),
        failed: Sequence[tuple[str, str]] = (),
        recovered: Sequence[str] = (),
    ) -> list[int]:
        """All of it or, on any error, nothing, in one transaction.

        Removes the items `gone`, then writes `puts` with their files and vectors, gives the files `touched` their new size
        and time, records the failures (path, reason) and clears those of `recovered` and of the paths of `puts`. Returns the
        ids of the puts, in order. The state moves on if an item or a vector changed.
        """
        with guarded(self.path), transaction(self._db):
            ids = writing.write_items(self._db, puts, gone, self.dim)
            writing.touch(self._db, touched)
            writing.clear_failures(self._db, [*recovered, *(put.path for put in puts if put.path is not None)])
            writing.record_failures(self._db, failed)
        return ids

    def start_run(self) -> int:
        """Record that a run begins; a run without an end was killed."""
        with guarded(self.path):
            return int(self._db.execute("INSERT INTO runs (started_at) VALUES (?)", (now(),)).lastrowid or 0)

    def finish_run(self, run: int, counts: dict[str, Any]) -> None:
        self._write_many("UPDATE runs SET finished_at = ?, counts = ? WHERE id = ?", [(now(), json.dumps(counts), run)])

    # checks

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

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment, whatever others commit. Nothing can be committed inside."""
        with guarded(self.path), transaction(self._db, "DEFERRED"):
            yield

    # the plain ways to the database

    def _rows(self, query: str, parameters: Sequence[object] = ()) -> list[Row]:
        with guarded(self.path):
            rows: list[Row] = self._db.execute(query, parameters).fetchall()
            return rows

    def _among(self, query: str, values: Sequence[int | bytes], before: Sequence[object] = ()) -> Iterator[Row]:
        """Rows of `query`, whose `{}` stands for the slots of `values`, any number of them; `before` fills those before it."""
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            slots = ", ".join("CAST(? AS TEXT)" if isinstance(value, bytes) else "?" for value in chunk)
            yield from self._rows(query.format(slots), (*before, *chunk))

    def _write_many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        with guarded(self.path), transaction(self._db):
            self._db.conn.executemany(statement, rows)

    def _meta(self, key: str) -> Any:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        return rows[0][0] if rows else None


def _file_row(row: Row) -> FileRow:
    path, item_id, size, mtime_ns, on_mount, content_hash = row
    return FileRow(path, item_id, size, mtime_ns, bool(on_mount), content_hash)


def _outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that lie below another of them."""
    chosen = {path.rstrip(os.sep) or os.sep for path in paths}
    return sorted(path for path in chosen if not any(str(parent) in chosen for parent in PurePath(path).parents))


def _publish(unfinished: Path, path: Path) -> None:
    """Give the new file its real name, unless another process was faster: its catalog may hold work already."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            unfinished.rename(path)
