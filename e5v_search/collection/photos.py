"""The photos under some roots: which are new, changed, moved, copied or gone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from e5v_search import media
from e5v_search.catalog import FileRow, Put
from e5v_search.collection.ingest import Ingest, Job
from e5v_search.errors import MediaError
from e5v_search.media import Found, Scan
from e5v_search.parallel import ahead, windows

_LOOKUP = 512


@dataclass
class _PhotoJob(Job):
    row: FileRow | None = None  # what the catalog knew
    problem: str | None = None


class Photos:
    kind = "image"

    def __init__(self, ingest: Ingest, roots: Sequence[str], below: Sequence[str] | None = None) -> None:
        self._ingest = ingest
        self._scan = Scan(roots, below)
        self._seen: list[str] = []

    def count(self) -> int:
        return sum(1 for _ in Scan(self._scan.roots))  # a second look at the folders is cheap beside "time left: unknown"

    def run(self) -> None:
        ingest = self._ingest
        with closing(ahead(self._hash, self._news())) as hashed:
            ingest.embed(self.kind, self._unknown_content(hashed))
        for problem in self._scan.problems:
            ingest.fail(problem.path, self.kind, problem.reason)
        ingest.commit()
        self._forget_vanished()
        ingest.report.warnings += self._scan.warnings

    # the stages, in the order in which a file meets them

    def _news(self) -> Iterator[_PhotoJob]:
        """Files whose path, size or time the catalog does not know."""
        ingest = self._ingest
        for chunk in windows(self._scan, _LOOKUP):
            known = ingest.catalog.known([found.path for found in chunk])
            for found in chunk:
                self._seen.append(found.path)
                row = known.get(found.path)
                if row is not None and (row.size, row.mtime_ns) == (found.size, found.mtime_ns):
                    ingest.report.unchanged += 1
                    if row.on_mount != found.on_mount:
                        ingest.touch(replace(row, on_mount=found.on_mount))
                    ingest.recover(found.path, self.kind)
                else:
                    yield _PhotoJob(_put(found, row), row=row)
            ingest.progress()

    def _hash(self, job: _PhotoJob) -> _PhotoJob:
        assert job.put.path is not None
        try:
            job.put.content_hash = media.content_hash(job.put.path)
        except MediaError as error:
            job.problem = str(error)
        return job

    def _unknown_content(self, jobs: Iterable[_PhotoJob]) -> Iterator[Job]:
        """Passes on what must be embedded; a touched, moved or copied file ends here."""
        ingest = self._ingest
        for job in jobs:
            put, row = job.put, job.row
            assert put.path is not None
            if job.problem is not None:
                ingest.fail(put.path, self.kind, job.problem)
            elif row is not None and row.content_hash == put.content_hash:
                ingest.touch(replace(row, size=put.size, mtime_ns=put.mtime_ns, on_mount=put.on_mount))
                ingest.report.unchanged += 1
                ingest.recover(put.path, self.kind)
            else:
                yield from ingest.unknown_content([job])
            ingest.commit_if_due()

    def _forget_vanished(self) -> None:
        ingest, scan = self._ingest, self._scan
        gone = [
            row.item_id
            for row in ingest.catalog.unseen(scan.tops, self._seen)
            if scan.keep_reason(row.path, row.on_mount) is None
        ]
        for ids in windows(gone, 4096):
            ingest.catalog.commit(gone=ids)
        ingest.report.removed += len(gone)
        ingest.forget_failures(self.kind, scan, self._seen)


def _put(found: Found, row: FileRow | None) -> Put:
    return Put(
        kind="image",
        path=found.path,
        size=found.size,
        mtime_ns=found.mtime_ns,
        on_mount=found.on_mount,
        content_hash="",  # when it has been read
        item_id=row.item_id if row else None,
    )
