"""From a collection to its map."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from e5v_search import media
from e5v_search.catalog import KINDS, VIEW
from e5v_search.collection import Collection, Failure
from e5v_search.errors import CollectionNotFound, QueryError, UsageError
from e5v_search.evaluation import Gap, modality_gap
from e5v_search.map.page import NOUNS, THUMBNAILS, page, thumbnails
from e5v_search.map.points import Points, gather
from e5v_search.map.project import METHODS, project

Progress = Callable[[str, int, int], None]

_METHODS = {"pca": "PCA", "umap": "UMAP"}


@dataclass
class Map:
    """A page, and what is on it."""

    collection: str
    fingerprint: str
    method: str
    prompts: str
    items: dict[str, int]  # of each kind on the map
    of: dict[str, int]  # and in the collection
    explained: list[float]  # share of the variance along each axis; empty for UMAP
    thumbnails: int
    gaps: list[tuple[str, str, Gap]]  # of each two kinds on the map
    failed: list[Failure]
    page: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the page."""
        names = ("collection", "fingerprint", "method", "prompts", "items", "of", "explained", "thumbnails")
        return {
            **{name: getattr(self, name) for name in names},
            "gaps": [{"a": a, "b": b, **asdict(gap)} for a, b, gap in self.gaps],
            "failed": [asdict(failure) for failure in self.failed],
        }


def draw_map(
    source: Collection,
    *,
    method: str = "pca",
    prompts: str | None = None,
    limit: int | None = None,
    most_thumbnails: int = THUMBNAILS,
    on_progress: Progress | None = None,
    where: Sequence[str] = (),
) -> Map:
    """The map of a collection: its items placed by "pca" or "umap" of their vectors.

    `prompts` names another prompt set: what the collection does not hold under it is embedded for the map alone. `limit` is
    how many items are on the map at most (100,000, or 1,000 where they have to be embedded), of each kind an even share;
    `where` are filters. `on_progress(what, done, in all)` is called as it goes. The same collection gives the same map.
    Raises UsageError, CollectionNotFound for an empty collection, MissingPackage for "umap" without its package, and what
    loading a model raises.
    """
    if method not in METHODS:
        raise UsageError(f"{method!r} is no way to draw a map: take {' or '.join(METHODS)}")

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: None if on_progress is None else on_progress(what, done, total)

    points = gather(source, prompts, limit, on_progress=progress("Embedding"), where=where)
    if not points.items and where:
        raise QueryError(f"nothing in {source.path} is left to draw where {' and '.join(where)}")
    if not points.items:
        raise CollectionNotFound(f"collection {source.path} is empty; fill it with: e5v-search index FOLDER -c {source.path}")
    xy, explained = project(points.x, method)
    cache = source.path / "thumbnails"
    pictures = thumbnails(points.items, cache, most_thumbnails, on_progress=progress("Thumbnails"))
    drawn = Map(
        collection=str(source.path),
        fingerprint=source.fingerprint or "",
        method=method,
        prompts=prompts or VIEW,
        items={kind: sum(item.kind == kind for item in points.items) for kind in KINDS},
        of=points.of,
        explained=explained,
        thumbnails=sum(map(bool, pictures)),
        gaps=_gaps(points),
        failed=points.failed,
    )
    drawn.page = page(points.items, xy, pictures, _said(drawn))
    return drawn


def _gaps(points: Points) -> list[tuple[str, str, Gap]]:
    x_of = {kind: points.of_kind(kind) for kind in KINDS}
    present = [kind for kind, x in x_of.items() if len(x) > 1]
    return [(a, b, modality_gap(x_of[a], x_of[b])) for a, b in combinations(present, 2)]


def _said(drawn: Map) -> dict[str, Any]:
    """What the page says of the map as a whole."""
    n, of = sum(drawn.items.values()), sum(drawn.of.values())
    axes = " and ".join(f"{share:.0%}" for share in drawn.explained)
    photos = drawn.items["image"]
    sentences = [
        f"Model {drawn.fingerprint}.",
        f"Prompt set {media.shown(drawn.prompts)}.",
        f"Pictures of {drawn.thumbnails:,} of {photos:,} photos are in this page." if drawn.thumbnails < photos else "",
        f"{len(drawn.failed):,} items could not be read and are left out." if drawn.failed else "",
    ]
    return {
        "title": media.shown(Path(drawn.collection).name),
        "about": f"{n:,} items{f', drawn from {of:,}' if n < of else ''}. {_METHODS[drawn.method]} of their vectors"
        + (f": the axes hold {axes} of the variance." if axes else "."),
        "facts": " ".join(filter(None, sentences)),
        "gaps": [
            {"a": NOUNS[a][1], "b": NOUNS[b][1], "distance": gap.distance, "spread": gap.spread, "accuracy": gap.accuracy}
            for a, b, gap in drawn.gaps
        ],
    }
