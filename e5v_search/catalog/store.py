"""A collection's database file: made, opened, brought up to date; and the plain ways to ask it."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e5v_search.catalog import connection
from e5v_search.catalog.connection import Database, damaged, guarded, transaction
from e5v_search.catalog.migrations import migrate, newest, schema_version
from e5v_search.catalog.records import VIEW
from e5v_search.errors import CollectionError, CollectionNotFound, FingerprintMismatch, SchemaTooNew, from_os_error

CATALOG = "catalog.sqlite"
_CHUNK = 500  # values looked up by one statement: older SQLite takes 999

Row = tuple[Any, ...]


class Store:
    """One connection to the catalog of the collection in a folder, and what the catalog is bound to.

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
            self._add_views(views)

    def _add_views(self, views: Iterable[str]) -> None:
        value = json.dumps(list(dict.fromkeys([*self.views, *views])))
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('views', ?)", (value,))

    @property
    def recipe(self) -> dict[str, Any] | None:
        """What was last given to `choose_recipe`; None where the size of the collection decides."""
        value = self._meta("recipe")
        with guarded(self.path):
            recipe: dict[str, Any] | None = None if value is None else json.loads(value)
            return recipe

    def choose_recipe(self, recipe: dict[str, Any] | None) -> None:
        """Note which index is to be made of the vectors, and why."""
        value = None if recipe is None else json.dumps(recipe)
        self._write_many("INSERT OR REPLACE INTO meta VALUES ('recipe', ?)", [(value,)])

    def bind(self, fingerprint: str, dim: int, model: dict[str, Any]) -> None:
        """Bind the catalog to what makes its vectors, once for all. Raises FingerprintMismatch if it is bound to another."""
        with guarded(self.path), transaction(self._db):
            self._bind(fingerprint, dim, model)

    def _bind(self, fingerprint: str, dim: int, model: dict[str, Any]) -> None:
        bound, bound_dim = self.fingerprint, self.dim
        if bound is None:
            rows = [("fingerprint", fingerprint), ("dim", dim), ("model", json.dumps(model))]
            self._db.conn.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        elif (bound, bound_dim) != (fingerprint, dim):
            raise FingerprintMismatch(
                f"the collection {self.path.parent} was made by {bound} ({bound_dim} numbers a vector), "
                f"not by {fingerprint} ({dim})"
            )

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment, whatever others commit. Nothing can be committed inside."""
        if self._db.conn.in_transaction:
            yield
            return
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


def _publish(unfinished: Path, path: Path) -> None:
    """Give the new file its real name, unless another process was faster: its catalog may hold work already."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            unfinished.rename(path)
