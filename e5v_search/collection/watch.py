"""Following folders: what happens in them reaches the collection within seconds.

    notices ──> settle ──> ingest of these paths alone ──> a report
                  ^                │ cannot be used, but was changed a moment ago
                  └─── wait <──────┘

The write lock is held only while something is written. Now and then everything is looked through, for what notices do not
tell: lost ones, links whose targets changed, files that another machine writes.
"""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from e5v_search import corpora
from e5v_search.collection.core import Collection
from e5v_search.collection.report import Report
from e5v_search.errors import CollectionBusy, CollectionError, DiskFull, StoreError
from e5v_search.media import SUFFIXES, Changes, Signature, signature

SETTLE = 0.5  # seconds that a path must stay as it is before it is looked at
PATIENCE = 10.0  # seconds that a file which cannot be used is given to become whole
SAVE_EVERY = 30.0
LOOK_EVERY = 600.0
LOOK_EVERY_UNWATCHED = 2.0  # where the system gives no notices
_SHARE = 0.02  # of the time, at most, for looking through everything, and for saving the index
_BATCH = 256  # paths taken at once, so that a large copy does not keep what comes after it waiting
_BURST = 100  # notices at once, of which some may have been lost
_RETRY_BUSY, _RETRY_FULL = 1.0, 30.0


@dataclass
class _Waiting:
    signature: Signature
    since: float  # when it was last seen to change


