"""What an evaluation is made of, wherever it was read: pictures by name, captions, composed queries, rated pairs."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

from PIL import Image

from e5v_search import media
from e5v_search.embedder import Picture
from e5v_search.errors import DataError


class Source(Protocol):
    """A picture that is opened when it is needed. `missing` is the reason why it cannot be, known without opening it."""

    name: str
    missing: str | None

    @abstractmethod
    def content(self) -> str:
        """What its pixels are known by, as a hash."""

    @abstractmethod
    def picture(self) -> Picture: ...


@dataclass(frozen=True)
class PhotoFile(Source):
    name: str
    path: Path | None
    missing: str | None = None

    def content(self) -> str:
        return media.content_hash(self._there)

    def picture(self) -> Picture:
        return self._there

    @property
    def _there(self) -> Path:
        if self.path is None:
            raise ValueError(f"{self.name} has no file: {self.missing}")
        return self.path


@dataclass(frozen=True)
class Encoded(Source):
    """A picture inside a data set's own files, in the bytes of a JPEG or PNG."""

    name: str
    read: Callable[[], bytes]
    missing: str | None = None

    def content(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()

    def picture(self) -> Picture:
        return self.read()


@dataclass(frozen=True)
class Drawn(Source):
    """A picture that a program draws: a rendered text, a scene."""

    name: str
    draw: Callable[[], Image.Image]
    missing: str | None = None

    def content(self) -> str:
        image = self.picture()
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()

    def picture(self) -> Image.Image:
        return self.draw()


@dataclass(frozen=True)
class Caption:
    """A text and the pictures, as rows of the gallery, that it is right for."""

    text: str
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Captioned:
    """Pictures with captions, searched both ways."""

    gallery: tuple[Source, ...]
    captions: tuple[Caption, ...]

    def without(self, bad: Collection[int]) -> Self:
        """The same without some pictures, and without captions that are then right for none."""
        at = _new_places(len(self.gallery), bad)
        captions = [replace(c, owners=tuple(at[i] for i in c.owners if i in at)) for c in self.captions]
        return type(self)(tuple(self.gallery[i] for i in at), tuple(c for c in captions if c.owners))

    def first(self, n: int) -> Self:
        return self.without(range(n, len(self.gallery)))

    @property
    def questions(self) -> str:
        return _digest(*(s.name for s in self.gallery), *(f"{c.text} {c.owners}" for c in self.captions))


@dataclass(frozen=True)
class Change:
    """A composed query: a reference picture, as a row of the gallery, and what is to change, in one text or more.

    `target` is None where it is secret (CIRR's test split); `members` are the rows of CIRR's subset, the reference left out.
    """

    key: str
    reference: int
    texts: tuple[str, ...]
    target: int | None
    members: tuple[int, ...] = ()


@dataclass(frozen=True)
class Composed:
    """Pictures, and queries that are a picture and a change to it."""

    gallery: tuple[Source, ...]
    queries: tuple[Change, ...]

    def without(self, bad: Collection[int]) -> Self:
        """The same without some pictures, and without queries that need one of these as reference or target."""
        at = _new_places(len(self.gallery), bad)
        queries = (
            replace(
                q,
                reference=at[q.reference],
                target=None if q.target is None else at[q.target],
                members=tuple(at[i] for i in q.members if i in at),
            )
            for q in self.queries
            if q.reference in at and (q.target is None or q.target in at)
        )
        return type(self)(tuple(self.gallery[i] for i in at), tuple(queries))

    def first(self, n: int) -> Self:
        """The first n queries, and of the gallery the pictures that they speak of."""
        queries = self.queries[:n]
        needed = {i for q in queries for i in (q.reference, q.target, *q.members)}
        return type(self)(self.gallery, queries).without([i for i in range(len(self.gallery)) if i not in needed])

    @property
    def questions(self) -> str:
        return _digest(*(s.name for s in self.gallery), *(f"{q.key} {q.reference} {q.texts} {q.target}" for q in self.queries))


@dataclass(frozen=True)
class Pair:
    a: str
    b: str
    gold: float


@dataclass(frozen=True)
class Rating:
    """Rated pairs of sentences by task, each task's subsets one after the other."""

    tasks: Mapping[str, tuple[Pair, ...]]

    def first(self, n: int) -> Self:
        return type(self)({name: pairs[:n] for name, pairs in self.tasks.items()})

    @property
    def questions(self) -> str:
        return _digest(*(f"{name} {p.a} {p.b} {p.gold}" for name, pairs in self.tasks.items() for p in pairs))


@dataclass(frozen=True)
class Scenes:
    """All four types of task over one set of drawn pictures."""

    captioned: Captioned
    composed: Composed
    rating: Rating

    def first(self, n: int) -> Self:
        return type(self)(self.captioned.first(n), self.composed.first(n), self.rating.first(n))

    @property
    def questions(self) -> str:
        return _digest(self.captioned.questions, self.composed.questions, self.rating.questions)


Data = Captioned | Composed | Mapping[str, Composed] | Rating | Scenes


@dataclass
class Missing:
    """Pictures that cannot be used: refused, unless `allowed`; then listed, and the evaluation goes on without them."""

    allowed: bool
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, of: Sequence[Source], reasons: Mapping[int, str]) -> None:
        """Raises DataError, naming the first of them, when pictures may not be missing, or none would be left."""
        self.reasons |= {of[i].name: reason for i, reason in reasons.items()}
        if not reasons:
            return
        shown = "; ".join(f"{of[i].name}: {reason}" for i, reason in list(reasons.items())[:3])
        told = f"{len(reasons):,} of {len(of):,} pictures cannot be used ({shown}{'; …' if len(reasons) > 3 else ''})"
        if len(reasons) == len(of):
            raise DataError(f"{told}: nothing is left to evaluate; look at --data")
        if not self.allowed:
            raise DataError(f"{told}; complete them, or leave them out with --allow-missing, and the report will say so")


def absent(gallery: Sequence[Source]) -> dict[int, str]:
    """The pictures of which it is known without opening them that they cannot be had, with the reasons."""
    return {i: source.missing for i, source in enumerate(gallery) if source.missing is not None}


@dataclass(frozen=True)
class Loaded:
    """A data set as it was read. `revision` names its content: a commit of the hub, or a digest of the annotation files."""

    data: Data
    source: str
    revision: str
    notes: tuple[str, ...] = ()

    @cached_property
    def questions(self) -> str:
        """What was asked of what, as a hash: runs with the same can be compared query by query."""
        if isinstance(self.data, Mapping):
            return _digest(*(f"{name} {part.questions}" for name, part in self.data.items()))
        return self.data.questions


def _new_places(n: int, bad: Collection[int]) -> dict[int, int]:
    bad = set(bad)
    return {old: new for new, old in enumerate(i for i in range(n) if i not in bad)}


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
