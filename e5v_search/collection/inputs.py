"""What the model is to see, and what comes of it: plain values, so that any process can do the work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from e5v_search import media
from e5v_search.collection import views
from e5v_search.embedder import Embedder, embed_each
from e5v_search.errors import E5VError, MediaError
from e5v_search.render import render

_NOT_FINITE = "the model gives no finite vector for it; try --dtype float32"


@dataclass(frozen=True, slots=True)
class Input:
    """A photo's file, or a text, as it is or drawn. With `unchanged`, a file of another content is as good as none."""

    kind: str  # one of KINDS
    content_hash: str
    path: str | None = None  # of a photo
    text: str | None = None
    unchanged: bool = False


@dataclass(slots=True)
class Prepared:
    """An input, ready for the model, or the problem with it; neither for a file that is not there or not what it was."""

    value: Any = None
    facts: dict[str, Any] = field(default_factory=dict)  # of a photo
    problem: str | None = None


@dataclass(slots=True)
class Outcome:
    """An input's vectors, by view, or the problem with it; neither for a file that is not there or not what it was."""

    vectors: views.Vectors | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def prepare(embedder: Embedder, given: Input) -> Prepared:
    """Read, decode and cut: all that needs no device. For threads."""
    try:
        if given.path is not None:
            return _photo(embedder, given.path, given.content_hash if given.unchanged else None)
        assert given.text is not None
        return Prepared(given.text if given.kind == "text" else embedder.prepare(render(given.text)))
    except MediaError as error:
        return Prepared(problem=str(error))


def _photo(embedder: Embedder, path: str, content_hash: str | None) -> Prepared:
    if content_hash is None:
        image, facts = media.decode(path, enough=embedder.enough)
    elif not os.path.lexists(path):
        return Prepared()
    else:
        photo = media.read_photo(path, enough=embedder.enough)
        if photo.content_hash != content_hash:
            return Prepared()
        image, facts = photo.image, photo.facts
    return Prepared(embedder.prepare(image, facts.size), facts.to_dict())


def embed(embedder: Embedder, kind: str, prepared: Sequence[Prepared], of: Sequence[str]) -> list[Outcome]:
    """Prepared inputs of one kind through the model, for the views `of`."""
    usable = [one.value for one in prepared if one.value is not None]
    found = iter(embed_each(usable, lambda some: views.embed(embedder, kind, some, of)))
    return [_outcome(one, next(found)) if one.value is not None else Outcome(problem=one.problem) for one in prepared]


def _outcome(one: Prepared, found: views.Vectors | E5VError) -> Outcome:
    if isinstance(found, E5VError):
        return Outcome(problem=str(found))
    if not all(np.isfinite(x).all() for x in found.values()):
        return Outcome(problem=_NOT_FINITE)
    return Outcome(found, one.facts)
