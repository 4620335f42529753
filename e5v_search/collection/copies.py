"""The photos that show the same as one photo does."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from e5v_search import media
from e5v_search.catalog import Catalog, Item
from e5v_search.collection.core import Collection
from e5v_search.collection.duplicates import THRESHOLD
from e5v_search.errors import MediaError
from e5v_search.media.look import alike, look

MOST = 24


@dataclass(frozen=True)
class Copy:
    """A photo like another. `exact`: the same bytes; else the same picture saved again, `score` the cosine of the two."""

    item: Item
    score: float
    exact: bool


def neighbours(source: Collection, item_id: int, threshold: float = THRESHOLD) -> list[tuple[int, float]]:
    """Ids and cosines, best first, of the MOST items nearest to an item that have a cosine of `threshold` or more with it.

    Raises QueryError for an id that is none.
    """
    source.space.item(item_id)
    hits = source.search(image=item_id, k=MOST + 1, threshold=threshold, where=["kind=image"])
    return [(hit.id, hit.score) for hit in hits if hit.id is not None and hit.id != item_id]


def copies(catalog: Catalog, item_id: int, near: Sequence[tuple[int, float]]) -> list[Copy]:
    """Of the photos that `neighbours` found those that show the same. One that cannot be looked at counts if its bytes do."""
    items = catalog.items([item_id, *(i for i, _ in near)])
    mine = items.get(item_id)
    if mine is None:
        return []
    found = []
    for i, score in near:
        if (other := items.get(i)) is None:
            continue
        exact = other.content_hash == mine.content_hash
        if exact or _same(catalog, mine, other):
            found.append(Copy(other, score, exact))
    return found


def _same(catalog: Catalog, a: Item, b: Item) -> bool:
    with suppress(MediaError):
        looks = [look(media.small(item.path or "", item.content_hash, catalog.path.parent / "thumbnails")) for item in (a, b)]
        return bool(alike(*(np.stack([each]) for each in looks))[0, 0])
    return False
