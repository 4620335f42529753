"""What `verify` asks of a catalog, one line per problem."""

from collections.abc import Iterator

import numpy as np

from e5v_search.catalog.connection import Database
from e5v_search.catalog.records import VIEW

_NORM_TOLERANCE = 0.01  # a float16 row of 4,096 numbers has length 1 to about 1e-3

# sentence with {n}, and a query for the ids concerned
_COUNTED = (
    (
        "{n} items have no vector: {ids}",
        f"SELECT id FROM items WHERE id NOT IN (SELECT item_id FROM vectors WHERE view = '{VIEW}')",
    ),
    ("{n} vectors belong to no item: {ids}", "SELECT item_id FROM vectors WHERE item_id NOT IN (SELECT id FROM items)"),
    ("{n} files belong to no item: {ids}", "SELECT item_id FROM files WHERE item_id NOT IN (SELECT id FROM items)"),
    (
        "{n} files are of another kind than their items: {ids}",
        "SELECT i.id FROM items i JOIN files f ON f.item_id = i.id WHERE f.kind != i.kind",
    ),
    (
        "{n} items have neither a file nor a text: {ids}",
        "SELECT id FROM items WHERE text IS NULL AND id NOT IN (SELECT item_id FROM files)",
    ),
    ("{n} items are there and recorded as removed: {ids}", "SELECT id FROM items WHERE id IN (SELECT item_id FROM removed)"),
    (
        "{n} vectors were written by a state that has not been reached: {ids}",
        "SELECT item_id FROM vectors WHERE state > (SELECT value FROM meta WHERE key = 'state')",
    ),
    (
        "{n} items were removed by a state that has not been reached: {ids}",
        "SELECT item_id FROM removed WHERE state > (SELECT value FROM meta WHERE key = 'state')",
    ),
)


def problems(db: Database, dim: int | None) -> Iterator[str]:
    """Every problem of the database, cheap to dear. Raises sqlite3.DatabaseError where it cannot be read on."""
    broken = [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")]
    if broken != ["ok"]:
        yield from (f"SQLite: {line}" for line in broken)
        return
    for table, _, parent, _ in db.execute("PRAGMA foreign_key_check").fetchall()[:20]:
        yield f"a row of {table} points to a row of {parent} that is not there"
    for sentence, query in _COUNTED:
        ids = [row[0] for row in db.execute(query)]
        if ids:
            yield sentence.format(n=len(ids), ids=_few(ids))
    if dim is None:
        if db.execute("SELECT count(*) FROM vectors").fetchone()[0]:
            yield "there are vectors, but no fingerprint says what made them"
        return
    yield from _vector_problems(db, dim)


def _vector_problems(db: Database, dim: int) -> Iterator[str]:
    wrong = [row[0] for row in db.execute("SELECT item_id FROM vectors WHERE length(embedding) != ?", (2 * dim,))]
    if wrong:
        yield f"{len(wrong)} vectors have not {dim} numbers: {_few(wrong)}"
    infinite: list[int] = []
    unnormed: list[int] = []
    cursor = db.execute("SELECT item_id, embedding FROM vectors WHERE length(embedding) = ?", (2 * dim,))
    while rows := cursor.fetchmany(4096):
        x = np.frombuffer(b"".join(row[1] for row in rows), "<f2").reshape(-1, dim).astype(np.float32)
        ids = np.array([row[0] for row in rows])
        finite = np.isfinite(x).all(axis=1)
        infinite += ids[~finite].tolist()
        unnormed += ids[finite][np.abs(np.linalg.norm(x[finite], axis=1) - 1) > _NORM_TOLERANCE].tolist()
    if infinite:
        yield f"{len(infinite)} vectors hold a number that is not finite: {_few(infinite)}"
    if unnormed:
        yield f"{len(unnormed)} vectors have not length 1: {_few(unnormed)}"


def _few(ids: list[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return shown + (", …" if len(ids) > 5 else "")
