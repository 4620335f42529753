"""All that serves one collection: the engine, the readers, what was answered last, and index runs."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from e5v_search import filters
from e5v_search.catalog import Catalog, Item, Overview
from e5v_search.collection import Collection
from e5v_search.collection.asking import Ask
from e5v_search.config import ModelChoice
from e5v_search.errors import E5VError
from e5v_search.web.engine import Engine
from e5v_search.web.memory import Answers
from e5v_search.web.metrics import Metrics
from e5v_search.web.readers import Catalogs, Readers
from e5v_search.web.runs import Runs
from e5v_search.web.turns import Turnstile

_STATUS_SECONDS = 5.0  # a status is asked of the disk no more often
_SELECTIONS = 32  # answers to filters that are remembered
T = TypeVar("T")


class Service:
    """Its async methods belong to one event loop; `who` is the address of the one who asks."""

    def __init__(self, folder: Path, choice: ModelChoice, allow_index: bool = False) -> None:
        self.folder = folder
        self.metrics = Metrics()
        self.catalogs = Catalogs(folder)
        self.engine = Engine(folder, choice, self.metrics)
        self.quick = Readers(self.catalogs, "quick", workers=2, limit=256, share=128)
        self.pictures = Readers(self.catalogs, "pictures", workers=2, limit=512, share=256)
        self.slow = Readers(self.catalogs, "slow", workers=1, limit=16, share=8)
        self.uploads = Turnstile(limit=16, share=8)  # each is in memory as a whole
        self.listeners = Turnstile(limit=64, share=32)
        self.answers = Answers()
        self.runs = Runs(folder, self.engine, choice, allow_index)
        self._once: dict[str, tuple[Any, Any]] = {}
        self._selections: dict[tuple[Any, ...], np.ndarray] = {}

    def start(self) -> None:
        self.engine.start()

    def stop(self) -> bool:
        """Whether all has ended; a model that is just being loaded goes on."""
        self.runs.stop()
        for readers in (self.quick, self.pictures, self.slow):
            readers.stop()
        self.catalogs.leave()
        return self.engine.stop()

    async def search(self, ask: Ask, who: str) -> bytes:
        """The JSON of the hits; from memory, if the same was asked of the same state before."""
        start = time.perf_counter()
        if isinstance(ask.query.image, bytes):  # the engine remembers its vector; to keep the picture would be too much
            return self._encoded(await self.engine.ask(ask, who))
        key = (ask, self.catalogs.version())
        if (known := self.answers.get(key, start)) is not None:
            self.metrics.count("remembered_answers")
            return known
        hits = await self.engine.ask(ask, who)
        self.answers.put(key, hits)
        return self._encoded(hits)

    @staticmethod
    def _encoded(hits: Any) -> bytes:
        import json

        return json.dumps(hits.to_json()).encode()

    # what is the same until the collection changes; called by reader threads, of which two may do the same work at once

    def _of_version(self, name: str, make: Callable[[], T]) -> T:
        version = self.catalogs.version()
        kept = self._once.get(name)
        if kept is None or kept[0] != version:
            kept = self._once[name] = version, make()
        value: T = kept[1]
        return value

    def overview(self, catalog: Catalog) -> Overview:
        return self._of_version("overview", catalog.overview)

    def selected(self, catalog: Catalog, where: Sequence[str]) -> np.ndarray:
        """Ids (n,) of the items that pass. Raises QueryError."""
        parsed = filters.parse(where)
        key = (*self.catalogs.version(), *where)
        found = self._selections.get(key)
        if found is None:
            found = catalog.select(parsed)
            while len(self._selections) >= _SELECTIONS:
                self._selections.pop(next(iter(self._selections)), None)
            self._selections[key] = found
        return found

    def page(self, catalog: Catalog, where: Sequence[str], start: int, n: int) -> tuple[int, list[Item]]:
        """How many items pass, and those from the `start`-th newest on."""
        if where:
            chosen = self.selected(catalog, where)
            total, ids = len(chosen), self.overview(catalog).newest(chosen, start, n)
        else:
            total, ids = self._of_version("count", lambda: sum(catalog.count().values())), catalog.newest(start, n)
        items = catalog.items(ids)
        return total, [items[i] for i in ids if i in items]

    def facets(self, catalog: Catalog, where: Sequence[str]) -> dict[str, Any]:
        chosen = self.selected(catalog, where) if where else None
        return self.overview(catalog).facets(chosen)

    def status(self) -> dict[str, Any]:
        """As `Collection.status`, at most _STATUS_SECONDS old."""
        kept = self._once.get("status")
        if kept is None or time.monotonic() - kept[0] > _STATUS_SECONDS:
            with Collection.open(self.folder, create=False) as collection:
                kept = self._once["status"] = time.monotonic(), collection.status()
        found: dict[str, Any] = kept[1]
        return found

    def points(self) -> dict[str, Any]:
        """The map of the collection."""
        return self._of_version("points", self._points)

    def _points(self) -> dict[str, Any]:
        from e5v_search.web.points import points  # evaluation and map come with it

        with Collection.open(self.folder, create=False) as collection:
            return points(collection)

    def gauges(self) -> dict[str, float]:
        found = {
            "waiting_questions": len(self.engine.turnstile),
            "waiting_reads": len(self.quick.turnstile),
            "waiting_pictures": len(self.pictures.turnstile),
            "uploads": len(self.uploads),
            "listeners": len(self.listeners),
            "indexing": float(self.runs.state().running),
        }
        with suppress(E5VError):  # a service without its collection is still to be counted
            found["collection_state"] = self.catalogs.version()[1]
        return found

    def news(self) -> dict[str, Any]:
        """What the page is told when it changes."""
        version = "gone"
        with suppress(E5VError):
            uid, state = self.catalogs.version()
            version = f"{uid[:8]}-{state}"
        return {"version": version, "run": asdict(self.runs.state())}
