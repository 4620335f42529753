"""Ingestion: what is on disk becomes what the catalog says, with no more work than the difference asks for.

    find ──> known? ──> same content? ──> prepare, model (an `Engine`) ──> commit

Photos and files of texts differ in how they are found and compared (`photos`, `texts`); from there on they share this
module. The catalog is asked and written in the caller's thread alone, while the engine is at the next batch. A commit
every few seconds makes items and vectors visible together; a kill at any moment loses at most what came after the last one.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import numpy as np

from e5v_search.catalog import Catalog, Corpus, Failed, FileRow, Put
from e5v_search.collection import views
from e5v_search.collection.engine import Engine
from e5v_search.collection.inputs import Input, Outcome
from e5v_search.collection.report import Failure, Report
from e5v_search.media import Scan

COMMIT_SECONDS = 2.0

T = TypeVar("T")


@dataclass
class Job:
    """Something new or changed on its way: all that is to be written of it but its vectors."""

    put: Put
    place: str = ""  # within a file of texts, for those who have to mend it
    settled: Callable[[bool], None] | None = None  # told once whether it has worked


@dataclass
class _Pending:
    """What the next commit writes."""

    puts: list[Put] = field(default_factory=list)
    touched: list[FileRow] = field(default_factory=list)
    moved: list[FileRow] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    recovered: list[tuple[str, str]] = field(default_factory=list)
    completed: list[tuple[int, str, np.ndarray]] = field(default_factory=list)
    read: list[Corpus] = field(default_factory=list)


class Ingest:
    """One run. `engine` is asked only when something must be embedded, and `accept` may refuse it then (by raising) before
    anything of it is written; leaving the context keeps what is done.

    Of a file that cannot be used `unfinished(path)` may say that it is still being written: then it is left as it is, and
    not even listed.
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        accept: Callable[[Engine], None],
        on_commit: Callable[[int], None],
        on_progress: Callable[[Report, int], None] | None = None,
        unfinished: Callable[[str], bool] | None = None,
    ) -> None:
        self.catalog = catalog
        self.report = Report()
        self.total = 0  # files and texts in all, for `on_progress`
        self.counts_ahead = on_progress is not None
        self._engine = engine
        self._accept = accept
        self._on_progress = on_progress
        self._on_commit = on_commit
        self._unfinished = unfinished
        self._views = catalog.views
        self._pending = _Pending()
        self._failing = {(failed.path, failed.kind) for failed in catalog.failures()}
        self.failed: set[tuple[str, str]] = set()  # in this run
        self._twins: dict[tuple[str, str], list[Job]] = {}  # (kind, content): jobs that wait for the vectors of another
        self._start = self._last_commit = time.monotonic()
        self._begun = False  # something was embedded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Ctrl-C or an error: what is embedded is kept
        self.commit()
        self.report.seconds = time.monotonic() - self._start

    # what the stages of photos and texts have in common

    def unknown_content(self, jobs: Sequence[Job]) -> list[Job]:
        """What of it must be embedded; a copy of something that is known, or on its way, ends here."""
        known = self.catalog.same_content(list({job.put.content_hash for job in jobs}), jobs[0].put.kind) if jobs else {}
        fresh = []
        for job in jobs:
            key = job.put.kind, job.put.content_hash
            if key in self._twins:
                self._twins[key].append(job)
            elif job.put.content_hash in known:
                self.put(job, copy_from=known[job.put.content_hash])
            else:
                self._twins[key] = []
                fresh.append(job)
        return fresh

    def embed(self, kind: str, jobs: Iterator[Job]) -> None:
        with closing(self.embedded(kind, jobs, _input, self._views)) as done:
            for batch in done:
                for job, outcome in batch:
                    if outcome.vectors is None:
                        assert outcome.problem is not None
                        self._fail_all(job, outcome.problem)
                    else:
                        job.put = replace(job.put, **outcome.facts)
                        self.put(job, vectors=outcome.vectors)
                self.commit_if_due()
                self.progress()

    def embedded(
        self, kind: str, items: Iterator[T], input_of: Callable[[T], Input], of: Sequence[str]
    ) -> Generator[list[tuple[T, Outcome]], None, None]:
        """See `Engine.embedded`. The collection is bound to the model before its first vector comes."""
        with closing(self._engine.embedded(kind, items, input_of, of)) as done:
            for batch in done:
                if any(outcome.vectors is not None for _, outcome in batch):
                    self._begin()
                yield batch

    def _begin(self) -> None:
        if self._begun:
            return
        engine = self._engine
        self._accept(engine)
        if self.catalog.fingerprint is None:
            self.catalog.bind(engine.fingerprint, engine.dim, engine.recalled_by)
        self._on_commit(0)  # also after a run that was killed behind its bind: an index missing later was lost
        self._begun = True

    # what is to be committed

    def put(self, job: Job, vectors: views.Vectors | None = None, copy_from: int | None = None) -> None:
        job.put.vectors, job.put.copy_from = vectors or {}, copy_from
        self._pending.puts.append(job.put)
        if job.put.item_id is None:
            self.report.added += 1
        else:
            self.report.updated += 1
        if not job.put.part and job.put.path is not None:
            self.recover(job.put.path, job.put.kind)
        if job.settled is not None:
            job.settled(True)

    def touch(self, row: FileRow) -> None:
        """A photo whose content is what it was, with its new size, time and mount."""
        self._pending.touched.append(row)

    def move(self, row: FileRow) -> None:
        """A text that stands in another place of its file, its new part."""
        self._pending.moved.append(row)

    def complete(self, item_id: int, view: str, vector: np.ndarray) -> None:
        self._pending.completed.append((item_id, view, vector))

    def close(self, corpus: Corpus) -> None:
        """A file of texts that has been read whole; all that came of it has been put already."""
        self._pending.read.append(corpus)

    def fail(self, path: str, kind: str, reason: str, place: str = "") -> None:
        if self._unfinished is not None and self._unfinished(path):
            return
        failed = Failed(path, kind, reason, place)
        self.report.failed.append(Failure(failed.where, reason))
        self._pending.failed.append(failed)
        self.failed.add((path, kind))
        self.progress()

    def _fail_all(self, job: Job, reason: str) -> None:
        """A job and those that waited for its vectors."""
        for each in (job, *self._twins.pop((job.put.kind, job.put.content_hash))):
            assert each.put.path is not None
            self.fail(each.put.path, each.put.kind, reason, each.place)
            if each.settled is not None:
                each.settled(False)

    def recover(self, path: str, kind: str) -> None:
        """What was said of the file before is not true any more."""
        if (path, kind) in self._failing:
            self._pending.recovered.append((path, kind))

    def forget_failures(self, kind: str, scan: Scan, seen: Iterable[str]) -> None:
        """Those of files that are not there any more."""
        still = self.failed.union((path, kind) for path in seen)
        of_kind = [path for path, its_kind in self._failing - still if its_kind == kind]
        cleared = [(path, kind) for path in of_kind if scan.covers(path) and scan.keep_reason(path, False) is None]
        self._pending.recovered += cleared

    def commit_if_due(self) -> None:
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        # taken out first: after a failed commit (a full disk) it must not be tried again on the way out
        pending, self._pending = self._pending, _Pending()
        if any(vars(pending).values()):
            ids = self.catalog.commit(**vars(pending))
            self._on_commit(len(pending.puts) + len(pending.completed))
            for put, item_id in zip(pending.puts, ids, strict=True):
                for twin in self._twins.pop((put.kind, put.content_hash), ()):
                    self.put(twin, copy_from=item_id)
        self._last_commit = time.monotonic()
        if any(vars(self._pending).values()):
            self.commit()

    def progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.report, self.total)


def _input(job: Job) -> Input:
    put = job.put
    return Input(put.kind, put.content_hash, put.path if put.kind == "image" else None, put.text)
