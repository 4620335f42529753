"""Numbered steps of the schema. A released step never changes; a new one is appended.

Each runs in a transaction of its own together with its record in the table `migrations`, so that a step is either
wholly there and recorded, or neither.
"""

from collections.abc import Callable

from e5v_search.catalog.connection import Database, now, transaction
from e5v_search.catalog.facts import write_facts
from e5v_search.catalog.where import FOLDER

_FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
INSERT INTO meta VALUES ('state', 0);
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('image', 'text', 'rendered')),
    content_hash TEXT NOT NULL,
    text TEXT,
    width INTEGER,
    height INTEGER,
    taken_at TEXT,
    lat REAL,
    lon REAL,
    camera TEXT,
    format TEXT,
    facts TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX items_content ON items (content_hash, kind);
CREATE INDEX items_taken_at ON items (taken_at);
CREATE TABLE files (
    path TEXT PRIMARY KEY,
    item_id INTEGER NOT NULL UNIQUE REFERENCES items (id) ON DELETE CASCADE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    on_mount INTEGER NOT NULL
);
CREATE TABLE vectors (
    item_id INTEGER NOT NULL REFERENCES items (id) ON DELETE CASCADE,
    view TEXT NOT NULL,
    state INTEGER NOT NULL,
    embedding BLOB NOT NULL,
    PRIMARY KEY (item_id, view)
);
CREATE INDEX vectors_written ON vectors (view, state, item_id);
CREATE TABLE removed (item_id INTEGER PRIMARY KEY, state INTEGER NOT NULL);
CREATE INDEX removed_state ON removed (state);
CREATE TABLE failures (path TEXT PRIMARY KEY, reason TEXT NOT NULL, seen_at TEXT NOT NULL);
CREATE TABLE roots (path TEXT PRIMARY KEY, kind TEXT NOT NULL, added_at TEXT NOT NULL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    started_at TEXT NOT NULL,
    finished_at TEXT,
    counts TEXT
);
"""


# a file may hold many items, its parts; item_id as the key makes the table its own index for the join with items
_PARTS = """
CREATE TABLE parts (
    item_id INTEGER PRIMARY KEY REFERENCES items (id) ON DELETE CASCADE,
    path TEXT NOT NULL,
    kind TEXT NOT NULL,
    part TEXT NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    on_mount INTEGER NOT NULL,
    UNIQUE (path, kind, part)
);
INSERT INTO parts
    SELECT f.item_id, f.path, i.kind, '', f.size, f.mtime_ns, f.on_mount FROM files f JOIN items i ON i.id = f.item_id;
DROP TABLE files;
ALTER TABLE parts RENAME TO files;
CREATE TABLE corpora (
    path TEXT NOT NULL,
    kind TEXT NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    on_mount INTEGER NOT NULL,
    texts INTEGER NOT NULL,
    PRIMARY KEY (path, kind)
);
CREATE TABLE roots_of_kinds (path TEXT NOT NULL, kind TEXT NOT NULL, added_at TEXT NOT NULL, UNIQUE (path, kind));
INSERT INTO roots_of_kinds SELECT path, kind, added_at FROM roots ORDER BY rowid;
DROP TABLE roots;
ALTER TABLE roots_of_kinds RENAME TO roots;
CREATE TABLE places (
    path TEXT NOT NULL,
    kind TEXT NOT NULL,
    place TEXT NOT NULL,
    reason TEXT NOT NULL,
    seen_at TEXT NOT NULL,
    PRIMARY KEY (path, kind, place)
);
INSERT INTO places SELECT path, 'image', '', reason, seen_at FROM failures;
DROP TABLE failures;
ALTER TABLE places RENAME TO failures;
"""


# what filters ask for; where.FOLDER is written in the same words
_FILTERS = f"""
CREATE INDEX items_kind ON items (kind);
CREATE INDEX items_camera ON items (camera);
CREATE INDEX items_format ON items (format);
CREATE INDEX items_place ON items (lat, lon);
CREATE INDEX items_width ON items (width);
CREATE INDEX items_height ON items (height);
CREATE INDEX items_pixels ON items (width * height);
CREATE INDEX items_shape ON items (width - height);
CREATE INDEX files_size ON files (size);
CREATE INDEX files_folder ON files ({FOLDER});
CREATE TABLE facts (
    name TEXT NOT NULL,
    value NOT NULL,
    item_id INTEGER NOT NULL REFERENCES items (id) ON DELETE CASCADE,
    PRIMARY KEY (name, value, item_id)
) WITHOUT ROWID;
CREATE INDEX facts_item ON facts (item_id);
"""


def _first(db: Database) -> None:
    db.executescript(_FIRST)


def _parts(db: Database) -> None:
    db.executescript(_PARTS)


def _filters(db: Database) -> None:
    db.executescript(_FILTERS)
    for item_id, facts in db.execute("SELECT id, facts FROM items WHERE facts != '{}'").fetchall():
        write_facts(db, item_id, facts)


Migration = tuple[str, Callable[[Database], None]]
MIGRATIONS: tuple[Migration, ...] = (("first", _first), ("parts", _parts), ("filters", _filters))


def newest() -> int:
    return len(MIGRATIONS)


def schema_version(db: Database) -> int:
    """Number of the last step that the database holds; 0 when it is no catalog at all."""
    if not db.table("migrations").exists():
        return 0
    return int(db.execute("SELECT coalesce(max(number), 0) FROM migrations").fetchone()[0])


def migrate(db: Database) -> None:
    """Apply every step that is missing. A step that fails leaves the database at the step before it."""
    with transaction(db):
        db.execute(
            "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at TEXT NOT NULL)"
        )
    for number, (name, step) in enumerate(MIGRATIONS, start=1):
        with transaction(db):
            # looked up inside the transaction: another process may be migrating the same file
            if schema_version(db) < number:
                step(db)
                db.table("migrations").insert({"number": number, "name": name, "applied_at": now()})