class Follower:
    """Brings `sources` (path, kind) into `collection`, and then whatever happens to them, until it is stopped.

    `views` are as for Collection.ingest. `note` is given a line when something is waited for, cannot be watched, or goes on
    again.
    """

    def __init__(
        self, collection: Collection, sources: Sequence[tuple[str, str]], note: Callable[[str], None], views: Sequence[str] = ()
    ) -> None:
        self.collection = collection
        self.sources = [(os.path.realpath(os.path.expanduser(path)), kind) for path, kind in sources]
        self.roots = list(dict.fromkeys(path for path, _ in self.sources))
        self._suffixes = {suffix for _, kind in self.sources for suffix in (SUFFIXES if kind == "image" else corpora.SUFFIXES)}
        self._note = note
        self._views = views
        self._changed: dict[str, _Waiting] = {}
        self._unfinished: dict[str, _Waiting] = {}
        self._last_chance: set[str] = set()
        self._looking_at: set[str] = set()
        self._failed: dict[str, str] = {}  # what has been reported
        self._warned: list[str] = []
        self._trouble: str | None = None
        self._resume_at = 0.0
        self._looked_at = self._look_seconds = 0.0
        self._look_soon = False
        self._save_at: float | None = None
        self._save_seconds = 0.0

    def run(self, on_progress: Callable[[Report, int], None] | None = None) -> Generator[Report, None, None]:
        """A report of the first look through everything, then one whenever something has changed; ends by being closed.

        Of failures and warnings a report has those that are new. Raises what Collection.ingest raises, but waits while
        another process is writing or the disk is full.
        """
        changes = Changes(self.roots, self._note)  # before the first look: what happens during it is noticed
        try:
            while (report := self._look(None, on_progress)) is None:
                time.sleep(_RETRY_BUSY)
            yield report
            while True:
                self._notice(changes.wait())
                if time.monotonic() < self._resume_at:
                    continue
                paths = self.roots if self._look_is_due(bool(changes.unwatched)) else self._settled()
                report = self._look(paths) if paths else None
                if report and (report.added or report.updated or report.removed or report.failed or report.warnings):
                    yield report
                if self._save_at is not None and time.monotonic() >= self._save_at:
                    self._save()
        finally:
            changes.close()
            if self._save_at is not None:
                with suppress(CollectionError):  # searches make up for it
                    self._save()

    def _notice(self, paths: set[str]) -> None:
        now = time.monotonic()
        for path in paths:
            self._changed[path] = _Waiting(signature(path), now)
            self._unfinished.pop(path, None)
            self._last_chance.discard(path)
        self._look_soon |= len(paths) > _BURST

    def _settled(self) -> list[str]:
        """Paths that have not changed for a while, taken off the list."""
        settled: list[str] = []
        for path, waiting in list(self._changed.items()):
            if self._rests(path, waiting, SETTLE):
                del self._changed[path]
                if self._matters(path, waiting.signature):
                    settled.append(path)
            if len(settled) >= _BATCH:
                return settled
        for path, waiting in list(self._unfinished.items()):
            before = waiting.signature
            if self._rests(path, waiting, PATIENCE):
                settled.append(path)
                self._last_chance.add(path)
            elif waiting.signature != before:
                self._changed[path] = waiting
            else:
                continue
            del self._unfinished[path]
        return settled

    def _rests(self, path: str, waiting: _Waiting, seconds: float) -> bool:
        now = time.monotonic()
        if (current := signature(path)) != waiting.signature:
            waiting.signature, waiting.since = current, now
        return now - waiting.since >= seconds

    def _matters(self, path: str, current: Signature) -> bool:
        """Whether a look at `path` could change anything: most notices are of other files."""
        if path in self.roots or os.path.splitext(path)[1].lower() in self._suffixes:
            return True
        if current is None:
            return next(self.collection.catalog.paths_under([path]), None) is not None
        return len(current) == 2  # a folder

    def _look_is_due(self, unwatched: bool) -> bool:
        if self._look_soon and not self._changed:
            return True
        every = max(LOOK_EVERY_UNWATCHED if unwatched else LOOK_EVERY, self._look_seconds / _SHARE)
        return time.monotonic() - self._looked_at >= every

    def _look(self, paths: list[str] | None, on_progress: Callable[[Report, int], None] | None = None) -> Report | None:
        """Bring what is at or below `paths` (None: everything, for the first time) into the collection; None: not now."""
        start = time.monotonic()
        self._looking_at = set(paths or ())
        try:
            if paths is None:
                report = self.collection.ingest_sources(self.sources, self._views, on_progress, self._may_become_usable)
            else:
                report = self.collection.ingest_changes(self.sources, paths, self._may_become_usable)
        except (CollectionBusy, DiskFull) as error:
            for path in self._looking_at:
                self._changed.setdefault(path, _Waiting(signature(path), start - SETTLE))
            self._resume_at = time.monotonic() + (_RETRY_FULL if isinstance(error, DiskFull) else _RETRY_BUSY)
            if self._trouble is None:
                self._note(f"waiting: {error}")
            self._trouble = str(error)
            return None
        if self._trouble is not None:
            self._note("going on")
            self._trouble = None
        self._last_chance -= self._looking_at
        whole = paths is None or self._looking_at.issuperset(self.roots)
        if whole:
            self._looked_at = time.monotonic()
            # embedding is work that had to be done
            self._look_seconds = self._looked_at - start if not (report.added or report.updated) else self._look_seconds
            self._look_soon = False
        if paths is not None and self._save_at is None and (report.added or report.updated or report.removed):
            self._save_at = time.monotonic() + max(SAVE_EVERY, self._save_seconds / _SHARE)
        self._tell_only_news(report, whole)
        return report

    def _may_become_usable(self, path: str) -> bool:
        if path in self._last_chance or not (path in self._looking_at or _changed_just_now(path)):
            return False
        self._unfinished[path] = _Waiting(signature(path), time.monotonic())
        return True

    def _tell_only_news(self, report: Report, whole: bool) -> None:
        failed, warnings = report.failed, report.warnings
        report.failed = [failure for failure in failed if self._failed.get(failure.path) != failure.reason]
        report.warnings = [line for line in warnings if line not in self._warned]
        if whole:
            for line in self._warned:
                if line not in warnings:
                    self._note(f"no longer so: {line}")
            self._failed, self._warned = {}, []
        self._failed = {path: reason for path, reason in self._failed.items() if path not in self._looking_at}
        self._failed |= {failure.path: failure.reason for failure in failed}
        self._warned += report.warnings if not whole else warnings

    def _save(self) -> None:
        start = time.monotonic()
        try:
            self.collection.save_index()
        except (CollectionBusy, DiskFull, StoreError):
            self._save_at = start + SAVE_EVERY
        else:
            self._save_at, self._save_seconds = None, time.monotonic() - start


def _changed_just_now(path: str) -> bool:
    """By the time of the last change of any kind: copying programs set the time of writing back to that of the original."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return abs(time.time() - max(status.st_ctime, status.st_mtime)) < PATIENCE
