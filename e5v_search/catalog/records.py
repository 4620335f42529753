"""Rows of the catalog as values."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("image", "text", "rendered")
VIEW = "retrieval"  # the view in which every item has a vector


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file as it was when its item was written: enough to tell cheaply whether it has changed since."""

    path: str
    item_id: int
    size: int  # bytes
    mtime_ns: int
    on_mount: bool  # lay on a mounted file system, so that its absence may mean an unmounted disk
    content_hash: str


@dataclass(frozen=True, slots=True)
class Item:
    id: int
    kind: str  # one of KINDS
    path: str | None
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
    """One item to write together with its vector.

    `item_id` None makes a new item; else the same item gets this content. The vector comes from `vector`, (dim,) of any
    float type, or from the item `copy_from`, whose content has the same hash; then text, pixels, EXIF facts and `facts`
    come from there too and the fields of this record that hold them are not looked at.
    """

    kind: str
    content_hash: str
    path: str | None = None
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
    vector: np.ndarray | None = None
    copy_from: int | None = None
