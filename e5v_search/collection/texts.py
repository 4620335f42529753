"""The files of texts under some roots, as texts or rendered: what of each is new, changed, moved within it or gone.

A file that was read whole and has the size and time of then is not opened. Any other is read and compared text by text:
a text that the file had before keeps its item, wherever it stands now; what is left over is new, or has changed in its
place, and only that can need embedding.
"""

import hashlib
import json
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from e5v_search import corpora
from e5v_search.catalog import Corpus, FileRow, Put, Reading
from e5v_search.collection.ingest import Ingest, Job
from e5v_search.corpora import Bad, Text
from e5v_search.errors import UnreadableFile
from e5v_search.media import Found, Scan
from e5v_search.parallel import windows

_LOOKUP = 256


@dataclass
class _File:
    """A file that is being read."""

    found: Found
    texts: int = 0
    unsettled: int = 0  # texts whose embedding is under way
    whole: bool = False  # read to its end
    failed: bool = False
    gone: list[int] = field(default_factory=list)


class Texts:
    def __init__(self, ingest: Ingest, roots: Sequence[str], kind: str, below: Sequence[str] | None = None) -> None:
        self.kind = kind
        self._ingest = ingest
        self._scan = Scan(roots, below, corpora.SUFFIXES)
        self._seen: list[str] = []
        self._shrunk: list[_File] = []  # files that have lost texts, which another file may have gained

    def count(self) -> int:
        """How many texts there are in all. Reads what has to be read, which is nothing beside the embedding."""
        total = 0
        for chunk in windows(Scan(self._scan.roots, suffixes=corpora.SUFFIXES), _LOOKUP):
            known = self._ingest.catalog.corpora([found.path for found in chunk], self.kind)
            for found in chunk:
                corpus = known.get(found.path)
                if corpus is not None and _is_as_it_was(found, corpus):
                    total += corpus.texts
                else:
                    try:
                        total += sum(1 for _ in corpora.read(found.path))
                    except UnreadableFile:
                        total += 1  # one failure
        return total

    def run(self) -> None:
        ingest = self._ingest
        with closing(self._news()) as news:
            ingest.embed(self.kind, news)
        for problem in self._scan.problems:
            ingest.fail(problem.path, self.kind, problem.reason)
        ingest.commit()
        self._forget_vanished()
        ingest.report.warnings += self._scan.warnings

    def _news(self) -> Generator[Job, None, None]:
        """The texts to embed, file by file."""
        ingest = self._ingest
        for chunk in windows(self._scan, _LOOKUP):
            known = ingest.catalog.corpora([found.path for found in chunk], self.kind)
            for found in chunk:
                self._seen.append(found.path)
                corpus = known.get(found.path)
                if corpus is not None and _is_as_it_was(found, corpus):
                    ingest.report.unchanged += corpus.texts
                    if corpus.on_mount != found.on_mount:
                        ingest.close(_corpus(found, self.kind, corpus.texts))
                    ingest.progress()
                else:
                    yield from self._read(_File(found))

    def _read(self, file: _File) -> Iterator[Job]:
        ingest, path = self._ingest, file.found.path
        ingest.recover(path, self.kind)
        with ingest.catalog.reading(path, self.kind) as reading, tempfile.TemporaryFile("w+") as left_over:
            is_first = reading.is_first
            try:
                for records in windows(corpora.read(path), _LOOKUP):
                    new = list(self._compared(file, records, reading))
                    if is_first:
                        yield from self._jobs(file, new, reading)
                    else:
                        # a place is free only when all texts have been looked at: what stood there may come later
                        left_over.writelines(_packed(text) for text in new)
                    ingest.commit_if_due()
                left_over.seek(0)
                for lines in windows(left_over, _LOOKUP):
                    yield from self._jobs(file, [_unpacked(line) for line in lines], reading)
            except UnreadableFile as error:
                file.failed = True
                ingest.fail(path, self.kind, str(error))
                return
            file.gone = list(reading.unclaimed())
        file.whole = True
        self._settle(file)

    def _compared(self, file: _File, records: Sequence[Text | Bad], reading: Reading) -> Iterator[Text]:
        """Passes on the texts that the file had not."""
        ingest, path = self._ingest, file.found.path
        texts = [record for record in records if isinstance(record, Text)]
        for record in records:
            if isinstance(record, Bad):
                file.failed = True
                ingest.fail(path, self.kind, record.reason, str(record.line))
                if record.part is not None:  # its last good text stays
                    reading.claim(row.item_id for row in reading.at([record.part]).values())
        file.texts += len(texts)
        for text, known in zip(texts, reading.match([(text.part, _hash(text)) for text in texts]), strict=True):
            if known is None:
                yield text
            elif known.facts != text.facts:
                ingest.put(self._job(file, text, known.item_id), copy_from=known.item_id)
            else:
                ingest.report.unchanged += 1
                if known.part != text.part:
                    found = file.found
                    place = (found.size, found.mtime_ns, found.on_mount, known.content_hash, self.kind, text.part)
                    ingest.move(FileRow(path, known.item_id, *place))
        ingest.progress()

    def _jobs(self, file: _File, texts: Sequence[Text], reading: Reading) -> Iterator[Job]:
        """Texts that are new to the file, in their places; passes on what must be embedded."""
        before = reading.at([text.part for text in texts])
        reading.claim(row.item_id for row in before.values())
        jobs = [self._job(file, text, before[text.part].item_id if text.part in before else None) for text in texts]
        file.unsettled += len(jobs)
        for job in jobs:
            job.settled = lambda worked: self._settled(file, worked)
        yield from self._ingest.unknown_content(jobs)

    def _job(self, file: _File, text: Text, item_id: int | None) -> Job:
        found = file.found
        put = Put(
            kind=self.kind,
            path=found.path,
            part=text.part,
            size=found.size,
            mtime_ns=found.mtime_ns,
            on_mount=found.on_mount,
            content_hash=_hash(text),
            text=text.text,
            facts=dict(text.facts),
            item_id=item_id,
        )
        return Job(put, str(text.line))

    def _settled(self, file: _File, worked: bool) -> None:
        file.unsettled -= 1
        file.failed |= not worked
        self._settle(file)

    def _settle(self, file: _File) -> None:
        """A file that is done without a failure need not be read again; one with failures is, as they may have been mended."""
        if file.whole and not file.unsettled:
            if file.gone:
                self._shrunk.append(file)
            elif not file.failed:
                self._ingest.close(_corpus(file.found, self.kind, file.texts))

    def _forget_vanished(self) -> None:
        ingest, scan = self._ingest, self._scan
        for file in self._shrunk:
            self._forget(file.gone)
            if not file.failed:
                ingest.close(_corpus(file.found, self.kind, file.texts))
        for corpus in list(ingest.catalog.unseen_corpora(self.kind, scan.tops, self._seen)):
            if scan.keep_reason(corpus.path, corpus.on_mount) is None:
                self._forget([row.item_id for row in ingest.catalog.parts(corpus.path, self.kind)])
        ingest.forget_failures(self.kind, scan, self._seen)

    def _forget(self, ids: Sequence[int]) -> None:
        for some in windows(ids, 4096):
            self._ingest.catalog.commit(gone=some)
        self._ingest.report.removed += len(ids)


def _is_as_it_was(found: Found, corpus: Corpus) -> bool:
    return (corpus.size, corpus.mtime_ns) == (found.size, found.mtime_ns)


def _corpus(found: Found, kind: str, texts: int) -> Corpus:
    return Corpus(found.path, kind, found.size, found.mtime_ns, found.on_mount, texts)


def _hash(text: Text) -> str:
    return hashlib.sha256(text.text.encode()).hexdigest()


def _packed(text: Text) -> str:
    return json.dumps([text.part, text.text, text.line, text.facts]) + "\n"


def _unpacked(line: str) -> Text:
    return Text(*json.loads(line))
