"""What is to be indexed: whether it can be, and the stages that its kind takes."""

import os
from collections.abc import Callable, Iterable, Sequence

from e5v_search.catalog import KINDS
from e5v_search.collection.completion import Completion
from e5v_search.collection.ingest import Ingest
from e5v_search.collection.photos import Photos
from e5v_search.collection.texts import Texts
from e5v_search.collection.views import check_views
from e5v_search.corpora import check_suffix
from e5v_search.errors import UnreadableFile, UsageError


def canonical(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    return list(dict.fromkeys(os.path.realpath(os.path.expanduser(os.fspath(path))) for path in paths))


def check_sources(sources: Iterable[tuple[str, str]], views: Iterable[str], is_known: Callable[[str], bool]) -> None:
    """Refuse what cannot be indexed, before anything is done: (path, kind) of `sources`, or one of `views`.

    A path that is not there must be known: its disk may be unplugged. Raises UsageError, UnreadableFile.
    """
    check_views(views)
    for path, kind in sources:
        if kind not in KINDS:
            raise UsageError(f"there is no kind {kind!r} of items; choose from: {', '.join(KINDS)}")
        if not os.path.lexists(path) and not is_known(path):
            raise UnreadableFile(f"no such file or folder: {path}")
        if kind != "image" and os.path.isfile(path):
            check_suffix(path)


def ingest_all(ingest: Ingest, sources: Sequence[tuple[str, str]], below: Sequence[str] | None = None) -> None:
    """Look through `sources` kind by kind, then give views to the items that lack them.

    With `below`, look only at what is, or lies below, these paths, and complete nothing else.
    """
    stages: list[Photos | Texts] = []
    for kind in KINDS:
        if roots := [path for path, its_kind in sources if its_kind == kind]:
            stages.append(Photos(ingest, roots, below) if kind == "image" else Texts(ingest, roots, kind, below))
    completion = Completion(ingest)
    if ingest.counts_ahead:
        ingest.total = sum(stage.count() for stage in stages) + len(completion.lacking())
    for stage in stages:
        stage.run()
    if below is None:
        completion.run()
