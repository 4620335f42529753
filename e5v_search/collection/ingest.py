"""Ingestion: what is on disk becomes what the catalog says, with no more work than the difference asks for.

    scan ──> known? ──> hash (threads) ──> same content? ──> decode + prepare (threads) ──> model ──> commit

The catalog is asked and written in the caller's thread alone. A commit every few seconds makes items and vectors
visible together; a kill at any moment loses at most what came after the last one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from e5v_search import media
from e5v_search.catalog import VIEW, Catalog, Failed, FileRow, Put
from e5v_search.collection.report import Failure, Report
from e5v_search.embedder import Embedder
from e5v_search.errors import MediaError
from e5v_search.media import Facts, Found, Scan
from e5v_search.parallel import ahead, windows

COMMIT_SECONDS = 2.0
_BATCH_SECONDS = 1.0  # a model call takes about this long, so that even an 8B model on a laptop commits often
_MAX_BATCH = 256
_LOOKUP = 512


@dataclass
class _Job:
    """A file that is new or changed, on its way through the stages."""

    found: Found
    row: FileRow | None  # what the catalog knew
    content_hash: str = ""
    facts: Facts | None = None
    prepared: Any = None
    problem: str | None = None


class Ingest:
    """One run over `roots`, or over what lies `below` some paths under them.

    `embedder` is called only when something must be embedded. Of a file that cannot be used `unfinished(path)` may say
    that it is still being written: then it is left as it is, and not even listed.
    """

    def __init__(
        self,
        catalog: Catalog,
        embedder: Callable[[], Embedder],
        on_commit: Callable[[int], None],
        on_progress: Callable[[Report, int], None] | None = None,
        unfinished: Callable[[str], bool] | None = None,
    ) -> None:
        self.catalog = catalog
        self.report = Report()
        self._embedder = embedder
        self._on_progress = on_progress
        self._on_commit = on_commit
        self._unfinished = unfinished
        self._total = 0
        self._puts: list[Put] = []
        self._touched: list[FileRow] = []
        self._recovered: list[str] = []
        self._failed: list[Failure] = []
        self._failing: set[str] = set()
        self._twins: dict[str, list[_Job]] = {}  # jobs whose content is being embedded for another path
        self._last_commit = time.monotonic()
        self._batch = 1  # grows with the measured rate

    def run(self, roots: Sequence[str], below: Sequence[str] | None = None) -> Report:
        start = time.monotonic()
        self._failing = {f.path for f in self.catalog.failures() if f.kind == "image"}
        if self._on_progress is not None:
            self._total = sum(
                1 for _ in Scan(roots, below)
            )  # a second look at the folders is cheap beside "time left: unknown"
        scan = Scan(roots, below)
        seen: list[str] = []
        try:
            with (
                closing(ahead(self._hash, self._news(scan, seen))) as hashed,
                closing(ahead(self._decode, self._unknown_content(hashed))) as decoded,
            ):
                self._embed(decoded)
            for problem in scan.problems:
                self._fail(problem.path, problem.reason)
            self._commit()
            self._forget_vanished(scan, seen)
        finally:
            # Ctrl-C or an error: what is embedded is kept
            self._commit()
            self.report.warnings += scan.warnings
            self.report.seconds = time.monotonic() - start
        return self.report

    # the stages, in the order in which a file meets them

    def _news(self, scan: Iterable[Found], seen: list[str]) -> Iterator[_Job]:
        """Files whose path, size or time the catalog does not know."""
        for chunk in windows(scan, _LOOKUP):
            known = self.catalog.known([found.path for found in chunk])
            for found in chunk:
                seen.append(found.path)
                row = known.get(found.path)
                if row is not None and (row.size, row.mtime_ns) == (found.size, found.mtime_ns):
                    self.report.unchanged += 1
                    if row.on_mount != found.on_mount:
                        self._touch(row, found)
                    self._clear_failure(found.path)
                else:
                    yield _Job(found, row)
            self._progress()

    def _hash(self, job: _Job) -> _Job:
        try:
            job.content_hash = media.content_hash(job.found.path)
        except MediaError as error:
            job.problem = str(error)
        return job

    def _unknown_content(self, jobs: Iterable[_Job]) -> Iterator[_Job]:
        """Passes on what must be embedded; a touched, moved or copied file ends here."""
        for job in jobs:
            if job.problem is not None:
                self._fail(job.found.path, job.problem)
            elif job.row is not None and job.row.content_hash == job.content_hash:
                self._touch(job.row, job.found)
                self.report.unchanged += 1
                self._clear_failure(job.found.path)
            elif job.content_hash in self._twins:
                self._twins[job.content_hash].append(job)
            elif twin := self.catalog.same_content([job.content_hash], "image").get(job.content_hash):
                self._put(job, copy_from=twin)
            else:
                self._twins[job.content_hash] = []
                yield job
            self._commit_if_due()

    def _decode(self, job: _Job) -> _Job:
        try:
            image, job.facts = media.decode(job.found.path)
        except MediaError as error:
            job.problem = str(error)
        else:
            job.prepared = self._embedder().prepare(image)
        return job

    def _embed(self, jobs: Iterator[_Job]) -> None:
        ready: list[_Job] = []
        for job in jobs:
            if job.problem is None:
                ready.append(job)
            else:
                self._fail_all(job, job.problem)
            if len(ready) >= self._batch:
                self._embed_batch(ready)
                ready = []
        if ready:
            self._embed_batch(ready)

    def _embed_batch(self, jobs: list[_Job]) -> None:
        embedder = self._embedder()
        if self.catalog.fingerprint is None:
            self.catalog.bind(embedder.fingerprint, embedder.dim, {"name": embedder.name, "quantize": embedder.quantize})
            self._on_commit(0)  # the index is there before the first vector: missing later, it was lost
        start = time.monotonic()
        vectors = embedder.embed_prepared([job.prepared for job in jobs])
        rate = len(jobs) / max(time.monotonic() - start, 1e-6)
        self._batch = min(max(int(rate * _BATCH_SECONDS), 1), 2 * self._batch, _MAX_BATCH)
        for job, vector in zip(jobs, vectors, strict=True):
            job.prepared = None
            if np.isfinite(vector).all():
                self._put(job, vector=vector)
            else:
                self._fail_all(job, "the model gives no finite vector for it; try --dtype float32")
        self._commit_if_due()
        self._progress()

    # what is to be committed

    def _put(self, job: _Job, vector: Any = None, copy_from: int | None = None) -> None:
        found, facts = job.found, job.facts
        self._puts.append(
            Put(
                kind="image",
                path=found.path,
                size=found.size,
                mtime_ns=found.mtime_ns,
                on_mount=found.on_mount,
                content_hash=job.content_hash,
                item_id=job.row.item_id if job.row else None,
                vectors={} if vector is None else {VIEW: vector},
                copy_from=copy_from,
                **({} if facts is None else facts.to_dict()),
            )
        )
        if job.row is None:
            self.report.added += 1
        else:
            self.report.updated += 1
        self._clear_failure(found.path)

    def _touch(self, row: FileRow, found: Found) -> None:
        self._touched.append(FileRow(row.path, row.item_id, found.size, found.mtime_ns, found.on_mount, row.content_hash))

    def _fail_all(self, job: _Job, reason: str) -> None:
        """A job and those that waited for its vector."""
        for each in (job, *self._twins.pop(job.content_hash)):
            self._fail(each.found.path, reason)

    def _fail(self, path: str, reason: str) -> None:
        if self._unfinished is not None and self._unfinished(path):
            return
        failure = Failure(path, reason)
        self.report.failed.append(failure)
        self._failed.append(failure)
        self._progress()

    def _clear_failure(self, path: str) -> None:
        if path in self._failing:
            self._recovered.append(path)

    def _commit_if_due(self) -> None:
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        # taken out first: after a failed commit (a full disk) they must not be tried again on the way out
        puts, touched, failed, recovered = self._puts, self._touched, self._failed, self._recovered
        self._puts, self._touched, self._failed, self._recovered = [], [], [], []
        if puts or touched or failed or recovered:
            ids = self.catalog.commit(
                puts=puts,
                touched=touched,
                failed=[Failed(f.path, "image", f.reason) for f in failed],
                recovered=[(path, "image") for path in recovered],
            )
            self._on_commit(len(puts))
            for put, item_id in zip(puts, ids, strict=True):
                for twin in self._twins.pop(put.content_hash, ()):
                    self._put(twin, copy_from=item_id)
        self._last_commit = time.monotonic()
        if self._puts:
            self._commit()

    def _forget_vanished(self, scan: Scan, seen: list[str]) -> None:
        gone = []
        for row in self.catalog.unseen(scan.tops, seen):
            if scan.keep_reason(row.path, row.on_mount) is None:
                gone.append(row.item_id)
        for ids in windows(gone, 4096):
            self.catalog.commit(gone=ids)
        self.report.removed = len(gone)
        still = {failure.path for failure in self.report.failed}.union(seen)
        cleared = [path for path in self._failing - still if scan.covers(path) and scan.keep_reason(path, False) is None]
        if cleared:
            self.catalog.commit(recovered=[(path, "image") for path in cleared])

    def _progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.report, self._total)
