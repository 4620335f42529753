"""What a search gives back, with the field names that programs rely on. Loads nothing heavy: a process that only asks a
running service imports no more than this."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self, TypedDict

if TYPE_CHECKING:
    from e5v_search.catalog import Item


class Wanted(TypedDict):
    """What is wanted of an answer, as `Collection.answer` takes it."""

    k: int
    threshold: float | None
    keep_reference: bool
    explain: bool


@dataclass(frozen=True, slots=True)
class Hit:
    """One result. `score` is the cosine of query and item, or the weighted sum of cosines.

    `id` is None for a picture that is in no collection; `words` are those that it shares with the query, if asked for.
    """

    rank: int
    id: int | None
    score: float
    kind: str
    path: str | None = None
    text: str | None = None
    width: int | None = None
    height: int | None = None
    taken_at: str | None = None
    part: str | None = None  # which text of the file at `path`; None for photos
    words: list[str] | None = None

    @classmethod
    def of(cls, item: "Item", rank: int, score: float, words: list[str] | None = None) -> Self:
        facts = (item.kind, item.path, item.text, item.width, item.height, item.taken_at, item.part)
        return cls(rank, item.id, score, *facts, words)

    def to_json(self) -> dict[str, Any]:
        shown = asdict(self)
        if self.words is None:
            del shown["words"]
        return shown


class Hits(list[Hit]):
    """The hits of one search, best first, and how it went."""

    def __init__(self, hits: list[Hit], query: dict[str, Any], fingerprint: str, took_ms: dict[str, float]) -> None:
        super().__init__(hits)
        self.query = query
        self.fingerprint = fingerprint
        self.took_ms = took_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "fingerprint": self.fingerprint,
            "took_ms": {name: round(ms, 3) for name, ms in self.took_ms.items()},
            "hits": [hit.to_json() for hit in self],
        }
