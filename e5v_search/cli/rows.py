"""What `embed` is given, row by row, and the matrix that comes of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e5v_search.corpora import lines
from e5v_search.errors import E5VError, MediaError, UnreadableFile

if TYPE_CHECKING:
    import numpy as np

    from e5v_search.backbones import Embedder

# rows handed to the model at once; those of composed queries hold whole pictures
_WINDOW = {"text": 256, "image": 64, "composed": 8}


@dataclass
class Row:
    """One row of the result: where its input comes from, the input, and why there is none."""

    input: str
    text: str = ""
    image: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Failed:
    row: int | None  # None: a folder that could not be read, so that rows of it are missing
    input: str
    reason: str


@dataclass
class Job:
    """What is to be embedded, row by row, and which kind of prompt it takes."""

    kind: str
    rows: list[Row]
    failed: list[Failed] = field(default_factory=list)


def _lines(path: Path) -> list[tuple[str, str | None]]:
    """The lines of a UTF-8 file, each with what is wrong with it."""
    try:
        return [(line.text, line.problem or (None if line.text.strip() else "an empty line")) for line in lines(path)]
    except UnreadableFile as error:
        raise E5VError(f"{path}: {error}") from error


def text_job(path: Path) -> Job:
    return Job("text", [Row(f"{path}:{n}", text, problem=problem) for n, (text, problem) in enumerate(_lines(path), start=1)])


def composed_job(path: Path) -> Job:
    rows = []
    for n, (line, problem) in enumerate(_lines(path), start=1):
        row = Row(f"{path}:{n}", problem=problem)
        rows.append(row)
        if problem is None:
            try:
                data = json.loads(line)
            except ValueError as error:
                row.problem = f"not JSON ({error})"
                continue
            image, text = (data.get("image"), data.get("text")) if isinstance(data, dict) else (None, None)
            if not isinstance(image, str) or not isinstance(text, str) or not text.strip():
                row.problem = 'not of the form {"image": path, "text": "…"}'
            else:
                row.image, row.text = image, text
    return Job("composed", rows)


def image_job(paths: Sequence[Path]) -> Job:
    """Folders give their photos; a file gives its row whatever it is, even twice: rows stay with what was asked for."""
    from e5v_search.media import Scan

    job = Job("image", [])
    for path in paths:
        if not path.is_dir():
            job.rows.append(Row(str(path), image=str(path)))
            continue
        scan = Scan([path])
        job.rows += [Row(found.path, image=found.path) for found in scan]
        job.failed += [Failed(None, problem.path, problem.reason) for problem in scan.problems]
    return job


def embed_rows(job: Job, embedder: "Embedder", prompts: str, on_progress: Callable[[int], None]) -> "np.ndarray":
    """-> (rows, dim) float32. A row whose input fails stays zero and is put into `job.failed`."""
    import numpy as np

    from e5v_search.embedder import embed_each
    from e5v_search.parallel import ahead, windows

    prepare, embed = _stages(job.kind, embedder, prompts)

    def prepared(row: Row) -> Any:
        if row.problem is not None:
            return None
        try:
            return prepare(row)
        except MediaError as error:
            row.problem = str(error)

    x = np.zeros((len(job.rows), embedder.dim), np.float32)
    window = _WINDOW[job.kind]
    for block in windows(enumerate(ahead(prepared, job.rows, depth=window)), window):
        good = [(n, value) for n, value in block if job.rows[n].problem is None]
        for (n, _), vector in zip(good, embed_each([value for _, value in good], embed), strict=True):
            if isinstance(vector, E5VError):
                job.rows[n].problem = str(vector)
            else:
                x[n] = vector
        job.failed += [Failed(n, job.rows[n].input, problem) for n, _ in block if (problem := job.rows[n].problem)]
        on_progress(block[-1][0] + 1)
    return x


def _stages(kind: str, embedder: "Embedder", prompts: str) -> tuple[Callable[[Row], Any], Callable[[list[Any]], "np.ndarray"]]:
    """What is done to a row ahead of the model, in threads; and what the model does to a list of such."""
    from e5v_search.media import decode

    if kind == "text":
        return lambda row: row.text, lambda texts: embedder.embed_texts(texts, prompts)
    if kind == "image":
        return lambda row: _prepared(row.image, embedder), lambda ready: embedder.embed_prepared(ready, prompts)
    return lambda row: (decode(row.image)[0], row.text), lambda pairs: embedder.embed_composed(pairs, prompts)


def _prepared(path: str, embedder: "Embedder") -> Any:
    from e5v_search.media import decode

    image, facts = decode(path, enough=embedder.enough)
    return embedder.prepare(image, facts.size)
