"""Photos that a collection holds more than once: the same bytes, or the same picture saved again.

Vectors say which photos show nearly the same; of those, a tiny version of the pixels says which are the same picture.
Photos are taken in the order in which one would keep them. Each joins the group of the most similar photo that is kept
before it; one that finds none is kept itself. So every photo that could go has its like among the kept ones, no two kept
ones are alike, and a chain of ever so slightly different photos does not become one group. No file is changed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search import media
from e5v_search.catalog import Catalog
from e5v_search.collection.chosen import chosen, stored
from e5v_search.collection.report import Failure
from e5v_search.errors import MediaError, UsageError
from e5v_search.media.look import alike, look
from e5v_search.parallel import ahead, windows

THRESHOLD = 0.9
KEEP = ("largest", "oldest")
_LOOKUP = 4096
_ROWS, _COLUMNS = 1024, 4096  # of the tiles in which photos are compared
_ROUNDING = 1e-6  # of a cosine computed in single precision

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Photo:
    """A member of a group. `score` is its cosine with the photo to keep."""

    id: int
    path: str
    score: float
    width: int
    height: int
    bytes: int
    taken_at: str | None
    keep: bool
    mtime_ns: int
    content_hash: str

    def to_json(self) -> dict[str, Any]:
        names = ("id", "path", "score", "width", "height", "bytes", "taken_at", "keep")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Group:
    """Photos of which one is enough: first the one to keep, then the others, most similar first."""

    kind: str  # "exact": all are the same bytes; else "near"
    items: list[Photo]

    @property
    def keep(self) -> Photo:
        return self.items[0]

    @property
    def redundant(self) -> list[Photo]:
        return self.items[1:]

    @property
    def bytes(self) -> int:
        """What the photos that could go take on the disk."""
        return sum(photo.bytes for photo in self.redundant)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "keep": self.keep.id, "items": [photo.to_json() for photo in self.items]}


@dataclass(frozen=True)
class Duplicates:
    """The groups, exact ones first, then by the bytes that could go."""

    collection: str
    threshold: float | None  # None: only the same bytes were looked for
    photos: int  # that were compared
    groups: list[Group]
    failed: list[Failure]  # photos that may be near another but could not be looked at

    @property
    def redundant(self) -> int:
        return sum(len(group.redundant) for group in self.groups)

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        return {
            "collection": self.collection,
            "threshold": self.threshold,
            "groups": [group.to_json() for group in self.groups],
            "photos": self.photos,
            "redundant": self.redundant,
            "bytes": self.bytes,
            "failed": [asdict(failure) for failure in self.failed],
        }

    def removable(self) -> tuple[list[Photo], list[Photo]]:
        """The photos that could go: those that can be removed without loss as the files are now, and the others.

        A photo is among the others if it, or the one to keep in its place, is no longer the file that was compared, or if
        the one to keep is a link to it.
        """
        safe: list[Photo] = []
        other: list[Photo] = []
        for group in self.groups:
            kept = os.path.realpath(group.keep.path) if _as_recorded(group.keep) else None
            for photo in group.redundant:
                sound = kept is not None and kept != _entry(photo.path) and _as_recorded(photo)
                (safe if sound else other).append(photo)
        return safe, other


def find_duplicates(
    catalog: Catalog,
    threshold: float | None = THRESHOLD,
    keep: str = "largest",
    by_vectors: bool = False,
    on_progress: Progress | None = None,
    where: Sequence[str] = (),
) -> Duplicates:
    """The groups of photos of which one is enough.

    `threshold` is the cosine, above 0, that a photo needs with the one to keep; None looks for equal bytes alone. The two
    must also look the same, unless `by_vectors`. `keep` is "largest" (most pixels, then most bytes, then oldest) or
    "oldest" (by the camera's clock, photos without a date last, then by the file's time); what is equal in all that is
    kept by path. Only photos that pass the filters `where` count. `on_progress(steps done, steps in all)` is called as it
    goes. Raises UsageError.
    """
    if keep not in KEEP:
        raise UsageError(f"{keep!r} is no way to choose which photo to keep: take {' or '.join(KEEP)}")
    if threshold is not None and not 0 < threshold <= 1:
        raise UsageError(f"the threshold must be above 0 and at most 1, not {threshold}")
    with catalog.snapshot():
        photos = sorted(_photos(catalog, where), key=_largest_first if keep == "largest" else _oldest_first)
        copies: dict[str, list[Photo]] = {}
        for photo in photos:
            copies.setdefault(photo.content_hash, []).append(photo)
        groups = {same[0].id: same for same in copies.values()}  # by the photo to keep
        ids, x = stored(catalog, np.array(list(groups) if threshold is not None else [], np.int64))
    failed: list[Failure] = []
    if threshold is not None:
        near = np.flatnonzero(neighboured(x, threshold, on_progress))
        looks = None
        if not by_vectors:
            looked = list(_looks([groups[item][0] for item in ids[near].tolist()], catalog.path.parent, len(ids), on_progress))
            failed = [seen for seen in looked if isinstance(seen, Failure)]
            near = near[[not isinstance(seen, Failure) for seen in looked]]
            looks = np.array([seen for seen in looked if not isinstance(seen, Failure)])
        owners, scores = leaders(x[near], threshold, looks)
        for n in np.flatnonzero(owners != np.arange(len(near))).tolist():
            joining = groups.pop(int(ids[near[n]]))
            for photo in joining:
                photo.score = min(float(scores[n]), 1.0)
            groups[int(ids[near[owners[n]]])] += joining
    found = [_group(members) for members in groups.values() if len(members) > 1]
    found.sort(key=lambda group: (group.kind, -group.bytes, group.keep.path))
    return Duplicates(str(catalog.path.parent), threshold, len(photos), found, failed)


def neighboured(x: np.ndarray, threshold: float, on_progress: Progress | None = None) -> np.ndarray:
    """-> (n,) bool: which rows of x (n, d) have a cosine of `threshold` or more with another. Memory: a tile of cosines."""
    n = len(x)
    found = np.zeros(n, bool)
    for start in range(0, n, _ROWS):
        rows = _unit(x[start : start + _ROWS])
        for first in range(start, n, _COLUMNS):
            near = rows @ _unit(x[first : first + _COLUMNS]).T >= threshold - _ROUNDING
            np.fill_diagonal(near[first - start :], False)  # each row with itself
            found[start : start + len(rows)] |= near.any(axis=1)
            found[first : first + near.shape[1]] |= near.any(axis=0)
        if on_progress is not None:
            on_progress(start + len(rows), n)
    return found


def leaders(x: np.ndarray, threshold: float, looks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """-> (owner (n,) int64, score (n,) float32): which row each row of x (n, d) belongs to, and its cosine with that.

    Rows come in order of preference. Two are alike if their cosine is `threshold` or more and, where `looks` (n, cuts, l)
    are given, they look alike. A row leads (`owner[i] == i`) if it is alike to no leader before it; any other belongs to
    the most similar of those. Memory is that of some tiles of cosines.
    """
    n = len(x)
    owner = np.arange(n)
    score = np.full(n, -np.inf, np.float32)

    def cosines(led: np.ndarray, rows: np.ndarray, others: slice) -> np.ndarray:
        """Of `rows`, the vectors of `led` (m,), with the `others`; -inf where they are not alike."""
        D: np.ndarray = rows @ _unit(x[others]).T
        near = threshold - _ROUNDING <= D
        if looks is not None and near.any():
            near &= alike(looks[led], looks[others])
        D[~near] = -np.inf
        return D

    def offer(led: np.ndarray, D: np.ndarray, first: int) -> None:
        """To the rows from `first` on: the leaders `led` (m,), with the cosines D (m, rows) between them."""
        best = D.argmax(axis=0)
        top = D[best, np.arange(D.shape[1])]
        better = np.flatnonzero(top > score[first : first + len(top)])
        owner[first + better], score[first + better] = led[best[better]], top[better]

    for start in range(0, n, _ROWS):
        block = np.arange(start, min(start + _ROWS, n))
        rows = _unit(x[block])
        among = cosines(block, rows, slice(start, start + len(block)))
        for i in np.flatnonzero(np.isfinite(np.triu(among, 1)).any(axis=1)).tolist():
            if owner[start + i] == start + i:
                offer(block[i : i + 1], among[i : i + 1, i + 1 :], start + i + 1)
        leading = owner[block] == block
        for first in range(start + len(block), n if leading.any() else start, _COLUMNS):
            offer(block[leading], cosines(block[leading], rows[leading], slice(first, first + _COLUMNS)), first)
    return owner, score


def _looks(photos: Sequence[Photo], folder: Path, before: int, on_progress: Progress | None) -> Iterator[np.ndarray | Failure]:
    """The look of each photo, read in threads, or why there is none."""

    def seen(photo: Photo) -> np.ndarray | Failure:
        try:
            return look(media.small(photo.path, photo.content_hash, folder / "thumbnails"))
        except MediaError as error:
            return Failure(photo.path, str(error))

    for n, each in enumerate(ahead(seen, photos), start=1):
        yield each
        if on_progress is not None:
            on_progress(before + n, before + len(photos))


def _unit(x: np.ndarray) -> np.ndarray:
    rows = x.astype(np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _photos(catalog: Catalog, where: Sequence[str]) -> Iterator[Photo]:
    [ids] = chosen(catalog, ["image"], where).values()
    for block in windows(ids.tolist(), _LOOKUP):
        items = [item for item in catalog.items(block).values() if item.path is not None]
        files = catalog.known([str(item.path) for item in items])
        for item in items:
            file = files[str(item.path)]
            size = (item.width or 0, item.height or 0)
            yield Photo(item.id, file.path, 1.0, *size, file.size, item.taken_at, False, file.mtime_ns, item.content_hash)


def _oldest_first(photo: Photo) -> tuple[Any, ...]:
    # what follows the seconds, an offset from UTC, only some cameras write: the clock's own time is what all have
    return photo.taken_at is None, (photo.taken_at or "")[:19], photo.mtime_ns, photo.path


def _largest_first(photo: Photo) -> tuple[Any, ...]:
    return -photo.width * photo.height, -photo.bytes, *_oldest_first(photo)


def _group(photos: list[Photo]) -> Group:
    kept, *others = photos
    kept.keep = True
    kind = "exact" if all(photo.content_hash == kept.content_hash for photo in others) else "near"
    return Group(kind, [kept, *sorted(others, key=lambda photo: (-photo.score, photo.path))])


def _as_recorded(photo: Photo) -> bool:
    """Whether the file is still the one that was indexed."""
    try:
        status = os.stat(photo.path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (photo.bytes, photo.mtime_ns)


def _entry(path: str) -> str:
    """What removing `path` would remove: the name itself, be it a link, in a folder known by its real name."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)
