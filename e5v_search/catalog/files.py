"""Where items come from: files and their parts, what was given to be indexed, what could not be used."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

from e5v_search.catalog.connection import guarded, now, to_sql, transaction
from e5v_search.catalog.reading import Reading
from e5v_search.catalog.records import Corpus, Failed, FileRow
from e5v_search.catalog.store import Row, Store

BLOCK = 4096  # rows read at once

# each begins with the columns that tell its rows apart
_FILE = (
    "SELECT f.path, f.kind, f.part, f.item_id, f.size, f.mtime_ns, f.on_mount, i.content_hash"
    " FROM files f JOIN items i ON i.id = f.item_id"
)
_FILE_KEY = ("f.path", "f.kind", "f.part")
_CORPUS = "SELECT f.path, f.kind, f.size, f.mtime_ns, f.on_mount, f.texts FROM corpora f"
_CORPUS_KEY = ("f.path", "f.kind")


class Files(Store):
    """What the catalog knows of the files on disk."""

    def known(self, paths: Sequence[str]) -> dict[str, FileRow]:
        """The recorded photos among `paths`, by path."""
        rows = self._among(f"{_FILE} WHERE f.kind = 'image' AND f.path IN ({{}})", [to_sql(path) for path in paths])
        return {row[0]: _file_row(row) for row in rows}

    def corpora(self, paths: Sequence[str], kind: str) -> dict[str, Corpus]:
        """The files of texts among `paths` that are recorded as `kind`, by path."""
        rows = self._among(f"{_CORPUS} WHERE f.kind = ? AND f.path IN ({{}})", [to_sql(path) for path in paths], (kind,))
        return {row[0]: _corpus(row) for row in rows}

    def parts(self, path: str, kind: str) -> Iterator[FileRow]:
        """The items of one kind that come from the file `path`."""
        place = (to_sql(path), kind)
        return map(_file_row, self._pages(f"{_FILE} WHERE f.path = CAST(? AS TEXT) AND f.kind = ?", place, _FILE_KEY))

    def paths_under(self, paths: Iterable[str]) -> Iterator[FileRow]:
        """All parts, of any kind, of the recorded files that are, or lie below, one of `paths` (absolute), each once."""
        return map(_file_row, self._under(_FILE, _FILE_KEY, paths))

    def unseen(self, roots: Iterable[str], seen: Iterable[str]) -> Iterator[FileRow]:
        """Recorded photos that are, or lie below, one of `roots` (absolute) and are not in `seen`, each once.

        `seen` may be larger than memory. One such iteration at a time; nothing of the catalog is locked by it.
        """
        return map(_file_row, self._unseen(_FILE, _FILE_KEY, "image", roots, seen))

    def unseen_corpora(self, kind: str, roots: Iterable[str], seen: Iterable[str]) -> Iterator[Corpus]:
        """As `unseen`, for the files of texts recorded as `kind`."""
        return map(_corpus, self._unseen(_CORPUS, _CORPUS_KEY, kind, roots, seen))

    def _unseen(self, select: str, key: Sequence[str], kind: str, roots: Iterable[str], seen: Iterable[str]) -> Iterator[Row]:
        with guarded(self.path):
            self._db.execute("CREATE TEMP TABLE seen (path TEXT PRIMARY KEY) WITHOUT ROWID")
            try:
                with transaction(self._db, "DEFERRED"):
                    insert = "INSERT OR IGNORE INTO seen VALUES (CAST(? AS TEXT))"
                    self._db.conn.executemany(insert, ((to_sql(path),) for path in seen))
                only = "AND f.kind = ? AND f.path NOT IN (SELECT path FROM seen)"
                yield from self._under(select, key, roots, only, (kind,))
            finally:
                self._db.execute("DROP TABLE seen")

    def _under(
        self, select: str, key: Sequence[str], paths: Iterable[str], only: str = "", parameters: Sequence[object] = ()
    ) -> Iterator[Row]:
        for path in _outermost(paths):
            yield from self._pages(f"{select} WHERE f.path = CAST(? AS TEXT) {only}", (to_sql(path), *parameters), key)
            first = path if path.endswith(os.sep) else path + os.sep
            end = first[: -len(os.sep)] + chr(ord(os.sep) + 1)
            below = f"{select} WHERE f.path > CAST(? AS TEXT) AND f.path < CAST(? AS TEXT) {only}"
            yield from self._pages(below, (to_sql(first), to_sql(end), *parameters), key)

    def _pages(self, query: str, parameters: Sequence[object], key: Sequence[str]) -> Iterator[Row]:
        """Page by page, so that the caller may commit what it has learned while it reads on."""
        columns, slots = ", ".join(key), ", ".join("CAST(? AS TEXT)" for _ in key)
        rows = self._rows(f"{query} ORDER BY {columns} LIMIT ?", (*parameters, BLOCK))
        while rows:
            yield from rows
            last = [to_sql(value) for value in rows[-1][: len(key)]]
            further = f"{query} AND ({columns}) > ({slots}) ORDER BY {columns} LIMIT ?"
            rows = self._rows(further, (*parameters, *last, BLOCK))

    @contextmanager
    def reading(self, path: str, kind: str) -> Iterator[Reading]:
        """For the time in which a file of texts is read again: which of its items have been met. One at a time."""
        with guarded(self.path):
            reading = Reading(self._db, path, kind)
            try:
                yield reading
            finally:
                reading.close()

    # what was asked for, and what went wrong

    def roots(self) -> list[tuple[str, str]]:
        """What was given to be indexed: (absolute path, kind), in the order of first use."""
        return [(path, kind) for path, kind in self._rows("SELECT path, kind FROM roots ORDER BY rowid")]

    def add_roots(self, roots: Iterable[tuple[str, str]]) -> None:
        insert = "INSERT OR IGNORE INTO roots (path, kind, added_at) VALUES (CAST(? AS TEXT), ?, ?)"
        self._write_many(insert, [(to_sql(path), kind, now()) for path, kind in roots])

    def drop_roots(self, paths: Iterable[str]) -> None:
        """Whatever their kind."""
        self._write_many("DELETE FROM roots WHERE path = CAST(? AS TEXT)", [(to_sql(path),) for path in paths])

    def failures(self) -> list[Failed]:
        """What could not be used, by path and place."""
        rows = self._rows("SELECT path, kind, reason, place FROM failures ORDER BY path, length(place), place, kind")
        return [Failed(*row) for row in rows]


def _file_row(row: Row) -> FileRow:
    path, kind, part, item_id, size, mtime_ns, on_mount, content_hash = row
    return FileRow(path, item_id, size, mtime_ns, bool(on_mount), content_hash, kind, part)


def _corpus(row: Row) -> Corpus:
    path, kind, size, mtime_ns, on_mount, texts = row
    return Corpus(path, kind, size, mtime_ns, bool(on_mount), texts)


def _outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that lie below another of them."""
    chosen = {path.rstrip(os.sep) or os.sep for path in paths}
    return sorted(path for path in chosen if not any(str(parent) in chosen for parent in PurePath(path).parents))
