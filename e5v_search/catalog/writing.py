"""What one commit writes. Everything here runs inside the caller's transaction."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sqlite_utils import Database

from e5v_search.catalog.connection import now, to_sql
from e5v_search.catalog.records import VIEW, FileRow, Put
from e5v_search.errors import CollectionError

_FACTS = ("text", "width", "height", "taken_at", "lat", "lon", "camera", "format", "facts")
_ITEM = ("kind", "content_hash", *_FACTS)
_TEXTUAL = {"kind", "content_hash", "text", "taken_at", "camera", "format"}
# binds text as bytes, see to_sql; CAST of NULL is NULL
_SLOTS = tuple("CAST(? AS TEXT)" if name in _TEXTUAL else "?" for name in _ITEM)
_INSERT = f"INSERT INTO items ({', '.join(_ITEM)}) VALUES ({', '.join(_SLOTS)})"
_UPDATE = f"UPDATE items SET {', '.join(f'{n} = {s}' for n, s in zip(_ITEM, _SLOTS, strict=True))} WHERE id = ?"

Source = tuple[list[Any], bytes]


def embedding(vector: np.ndarray, dim: int | None) -> bytes:
    """A vector as stored: little-endian float16. Raises ValueError for a wrong shape or a number that is not finite."""
    if dim is None:
        raise ValueError("the catalog is not bound to a fingerprint yet: call bind first")
    if vector.shape != (dim,):
        raise ValueError(f"a vector of shape ({dim},) is needed, not {vector.shape}")
    with np.errstate(over="ignore"):
        half = vector.astype("<f2")
    if not np.isfinite(half).all():
        raise ValueError("a vector holds a number that is not finite in half precision")
    return half.tobytes()


def write_items(db: Database, puts: Sequence[Put], gone: Sequence[int], dim: int | None) -> list[int]:
    """Remove `gone`, then write `puts`, under the next state, reached if anything changed. Returns the ids of the puts."""
    # read before anything is removed or overwritten: two files may have swapped their contents
    sources = [None if put.copy_from is None else _source(db, put) for put in puts]
    state = int(db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()[0]) + 1
    removed = 0
    for item_id in gone:
        db.execute("INSERT OR IGNORE INTO removed SELECT id, ? FROM items WHERE id = ?", (state, item_id))
        removed += db.execute("DELETE FROM items WHERE id = ?", (item_id,)).rowcount
    ids = [_put(db, put, source, state, dim) for put, source in zip(puts, sources, strict=True)]
    if ids or removed:
        db.execute("UPDATE meta SET value = ? WHERE key = 'state'", (state,))
    return ids


def _source(db: Database, put: Put) -> Source:
    """Facts and vector of the item that `put` copies, or of a twin of it where that has changed since it was looked up."""
    row = db.execute(
        f"SELECT {', '.join('i.' + name for name in _FACTS)}, v.embedding FROM items i JOIN vectors v ON v.item_id = i.id"
        " WHERE i.content_hash = CAST(? AS TEXT) AND i.kind = CAST(? AS TEXT) AND v.view = ? ORDER BY i.id != ? LIMIT 1",
        (to_sql(put.content_hash), to_sql(put.kind), VIEW, put.copy_from),
    ).fetchone()
    if row is None:
        raise CollectionError(
            f"item {put.copy_from}, whose vector was to serve {put.path!r} too, has changed in the meantime; "
            "run the command again"
        )
    return list(row[:-1]), row[-1]


def _put(db: Database, put: Put, source: Source | None, state: int, dim: int | None) -> int:
    if (put.vector is None) == (source is None):
        raise ValueError(f"{put.path or put.text!r}: give either a vector or an item to copy from")
    facts, blob = source or (
        [getattr(put, name) for name in _FACTS[:-1]] + [json.dumps(put.facts)],
        embedding(np.asarray(put.vector), dim),
    )
    values = [
        to_sql(value) if name in _TEXTUAL and value is not None else value
        for name, value in zip(_ITEM, [put.kind, put.content_hash, *facts], strict=True)
    ]
    if put.item_id is None:
        item_id = int(db.execute(_INSERT, values).lastrowid or 0)
    else:
        item_id = put.item_id
        if not db.execute(_UPDATE, [*values, item_id]).rowcount:
            raise ValueError(f"there is no item {item_id}")
        db.execute("DELETE FROM files WHERE item_id = ?", (item_id,))
        db.execute("DELETE FROM vectors WHERE item_id = ?", (item_id,))
    if put.path is not None:
        db.execute(
            "INSERT INTO files (path, item_id, size, mtime_ns, on_mount) VALUES (CAST(? AS TEXT), ?, ?, ?, ?)",
            (to_sql(put.path), item_id, put.size, put.mtime_ns, put.on_mount),
        )
    db.execute(
        "INSERT INTO vectors (item_id, view, state, embedding) VALUES (?, ?, ?, ?)",
        (item_id, VIEW, state, blob),
    )
    return item_id


def touch(db: Database, files: Iterable[FileRow]) -> None:
    """New size, time and mount of files whose content is what it was."""
    db.conn.executemany(
        "UPDATE files SET size = ?, mtime_ns = ?, on_mount = ? WHERE path = CAST(? AS TEXT)",
        ((f.size, f.mtime_ns, f.on_mount, to_sql(f.path)) for f in files),
    )


def record_failures(db: Database, failed: Iterable[tuple[str, str]]) -> None:
    at = now()
    db.conn.executemany(
        "INSERT OR REPLACE INTO failures (path, reason, seen_at) VALUES (CAST(? AS TEXT), CAST(? AS TEXT), ?)",
        ((to_sql(path), to_sql(reason), at) for path, reason in failed),
    )


def clear_failures(db: Database, paths: Iterable[str]) -> None:
    db.conn.executemany("DELETE FROM failures WHERE path = CAST(? AS TEXT)", ((to_sql(path),) for path in paths))
