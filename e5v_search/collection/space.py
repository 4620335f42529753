"""The one space of a model: every input becomes a vector of it, by the model, or from a collection that holds it already."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from e5v_search import media
from e5v_search.catalog import Catalog, Item
from e5v_search.collection.report import Failure, Stopwatch
from e5v_search.embedder import Embedder, Picture
from e5v_search.errors import MediaError, QueryError
from e5v_search.hits import Hit, Hits
from e5v_search.prompts import PROMPT_SETS
from e5v_search.query import Input
from e5v_search.render import render

COMPOSED = "cirr"  # the prompt set of composed queries, where none is named
_REMEMBERED = 1024  # vectors of what was asked last; 16 MiB of 4,096 numbers each


@dataclass
class Resolved:
    """An input, ready for the model, or the vector (dim,) that a collection has of it.

    `ids` are the items that have the content of its picture, the very item or file that was named first.
    """

    kind: str  # what the model is given: text, image or composed
    value: Any
    prompts: str
    ids: list[int] = field(default_factory=list)
    stored: np.ndarray | None = None
    key: tuple[str | None, ...] | None = None  # tells it from all other inputs


class Space:
    """`embedder` gives the model, the same at each call; it is called only when something must be embedded.

    Texts and pictures given as bytes are embedded once as long as they are among the last that were asked about. Without a
    catalog no input may be an id.
    """

    def __init__(self, embedder: Callable[[], Embedder], catalog: Catalog | None = None) -> None:
        self.embedder = embedder
        self._catalog = catalog
        self._remembered: OrderedDict[tuple[str | None, ...], np.ndarray] = OrderedDict()

    def vectors(self, inputs: Sequence[Input], prompts: str | None = None) -> np.ndarray:
        """-> (n, dim) float32, rows of length 1 (but for the half precision of stored ones).

        `prompts` None: `retrieval`, for a picture with a change `cirr`. Raises QueryError, MediaError, ModelError.
        """
        return self.embed([self.resolve(each, prompts) for each in inputs])

    def resolve(self, given: Input, prompts: str | None = None, view: str = "retrieval") -> Resolved:
        """Look an input up. A vector that the collection's `view` holds of it serves, if the prompts are those of the view."""
        plain = prompts or view
        if given.text is not None:
            return self._recalled(Resolved("text", given.text, plain), given.text)
        assert given.image is not None
        item, ids, content_hash = self._items_of(given.image)
        if given.modify is not None:
            composed = Resolved("composed", (_picture(given.image, item), given.modify), prompts or COMPOSED, ids)
            return self._recalled(composed, content_hash, given.modify)
        stored = self._stored(ids[:1], view) if plain == view else None
        if stored is None and item is not None and item.kind == "text" and isinstance(given.image, int):
            return Resolved("text", item.text, plain, ids)
        picture = Resolved("image", None if stored is not None else _picture(given.image, item), plain, ids, stored)
        return self._recalled(picture, content_hash) if stored is None else picture

    def _recalled(self, resolved: Resolved, *content: str | None) -> Resolved:
        """With the vector that was made of the same input before. What a prompt file says may change; a named set does not."""
        if None not in content and resolved.prompts in PROMPT_SETS:
            resolved.key = (resolved.kind, resolved.prompts, *content)
            resolved.stored = self._remembered.get(resolved.key)
        return resolved

    def embed(self, resolved: Sequence[Resolved]) -> np.ndarray:
        """The vectors (n, dim) of inputs, with one call of the model for each kind and prompt set."""
        out: list[np.ndarray | None] = [each.stored for each in resolved]
        for kind, prompts in dict.fromkeys((r.kind, r.prompts) for r in resolved if r.stored is None):
            chosen = [i for i, r in enumerate(resolved) if r.stored is None and (r.kind, r.prompts) == (kind, prompts)]
            model = self.embedder()
            ways: dict[str, Callable[..., np.ndarray]]
            ways = {"text": model.embed_texts, "image": model.embed_images, "composed": model.embed_composed}
            for i, vector in zip(chosen, ways[kind]([resolved[i].value for i in chosen], prompts), strict=True):
                out[i] = vector
                if (key := resolved[i].key) is not None:
                    self._remembered[key] = vector
        for each in resolved:
            if each.key is not None and each.key in self._remembered:
                self._remembered.move_to_end(each.key)
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return np.stack([vector for vector in out if vector is not None])

    def ask(
        self, positive: str, negative: str, images: Sequence[str | os.PathLike[str]], prompts: str | None = None
    ) -> tuple[Hits, list[Failure]]:
        """Pictures by cos(positive, x) - cos(negative, x), best first, and those that could not be looked at."""
        watch = Stopwatch()
        with watch.phase("load"):
            self.embedder()
        scored: list[tuple[float, Resolved, str]] = []
        failed: list[Failure] = []
        with watch.phase("embed"):
            wanted, unwanted = self.vectors([Input(positive), Input(negative)], prompts)
            for path in [os.fspath(image) for image in images]:
                try:
                    resolved = self.resolve(Input(image=path), prompts)
                    [x] = self.embed([resolved])
                except MediaError as error:
                    failed.append(Failure(path, str(error).removeprefix(f"{media.shown(path)}: ")))
                else:
                    scored.append((float(x @ wanted - x @ unwanted), resolved, path))
        scored.sort(key=lambda each: -each[0])
        hits = [self._hit(rank, *each) for rank, each in enumerate(scored, start=1)]
        query = {"positive": positive, "negative": negative}
        return Hits(hits, query, self.fingerprint, watch.total()), failed

    def _hit(self, rank: int, score: float, resolved: Resolved, path: str) -> Hit:
        found = os.path.realpath(path)
        if self._catalog is not None and resolved.ids:
            return replace(Hit.of(self._catalog.items(resolved.ids[:1])[resolved.ids[0]], rank, score), path=found)
        return Hit(rank, None, score, "image", found)

    @property
    def fingerprint(self) -> str:
        bound = None if self._catalog is None else self._catalog.fingerprint
        return bound or self.embedder().fingerprint

    def item(self, item_id: int) -> Item:
        if self._catalog is None:
            raise QueryError(f"item {item_id}: ids belong to a collection, and there is none here; name one with -c")
        item = self._catalog.items([item_id]).get(item_id)
        if item is None:
            raise QueryError(f"collection {self._catalog.path.parent} has no item {item_id}; ids are shown by search --json")
        return item

    def _items_of(self, image: Picture | int) -> tuple[Item | None, list[int], str | None]:
        """The item that was named, by id or path; the ids of all with its content, its own first; and the content's hash."""
        item: Item | None = None
        if isinstance(image, int):
            item = self.item(image)
            content_hash = item.content_hash
        elif isinstance(image, bytes):
            content_hash = hashlib.sha256(image).hexdigest()
        elif self._catalog is not None and isinstance(image, str | os.PathLike):
            try:
                content_hash = media.content_hash(image)
            except MediaError as error:
                raise type(error)(f"{media.shown(image)}: {error}") from error
            item = self._catalog.item_by_path(os.path.realpath(image))
        else:
            return None, [], None
        ids = [] if self._catalog is None else self._catalog.ids_of_content(content_hash)
        return item, sorted(ids, key=lambda i: item is None or i != item.id), content_hash

    def _stored(self, ids: list[int], view: str) -> np.ndarray | None:
        if self._catalog is not None:
            for _, x in self._catalog.vectors(ids=ids, view=view):
                vector: np.ndarray = x[0].astype(np.float32)
                return vector
        return None


def _picture(image: Picture | int, item: Item | None) -> Picture:
    """What the model sees of a picture, or of the item with this id."""
    if not isinstance(image, int):
        return image
    assert item is not None
    if item.kind == "image" and item.path is not None:
        return item.path
    if item.kind == "rendered" and item.text is not None:
        return render(item.text)
    raise QueryError(f"item {image} is a text, no picture; give a picture with --image")


def combine(main: np.ndarray, signed: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The query vector xq (d,): main inputs (n, d) added and normalised, then the terms (m, d) by their signed weights (m,)."""
    xq = main.sum(axis=0)
    length = float(np.linalg.norm(xq))
    unit = xq / length if length else xq
    summed: np.ndarray = unit + np.asarray(weights, np.float32) @ signed if len(weights) else unit
    return summed.astype(np.float32)
