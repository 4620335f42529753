"""What collections give back: reports of runs and lists of hits, with the field names that programs rely on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from e5v_search.catalog import Item


@dataclass(frozen=True)
class Failure:
    path: str
    reason: str


@dataclass
class Report:
    """One run of `ingest`: what happened to how many photos and texts."""

    added: int = 0
    unchanged: int = 0
    updated: int = 0
    removed: int = 0
    failed: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    completed: int = 0  # items that were there and got a view that they lacked
    warnings: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Photos and texts dealt with so far, in any way."""
        return self.added + self.unchanged + self.updated + len(self.failed) + self.completed

    def to_json(self) -> dict[str, Any]:
        """The fields that programs rely on; `completed` and `warnings` are for people."""
        return {name: value for name, value in asdict(self).items() if name not in ("completed", "warnings")}


@dataclass(frozen=True, slots=True)
class Hit:
    """One result. `score` is the cosine of query and item, or the weighted sum of cosines.

    `id` is None for a picture that is in no collection; `words` are those that it shares with the query, if asked for.
    """

    rank: int
    id: int | None
    score: float
    kind: str
    path: str | None = None
    text: str | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    part: str | None = None  # which text of the file at `path`; None for photos
    words: list[str] | None = None

    @classmethod
    def of(cls, item: Item, rank: int, score: float, words: list[str] | None = None) -> Self:
        facts = (item.kind, item.path, item.text, item.width, item.height, item.taken_at, item.part)
        return cls(rank, item.id, score, *facts, words)

    def to_json(self) -> dict[str, Any]:
        shown = asdict(self)
        if self.words is None:
            del shown["words"]
        return shown


class Hits(list[Hit]):
    """The hits of one search, best first, and how it went."""

    def __init__(self, hits: list[Hit], query: dict[str, Any], fingerprint: str, took_ms: dict[str, float]) -> None:
        super().__init__(hits)
        self.query = query
        self.fingerprint = fingerprint
        self.took_ms = took_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "fingerprint": self.fingerprint,
            "took_ms": {name: round(ms, 3) for name, ms in self.took_ms.items()},
            "hits": [hit.to_json() for hit in self],
        }


class Stopwatch:
    """Milliseconds spent in named phases."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3

    def total(self) -> dict[str, float]:
        return {name: self.ms.get(name, 0.0) for name in ("load", "embed", "search")} | {
            "total": (time.perf_counter() - self._start) * 1e3
        }
