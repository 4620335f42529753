"""Whole catalogs out and in: every item with its id, facts, file and vectors, in blocks."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from e5v_search.catalog import writing
from e5v_search.catalog.connection import damaged, guarded, now, to_sql, transaction
from e5v_search.catalog.files import BLOCK
from e5v_search.catalog.records import Put
from e5v_search.catalog.store import Store
from e5v_search.errors import CollectionError

_PUT = (
    "SELECT i.id, i.kind, i.content_hash, i.text, i.width, i.height, i.taken_at, i.lat, i.lon, i.camera, i.format, i.facts,"
    " f.path, f.part, f.size, f.mtime_ns, f.on_mount FROM items i LEFT JOIN files f ON f.item_id = i.id"
    " WHERE i.id > ? ORDER BY i.id LIMIT ?"
)


class Transfer(Store):
    """What a catalog gives to another one."""

    def size(self) -> int:
        """Number of items."""
        return int(self._rows("SELECT count(*) FROM items")[0][0])

    def empty(self) -> bool:
        """Whether there is no item, which is told sooner than how many there are."""
        return not self._rows("SELECT 1 FROM items LIMIT 1")

    def dump(self) -> Iterator[list[Put]]:
        """All items by id, with their ids and their vectors (dim,) float16; at most BLOCK at a time."""
        last = -1
        while rows := self._rows(_PUT, (last, BLOCK)):
            vectors: dict[int, dict[str, np.ndarray]] = {}
            written = "SELECT item_id, view, embedding FROM vectors WHERE item_id BETWEEN ? AND ?"
            for item_id, view, blob in self._rows(written, (rows[0][0], rows[-1][0])):
                if len(blob) != 2 * (self.dim or 0):
                    raise damaged(self.path, f"the vector of item {item_id} has not {self.dim} numbers")
                vectors.setdefault(item_id, {})[view] = np.frombuffer(blob, "<f2")
            yield [self._as_put(row, vectors.get(row[0], {})) for row in rows]
            last = rows[-1][0]

    def _as_put(self, row: tuple[Any, ...], vectors: dict[str, np.ndarray]) -> Put:
        item_id, kind, content_hash, text, width, height, taken_at, lat, lon, camera, format, facts = row[:12]
        path, part, size, mtime_ns, on_mount = row[12:]
        with guarded(self.path):
            return Put(
                item_id=item_id,
                kind=kind,
                content_hash=content_hash,
                text=text,
                width=width,
                height=height,
                taken_at=taken_at,
                lat=lat,
                lon=lon,
                camera=camera,
                format=format,
                facts=json.loads(facts),
                path=path,
                part=part or "",
                size=size or 0,
                mtime_ns=mtime_ns or 0,
                on_mount=bool(on_mount),
                vectors=vectors,
            )

    def load(
        self,
        puts: Iterable[Put],
        fingerprint: str,
        dim: int,
        model: dict[str, Any],
        views: Iterable[str],
        roots: Iterable[tuple[str, str]],
    ) -> int:
        """Bind an empty catalog and write items that bring their ids, as one commit: all of it or nothing.

        Returns the number of items. Raises CollectionError where the catalog holds any, FingerprintMismatch, DiskFull.
        """
        with guarded(self.path), transaction(self._db):
            if not self.empty():
                raise CollectionError(f"the collection {self.path.parent} holds items already; import into a new one with -c")
            self._bind(fingerprint, dim, model)
            self._add_views(views)
            self._db.execute("DELETE FROM removed")
            for path, kind in roots:
                values = (to_sql(path), kind, now())
                self._db.execute("INSERT OR IGNORE INTO roots (path, kind, added_at) VALUES (CAST(? AS TEXT), ?, ?)", values)
            return writing.load_items(self._db, puts, self.dim)
