"""Every data set by name: where it is read from, and the protocol it is measured by."""

import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from e5v_search.embedder import Embedder
from e5v_search.errors import UsageError
from e5v_search.evaluation import made_scenes, protocols, read_captioned, read_composed, read_hub, read_sts
from e5v_search.evaluation.bootstrap import intervals
from e5v_search.evaluation.metrics import Outcome
from e5v_search.evaluation.read_hub import Hub
from e5v_search.evaluation.records import Captioned, Composed, Data, Loaded, Missing, Rating, Scenes, absent
from e5v_search.evaluation.report import Report
from e5v_search.evaluation.submission import write_submissions
from e5v_search.evaluation.vectors import Vectors
from e5v_search.prompts import FORMS, load_prompts, own_set

# (outcome, what was used of the data), from (data, vectors, missing, prompts in place of the protocol's own)
Protocol = Callable[[Any, Vectors, Missing, str | None], tuple[Outcome, Data]]


@dataclass(frozen=True)
class Dataset:
    """`prompts`: the protocol's own set, or what its sets are called together. `elsewhere`: from the hub, or drawn here."""

    summary: str
    local: Callable[[Path], Loaded] | None
    elsewhere: Hub | Callable[[], Loaded] | None
    protocol: str
    measure: Protocol | None  # None: CIRR's test split, whose targets are secret
    prompts: str = "retrieval"


_RETRIEVAL = "text-image retrieval, both ways"
_RENDERED = "image-image retrieval, captions drawn"
_COMPOSED = "composed image retrieval"
_ALL = "retrieval, composed retrieval and similarity of drawn scenes"
_KINDS = {  # of prompts
    _RETRIEVAL: ("text", "image"),
    _RENDERED: ("image",),
    _COMPOSED: ("image", "composed"),
    _ALL: ("text", "image", "composed"),
}
_rendered = partial(protocols.captioned, rendered=True)

DATASETS: dict[str, Dataset] = {
    "flickr30k": Dataset(
        "Flickr30K's 1,000 test pictures", read_captioned.flickr30k, read_hub.FLICKR30K, _RETRIEVAL, protocols.captioned
    ),
    "coco": Dataset("COCO's 5,000 test pictures", read_captioned.coco, read_hub.COCO, _RETRIEVAL, protocols.captioned),
    "i2i-flickr30k": Dataset(
        "the same, captions drawn as pictures", read_captioned.flickr30k, read_hub.FLICKR30K, _RENDERED, _rendered
    ),
    "i2i-coco": Dataset("the same, captions drawn as pictures", read_captioned.coco, read_hub.COCO, _RENDERED, _rendered),
    "cirr": Dataset("CIRR's validation split", read_composed.cirr, read_hub.CIRR, _COMPOSED, protocols.cirr, "cirr"),
    "cirr-test": Dataset(
        "CIRR's test split: files for its server",
        partial(read_composed.cirr, split="test1"),
        read_hub.CIRR_TEST,
        _COMPOSED,
        None,
        "cirr",
    ),
    "fashioniq": Dataset(
        "FashionIQ's validation split", read_composed.fashioniq, read_hub.FASHIONIQ, _COMPOSED, protocols.fashioniq, "fashioniq"
    ),
    "sts": Dataset(
        "seven tasks of rated sentence pairs", read_sts.sts, None, "semantic textual similarity", protocols.sts, "sts"
    ),
    "flickr8k": Dataset("Flickr8k's 1,000 test pictures", read_captioned.flickr8k, None, _RETRIEVAL, protocols.captioned),
    "coco-mini": Dataset("a hundred pictures of COCO", read_captioned.coco_mini, None, _RETRIEVAL, protocols.captioned),
    "scenes": Dataset("drawn shapes, all types of task", None, made_scenes.scenes, _ALL, protocols.scenes, "scenes"),
    "folder": Dataset("your photos with a captions file", read_captioned.folder, None, _RETRIEVAL, protocols.captioned),
}


def check(name: str, data: Path | None, prompts: str | None = None, revisions: Mapping[str, str] | None = None) -> None:
    """What can be refused before a model is loaded. Raises UsageError."""
    dataset = DATASETS[name]
    if data is not None and dataset.local is None:
        raise UsageError(f"{name} are drawn and need no --data")
    if data is None and dataset.elsewhere is None:
        raise UsageError(f"{name} is not on the model hub: give the folder that it lies in with --data")
    if revisions and (data is not None or not isinstance(dataset.elsewhere, Hub)):
        raise UsageError(f"--revision is for data sets of the model hub, and {name} is not read from there")
    if isinstance(dataset.elsewhere, Hub):
        dataset.elsewhere.check(revisions or {})
    if prompts is not None and prompts not in FORMS:
        chosen = load_prompts(prompts)
        for kind in _KINDS.get(dataset.protocol, ("text",)):
            chosen.get(kind)


