"""Which items are on a map, and the vectors by which they are placed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from e5v_search import media
from e5v_search.catalog import KINDS, VIEW, Item
from e5v_search.collection import Collection, Failure
from e5v_search.collection.chosen import chosen, stored
from e5v_search.errors import MediaError
from e5v_search.parallel import ahead, windows
from e5v_search.prompts import load_prompts
from e5v_search.render import render

LIMIT = 100_000  # items on a map
LIMIT_EMBEDDED = 1_000  # when all of them have to be embedded for it
_PICTURES, _TEXTS = 16, 128  # given to the model at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Points:
    """Items and their vectors x (n, d), of any float type, in the same order: kind by kind, by id."""

    items: list[Item]
    x: np.ndarray
    of: dict[str, int]  # items of each kind that the collection holds, of those that pass
    failed: list[Failure]  # could not be embedded again, and are left out

    def of_kind(self, kind: str) -> np.ndarray:
        return self.x[[item.kind == kind for item in self.items]]


def gather(
    source: Collection,
    prompts: str | None,
    limit: int | None,
    seed: int = 0,
    on_progress: Progress | None = None,
    where: Sequence[str] = (),
) -> Points:
    """At most `limit` items of a collection, of those that pass the filters `where`, with their stored vectors, or with
    vectors under the prompt set `prompts`.

    Of more items some are drawn by `seed`: of each kind the same number, as far as there are so many. What the collection
    holds under `prompts` is not embedded again. Raises UsageError for a prompt set that lacks a prompt for one of the kinds.
    """
    catalog, view = source.catalog, prompts or VIEW
    with catalog.snapshot():
        ids_of = chosen(catalog, KINDS, where)
        if limit is None:
            limit = LIMIT if view in catalog.views else LIMIT_EMBEDDED
        rng = np.random.default_rng(seed)
        shares = _shares({kind: len(ids) for kind, ids in ids_of.items()}, limit)
        ids = np.concatenate([np.sort(rng.choice(ids_of[kind], share, replace=False)) for kind, share in shares.items()])
        found = catalog.items(ids.tolist())
        have, x = stored(catalog, ids, view)
    items = [found[i] for i in ids.tolist()]
    of = {kind: len(ids) for kind, ids in ids_of.items()}
    if len(have) == len(ids):
        return Points(items, x, of, [])
    vectors, failed = _embedded(source, items, view, on_progress)
    return Points([item for item in items if item.id in vectors], np.array(list(vectors.values())), of, failed)


def _shares(counts: dict[str, int], limit: int) -> dict[str, int]:
    """How many of each kind, `limit` in all at most: the fewer there are of a kind, the more is left for the others."""
    shares: dict[str, int] = {}
    for kind in sorted(counts, key=lambda kind: counts[kind]):
        even = -(-(limit - sum(shares.values())) // (len(counts) - len(shares)))
        shares[kind] = min(counts[kind], even)
    return {kind: shares[kind] for kind in counts}


def _embedded(
    source: Collection, items: Sequence[Item], prompts: str, on_progress: Progress | None
) -> tuple[dict[int, np.ndarray], list[Failure]]:
    """Vectors by id, in the order of `items`, under a prompt set; what cannot be read any more is listed."""
    prompt_set = load_prompts(prompts)
    for kind in {item.kind for item in items}:
        prompt_set.get("text" if kind == "text" else "image")  # a mistake there need not wait for the model
    embedder = source.embedder()
    vectors: dict[int, np.ndarray] = {}
    failed: list[Failure] = []

    def take(block: Sequence[Item], x: np.ndarray) -> None:
        vectors.update(zip((item.id for item in block), x, strict=True))
        if on_progress is not None:
            on_progress(len(vectors) + len(failed), len(items))

    def prepared(item: Item) -> tuple[Item, Any]:
        try:
            if item.kind == "rendered":
                return item, embedder.prepare(render(item.text or ""))
            image, facts = media.decode(item.path or "", enough=embedder.enough)
            return item, embedder.prepare(image, facts.size)
        except MediaError as error:
            return item, Failure(":".join(filter(None, (item.path, item.part))), str(error))

    for ready in windows(ahead(prepared, [item for item in items if item.kind != "text"], depth=_PICTURES), _PICTURES):
        failed += [value for _, value in ready if isinstance(value, Failure)]
        good = [(item, value) for item, value in ready if not isinstance(value, Failure)]
        if good:
            take([item for item, _ in good], embedder.embed_prepared([value for _, value in good], prompts))
    for texts in windows([item for item in items if item.kind == "text"], _TEXTS):
        take(texts, embedder.embed_texts([item.text or "" for item in texts], prompts))
    return {item.id: vectors[item.id] for item in items if item.id in vectors}, failed
