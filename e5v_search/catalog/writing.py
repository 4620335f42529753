"""What one commit writes. Everything here runs inside the caller's transaction."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from e5v_search.catalog.connection import Database, now, to_sql
from e5v_search.catalog.facts import write_facts
from e5v_search.catalog.records import VIEW, Corpus, Failed, FileRow, Put
from e5v_search.errors import CollectionError

_FACTS = ("text", "width", "height", "taken_at", "lat", "lon", "camera", "format", "facts")
_ITEM = ("kind", "content_hash", *_FACTS)
_TEXTUAL = {"kind", "content_hash", "text", "taken_at", "camera", "format"}
# binds text as bytes, see to_sql; CAST of NULL is NULL
_SLOTS = tuple("CAST(? AS TEXT)" if name in _TEXTUAL else "?" for name in _ITEM)
_INSERT = f"INSERT INTO items (id, {', '.join(_ITEM)}) VALUES (?, {', '.join(_SLOTS)})"
_UPDATE = f"UPDATE items SET {', '.join(f'{n} = {s}' for n, s in zip(_ITEM, _SLOTS, strict=True))} WHERE id = ?"

# A part whose place another text has taken: nobody can say so until its file has been read on. No part's own name has it.
DISPLACED = "\x1f"

Source = tuple[list[Any], dict[str, bytes]]


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


def write_items(
    db: Database,
    puts: Sequence[Put],
    gone: Sequence[int],
    moved: Sequence[FileRow],
    completed: Sequence[tuple[int, str, np.ndarray]],
    dim: int | None,
) -> list[int]:
    """Remove `gone`, rename `moved`, then write `puts` and `completed`, under the next state, reached if anything changed.

    Returns the ids of the puts.
    """
    # read before anything is removed or overwritten: two files may have swapped their contents
    sources = [None if put.copy_from is None else _source(db, put) for put in puts]
    state = int(db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()[0]) + 1
    removed = 0
    for item_id in gone:
        db.execute("INSERT OR IGNORE INTO removed SELECT id, ? FROM items WHERE id = ?", (state, item_id))
        _open_corpus_of(db, item_id)
        removed += db.execute("DELETE FROM items WHERE id = ?", (item_id,)).rowcount
    if gone:
        db.execute(
            "DELETE FROM corpora AS c WHERE NOT EXISTS (SELECT 1 FROM files f WHERE f.path = c.path AND f.kind = c.kind)"
        )
    for row in moved:
        _open_corpus_of(db, row.item_id)
        _take_place(db, row.path, row.kind, row.part, row.item_id)
        db.execute("UPDATE files SET part = CAST(? AS TEXT) WHERE item_id = ?", (to_sql(row.part), row.item_id))
    ids = [_put(db, put, source, state, dim) for put, source in zip(puts, sources, strict=True)]
    for item_id, view, vector in completed:
        _write_vector(db, item_id, view, state, embedding(vector, dim))
    if ids or removed or completed:
        db.execute("UPDATE meta SET value = ? WHERE key = 'state'", (state,))
    return ids


def _source(db: Database, put: Put) -> Source:
    """Facts and vectors of the item that `put` copies, or of a twin of it where that has changed since it was looked up."""
    row = db.execute(
        f"SELECT i.id, {', '.join('i.' + name for name in _FACTS)} FROM items i JOIN vectors v ON v.item_id = i.id"
        " WHERE i.content_hash = CAST(? AS TEXT) AND i.kind = CAST(? AS TEXT) AND v.view = ? ORDER BY i.id != ? LIMIT 1",
        (to_sql(put.content_hash), to_sql(put.kind), VIEW, put.copy_from),
    ).fetchone()
    if row is None:
        raise CollectionError(
            f"item {put.copy_from}, whose vector was to serve {put.path!r} too, has changed in the meantime; "
            "run the command again"
        )
    vectors = dict(db.execute("SELECT view, embedding FROM vectors WHERE item_id = ?", (row[0],)).fetchall())
    return list(row[1:]), vectors


def load_items(db: Database, puts: Iterable[Put], dim: int | None) -> int:
    """Write items that have ids already into a catalog that has none of them, under one state. Returns how many."""
    state = int(db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()[0]) + 1
    loaded = 0
    for put in puts:
        _put(db, put, None, state, dim, new=True)
        loaded += 1
    db.execute("UPDATE meta SET value = ? WHERE key = 'state'", (state,))
    return loaded


def _put(db: Database, put: Put, source: Source | None, state: int, dim: int | None, new: bool = False) -> int:
    if bool(put.vectors) == (source is not None) or (put.vectors and VIEW not in put.vectors):
        raise ValueError(f"{put.path or put.text!r}: give either vectors, one for {VIEW!r} among them, or an item to copy from")
    own = [getattr(put, name) for name in _FACTS[:-1]] + [json.dumps(put.facts)]
    if source is None:
        facts, vectors = own, {view: embedding(np.asarray(x), dim) for view, x in put.vectors.items()}
    else:
        facts, vectors = own if put.text is not None else source[0], source[1]
    values = [
        to_sql(value) if name in _TEXTUAL and value is not None else value
        for name, value in zip(_ITEM, [put.kind, put.content_hash, *facts], strict=True)
    ]
    if put.item_id is None or new:
        item_id = int(db.execute(_INSERT, [put.item_id, *values]).lastrowid or 0)
    else:
        item_id = put.item_id
        if not db.execute(_UPDATE, [*values, item_id]).rowcount:
            raise ValueError(f"there is no item {item_id}")
        db.execute("DELETE FROM files WHERE item_id = ?", (item_id,))
        db.execute("DELETE FROM vectors WHERE item_id = ?", (item_id,))
    write_facts(db, item_id, facts[-1], replace=put.item_id is not None and not new)
    if put.path is not None:
        if put.part:
            _open_corpus(db, put.path, put.kind)
            _take_place(db, put.path, put.kind, put.part, item_id)
        db.execute(
            "INSERT INTO files (item_id, path, kind, part, size, mtime_ns, on_mount)"
            " VALUES (?, CAST(? AS TEXT), ?, CAST(? AS TEXT), ?, ?, ?)",
            (item_id, to_sql(put.path), put.kind, to_sql(put.part), put.size, put.mtime_ns, put.on_mount),
        )
    for view, blob in vectors.items():
        _write_vector(db, item_id, view, state, blob)
    return item_id


def _write_vector(db: Database, item_id: int, view: str, state: int, blob: bytes) -> None:
    db.execute(
        "INSERT OR REPLACE INTO vectors (item_id, view, state, embedding) VALUES (?, CAST(? AS TEXT), ?, ?)",
        (item_id, to_sql(view), state, blob),
    )


def _take_place(db: Database, path: str, kind: str, part: str, item_id: int) -> None:
    """Another item in that place loses it: it has been moved within the file, or is gone from it, which is not known yet."""
    db.execute(
        "UPDATE files SET part = CAST(? AS TEXT) || item_id"
        " WHERE path = CAST(? AS TEXT) AND kind = ? AND part = CAST(? AS TEXT) AND item_id != ?",
        (to_sql(DISPLACED), to_sql(path), kind, to_sql(part), item_id),
    )


# a file of texts any of whose items is written, moved or removed counts as not read whole, until `close_corpora` says so


def _open_corpus(db: Database, path: str, kind: str) -> None:
    db.execute(
        "INSERT INTO corpora (path, kind, size, mtime_ns, on_mount, texts) VALUES (CAST(? AS TEXT), ?, -1, -1, 0, 0)"
        " ON CONFLICT (path, kind) DO UPDATE SET size = -1, mtime_ns = -1",
        (to_sql(path), kind),
    )


def _open_corpus_of(db: Database, item_id: int) -> None:
    db.execute(
        "UPDATE corpora SET size = -1, mtime_ns = -1"
        " WHERE (path, kind) = (SELECT path, kind FROM files WHERE item_id = ? AND part != '')",
        (item_id,),
    )


def close_corpora(db: Database, read: Iterable[Corpus]) -> None:
    for c in read:
        place = (to_sql(c.path), c.kind)
        db.execute(
            "INSERT OR REPLACE INTO corpora (path, kind, size, mtime_ns, on_mount, texts)"
            " VALUES (CAST(? AS TEXT), ?, ?, ?, ?, ?)",
            (*place, c.size, c.mtime_ns, c.on_mount, c.texts),
        )
        db.execute(
            "UPDATE files SET size = ?, mtime_ns = ?, on_mount = ? WHERE path = CAST(? AS TEXT) AND kind = ?",
            (c.size, c.mtime_ns, c.on_mount, *place),
        )


def touch(db: Database, files: Iterable[FileRow]) -> None:
    """New size, time and mount of files whose content is what it was."""
    db.conn.executemany(
        "UPDATE files SET size = ?, mtime_ns = ?, on_mount = ? WHERE item_id = ?",
        ((f.size, f.mtime_ns, f.on_mount, f.item_id) for f in files),
    )


def record_failures(db: Database, failed: Iterable[Failed]) -> None:
    at = now()
    db.conn.executemany(
        "INSERT OR REPLACE INTO failures (path, kind, place, reason, seen_at)"
        " VALUES (CAST(? AS TEXT), ?, CAST(? AS TEXT), CAST(? AS TEXT), ?)",
        ((to_sql(f.path), f.kind, to_sql(f.place), to_sql(f.reason), at) for f in failed),
    )


def clear_failures(db: Database, files: Iterable[tuple[str, str]]) -> None:
    """Those of whole files and of all places in them."""
    db.conn.executemany(
        "DELETE FROM failures WHERE path = CAST(? AS TEXT) AND kind = ?", ((to_sql(path), kind) for path, kind in files)
    )
