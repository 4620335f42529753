"""What collections tell of their work: reports of runs, with the field names that programs rely on, and times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


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
    behind: str | None = None  # why the index in Milvus has not all of it

    @property
    def done(self) -> int:
        """Photos and texts dealt with so far, in any way."""
        return self.added + self.unchanged + self.updated + len(self.failed) + self.completed

    def to_json(self) -> dict[str, Any]:
        """The fields that programs rely on; the last three are for people."""
        return {name: value for name, value in asdict(self).items() if name not in ("completed", "warnings", "behind")}


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
