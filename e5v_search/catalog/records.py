"""Rows of the catalog as values."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("image", "text", "rendered")
VIEW = "retrieval"  # the view in which every item has a vector


@dataclass(frozen=True, slots=True)
class FileRow:
    """Where an item comes from, as it was when the item was written: enough to tell cheaply whether it has changed since.

    A file may hold many items of the same kind, each its `part`; of photos the part is empty.
    """

    path: str
    item_id: int
    size: int  # bytes
    mtime_ns: int
    on_mount: bool  # lay on a mounted file system, so that its absence may mean an unmounted disk
    content_hash: str
    kind: str = "image"
    part: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A file of texts that was read to its end without a problem; of another size or time, it has to be read again."""

    path: str
    kind: str
    size: int
    mtime_ns: int
    on_mount: bool
    texts: int


@dataclass(frozen=True, slots=True)
class Failed:
    """What could not be used: a file, or the place (a line, say) in a file of texts."""

    path: str
    kind: str
    reason: str
    place: str = ""

    @property
    def where(self) -> str:
        return f"{self.path}:{self.place}" if self.place else self.path


@dataclass(frozen=True, slots=True)
class Item:
    id: int
    kind: str  # one of KINDS
    path: str | None
    part: str | None  # which text of the file: its id, or the number of its line or paragraph; None for photos
    text: str | None
    content_hash: str
    width: int | None  # pixels, as seen upright
    height: int | None
    taken_at: str | None  # ISO 8601
    lat: float | None  # degrees
    lon: float | None
    camera: str | None
    format: str | None
    facts: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Put:
    """One item to write together with its vectors.

    `item_id` None makes a new item; else the same item gets this content. `vectors` maps views to (dim,) of any float type,
    and VIEW is among them; or else the vectors are those of the item `copy_from`, whose content has the same hash. A photo's
    copy takes pixels, EXIF facts and `facts` from there too, as they come from the content, and the fields of this record
    that hold them are not looked at; a text brings its own.
    """

    kind: str
    content_hash: str
    path: str | None = None
    part: str = ""
    size: int = 0
    mtime_ns: int = 0
    on_mount: bool = False
    text: str | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    lat: float | None = None
    lon: float | None = None
    camera: str | None = None
    format: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    item_id: int | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    copy_from: int | None = None
