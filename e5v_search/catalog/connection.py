"""Connections to a catalog's file, and the one place where SQLite's exceptions become ours."""

import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from e5v_search.errors import CatalogDamaged, CollectionBusy, CollectionError, CollectionReadOnly, disk_full, read_only


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let imports of a module that is not loaded yet fail, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# it would load pandas wherever that is installed, to name one type of it: a fifth of a second for every command
with _without("pandas"):
    from sqlite_utils import Database as Database

BUSY_SECONDS = 20.0
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_MISMATCH}
_ROOM = 1 << 20  # bytes; with less than this free, an I/O error is taken for a full disk


def to_sql(text: str) -> bytes:
    """Bytes for `CAST(? AS TEXT)`. Reversible for every str: a file name may hold bytes that are no UTF-8, which Python
    shows as lone surrogates and SQLite's own binding refuses."""
    return text.encode("utf-8", "surrogatepass")


def _from_sql(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _primary(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def damaged(path: Path, reason: object) -> CatalogDamaged:
    return CatalogDamaged(
        f"{path} is damaged ({reason}); your photos are untouched: restore it from a backup, "
        f"or delete the folder {path.parent} and index again"
    )


def _translated(error: sqlite3.Error, path: Path) -> CollectionError | None:
    code = _primary(error)
    if code == sqlite3.SQLITE_FULL:
        return disk_full(path)
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        # a quota, or no room for SQLite's shared-memory file, is reported as one of these
        if path.parent.is_dir() and shutil.disk_usage(path.parent).free < _ROOM:
            return disk_full(path)
        return CollectionError(f"{path} cannot be read or written ({error}); check the disk and your rights to the folder")
    if code in _DAMAGED:
        return damaged(path, error)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return read_only(path.parent)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return CollectionBusy(f"{path} is in use by another run; wait until that has ended and try again")
    return None


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn what SQLite, or a damaged row, raises into an error of ours that names `path`."""
    try:
        yield
    except sqlite3.Error as error:
        ours = _translated(error, path)
        if ours is None:
            raise
        raise ours from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


@contextmanager
def transaction(db: Database, mode: str = "IMMEDIATE") -> Iterator[None]:
    """One transaction. IMMEDIATE asks for the write lock at once: asked for later, it could be refused without a wait."""
    db.execute(f"BEGIN {mode}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        db.rollback()  # does nothing where SQLite has rolled back by itself, as on a full disk
        raise


def connect(path: Path, readonly: bool = False) -> Database:
    """Open an existing database file. Raises sqlite3.Error, and CollectionReadOnly where writing is asked for in vain."""
    uri = path.absolute().as_uri()
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        try:
            return _connect(f"{uri}?mode=rw", readonly)
        except sqlite3.OperationalError as error:
            if _primary(error) not in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL):
                raise
            # a full disk has no room for the shared-memory file that goes with the WAL; alone, SQLite does without it
            return _connect(f"{uri}?mode=rw", readonly, alone=True)
    if not readonly:
        raise read_only(path.parent)
    try:
        return _connect(f"{uri}?mode=ro", readonly)
    except sqlite3.OperationalError as error:
        wal = path.with_name(path.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise CollectionReadOnly(
                f"{path.parent} cannot be written, and {wal.name} holds work of an interrupted run that must first be put into "
                f"{path.name}: run `e5v-search verify` once where the folder can be written, or copy the folder"
            ) from error
        # without a WAL the file is complete in itself; immutable keeps SQLite from making one
        return _connect(f"{uri}?mode=ro&immutable=1", readonly)


def create(path: Path) -> Database:
    """A new database file with the settings that can only be chosen at creation."""
    db = _wrap(sqlite3.connect(path.absolute().as_uri() + "?mode=rwc", uri=True, isolation_level=None))
    # Three rows of 4,096 half-precision numbers fit a page of 32 KiB, but only one a page of 16 KiB.
    db.execute("PRAGMA page_size = 32768")
    db.enable_wal()
    _configure(db, readonly=False)
    return db


def _connect(uri: str, readonly: bool, alone: bool = False) -> Database:
    db = _wrap(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS))
    try:
        if alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the file is opened by its first use
        _configure(db, readonly)
    except BaseException:
        db.close()
        raise
    return db


def _wrap(connection: sqlite3.Connection) -> Database:
    connection.text_factory = _from_sql
    return Database(connection, recursive_triggers=False, execute_plugins=False)


def _configure(db: Database, readonly: bool) -> None:
    db.execute("PRAGMA foreign_keys = ON")
    # In WAL mode NORMAL keeps every commit through the death of the process, and the file whole through a loss of power,
    # which may cost the last commits; FULL would pay a disk flush per commit to keep those too.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA journal_size_limit = 67108864")
    # the items of a hundred thousand photos, of which each search looks up a few
    db.execute("PRAGMA cache_size = -16384")
    if readonly:
        db.execute("PRAGMA query_only = ON")