def read(
    name: str,
    data: Path | None,
    limit: int | None = None,
    allow_missing: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> Loaded:
    """The data set from the folder `data`, else from the hub; of it the first `limit` pictures, queries or pairs a task.

    `revisions` of the hub's repositories, by name; those without one are read as they are now. The report names the commits.
    Raises DataError for pictures that are not there, unless they may be missing: before anything is embedded.
    """
    dataset = DATASETS[name]
    check(name, data, revisions=revisions)
    if data is not None and dataset.local is not None:
        loaded = dataset.local(data.expanduser())
    elif isinstance(dataset.elsewhere, Hub):
        loaded = dataset.elsewhere(revisions or {})
    elif dataset.elsewhere is not None:
        loaded = dataset.elsewhere()
    if limit is not None:
        loaded = replace(loaded, data=_first(loaded.data, limit))
    for part in loaded.data.values() if isinstance(loaded.data, Mapping) else [loaded.data]:
        if isinstance(part, Captioned | Composed):
            Missing(allow_missing).add(part.gallery, absent(part.gallery))
    return loaded


def _first(data: Data, n: int) -> Data:
    return {name: part.first(n) for name, part in data.items()} if isinstance(data, Mapping) else data.first(n)


def evaluate(
    name: str,
    loaded: Loaded,
    embedder: Embedder,
    cache: Path,
    *,
    prompts: str | None = None,
    allow_missing: bool = False,
    limit: int | None = None,
    out: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Measure `embedder` on data that `read` gave, by the paper's protocol, with vectors kept in the folder `cache`.

    `prompts` takes the place of the protocol's own set, as `prompts.own_set` says. `out` is where the report will be, beside
    which CIRR's files are put. Raises DataError for missing pictures unless allowed.
    """
    dataset = DATASETS[name]
    start = time.monotonic()
    vectors, missing = Vectors(embedder, cache, on_progress), Missing(allow_missing)
    shown = own_set(prompts, dataset.prompts)
    submissions: tuple[str, ...] = ()
    used: Data
    if dataset.measure is None:
        if out is None or not isinstance(loaded.data, Composed):
            raise UsageError(f"{name} writes files for CIRR's server beside the report: say where with --out FILE.json")
        files, used = protocols.cirr_submission(loaded.data, vectors, missing, prompts)
        outcome = Outcome({})
        whole = limit is None and not missing.reasons
        place = out if shown == dataset.prompts else out.with_stem(f"{out.stem}-{_file_name(shown)}")
        submissions = write_submissions(files, place, [q.key for q in loaded.data.queries] if whole else None)
    else:
        outcome, used = dataset.measure(loaded.data, vectors, missing, prompts)
    queries, gallery = _sizes(used)
    return Report(
        dataset=name,
        model=embedder.name,
        fingerprint=str(embedder.made_by.with_prompts(shown)),
        protocol=dataset.protocol,
        outcome=outcome,
        metrics=outcome.metrics(),
        intervals=intervals(outcome),
        queries=queries,
        gallery=gallery,
        seconds=time.monotonic() - start,
        prompts=shown,
        source=loaded.source,
        revision=loaded.revision,
        questions=Loaded(used, "", "").questions,
        versions=_versions(),
        embedded=vectors.embedded,
        notes=loaded.notes,
        missing=missing.reasons or None,
        limit=limit,
        submissions=submissions,
    )


def _file_name(prompts: str) -> str:
    """A prompt set, or the user's words, as a part of a file's name."""
    name = Path(prompts).stem if prompts.endswith(".toml") else prompts
    return re.sub(r"[^\w.-]+", "-", name).strip("-")[:60]


def _sizes(data: Data) -> tuple[int, int | None]:
    if isinstance(data, Captioned):
        return len(data.captions), len(data.gallery)
    if isinstance(data, Rating):
        return sum(map(len, data.tasks.values())), None
    if isinstance(data, Scenes):
        return sum(_sizes(part)[0] for part in (data.captioned, data.composed, data.rating)), len(data.composed.gallery)
    parts = [data] if isinstance(data, Composed) else list(data.values())
    return sum(len(part.queries) for part in parts), sum(len(part.gallery) for part in parts)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("e5v-search", "numpy", "pillow", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
