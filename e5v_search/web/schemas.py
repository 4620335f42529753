"""The shapes of what is sent, as the OpenAPI document tells them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Kind = Literal["image", "text", "rendered"]


class Error(BaseModel):
    error: str = Field(description="One line: what happened, and what to do.")
    kind: str = Field(description="The name of the error, as QueryError.")


class Took(BaseModel):
    load: float
    embed: float
    search: float
    total: float


class Thing(BaseModel):
    """An item as lists of items have it."""

    id: int
    kind: Kind
    path: str | None
    text: str | None
    width: int | None
    height: int | None
    taken_at: str | None
    part: str | None


class Hit(Thing):
    rank: int
    score: float = Field(description="The cosine of query and item, or the weighted sum of cosines.")
    words: list[str] | None = Field(None, description="What query and item share, if asked for.")


class Found(BaseModel):
    """The answer to a search; the same as `e5v-search search --json` prints."""

    query: dict[str, Any]
    fingerprint: str
    took_ms: Took
    hits: list[Hit]


class Page(BaseModel):
    """A part of the collection, newest first."""

    total: int
    start: int
    items: list[Thing]


class Details(Thing):
    lat: float | None
    lon: float | None
    camera: str | None
    format: str | None
    facts: dict[str, Any]
    bytes: int | None = Field(description="Size of the file.")
    content_hash: str
    available: bool = Field(description="Whether the file is there.")


class Word(BaseModel):
    text: str
    score: float


class Words(BaseModel):
    words: list[Word]


class CopyOf(Thing):
    score: float
    exact: bool


class Copies(BaseModel):
    items: list[CopyOf]


class Facet(BaseModel):
    value: str
    count: int
    where: str = Field(description="The filter that passes exactly these.")


class Year(Facet):
    months: list[Facet]


class Place(BaseModel):
    lat: float
    lon: float
    count: int
    where: str


class Facets(BaseModel):
    """How many items have which value, of those that pass the filters."""

    total: int
    kind: list[Facet]
    taken: list[Year]
    folder: list[Facet]
    camera: list[Facet]
    format: list[Facet]
    place: list[Place]


class Status(BaseModel):
    """As `e5v-search status --json` prints it."""

    collection: str
    fingerprint: str | None
    items: dict[str, int]
    failed: int
    index: dict[str, Any]
    bytes: int


class Failed(BaseModel):
    path: str
    reason: str


class Failures(BaseModel):
    failed: list[Failed]


class Run(BaseModel):
    """The index run of this service: the one under way, or the last one."""

    allowed: bool
    running: bool
    done: int
    total: int
    added: int
    updated: int
    removed: int
    failed: int
    error: str | None = None


class Points(BaseModel):
    """The map of the collection."""

    ids: str = Field(description="Base64 of n little-endian 64-bit integers.")
    xy: str = Field(description="Base64 of n pairs of little-endian 32-bit floats.")
    kinds: str = Field(description="Base64 of n bytes: 0 image, 1 text, 2 rendered.")
    explained: list[float] = Field(description="Share of the variance along each axis.")
    of: int = Field(description="Items in the collection.")


class Health(BaseModel):
    status: Literal["ok"]


Id = Annotated[int, Field(ge=0, lt=2**63)]
