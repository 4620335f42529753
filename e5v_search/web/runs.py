"""Index runs that are started from the page: what was indexed before is looked through again, by the engine's own model."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from e5v_search.collection import Collection, Report
from e5v_search.config import ModelChoice
from e5v_search.errors import CollectionBusy, E5VError, UsageError
from e5v_search.web.engine import Engine


@dataclass(frozen=True)
class RunState:
    allowed: bool
    running: bool = False
    done: int = 0
    total: int = 0
    added: int = 0
    updated: int = 0
    removed: int = 0
    failed: int = 0
    error: str | None = None


class Runs:
    """One at a time."""

    def __init__(self, folder: Path, engine: Engine, choice: ModelChoice, allowed: bool) -> None:
        self._folder, self._engine, self._choice = folder, engine, choice
        self._state = RunState(allowed)
        self._thread: threading.Thread | None = None
        self._stopping = False

    def state(self) -> RunState:
        return self._state

    def start(self) -> None:
        """Returns at once. Raises UsageError where it is not allowed, CollectionBusy while a run is under way."""
        if not self._state.allowed:
            raise UsageError("this service starts no index runs; it does when started with --allow-index")
        if self._state.running:
            raise CollectionBusy("an index run is under way already")
        self._state = RunState(True, running=True)
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends a run; what it has done is kept."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        error = None
        try:
            with Collection.open(self._folder, self._engine.shared() or self._choice, create=False) as collection:
                self._show(collection.ingest(on_progress=self._told), self._state.total)
        except KeyboardInterrupt:
            error = "stopped"
        except E5VError as problem:
            error = str(problem)
        except Exception as problem:  # whatever it was, the page is to know that the run is over
            error = f"{type(problem).__name__}: {problem}"
        self._state = replace(self._state, running=False, error=error)

    def _told(self, report: Report, total: int) -> None:
        if self._stopping:
            raise KeyboardInterrupt
        self._show(report, total)

    def _show(self, report: Report, total: int) -> None:
        self._state = replace(
            self._state,
            done=report.done,
            total=max(total, report.done),
            added=report.added,
            updated=report.updated,
            removed=report.removed,
            failed=len(report.failed),
        )
