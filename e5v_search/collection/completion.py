"""Items that have no vector in one of the collection's views, because it was asked for after them, get it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from e5v_search import media
from e5v_search.catalog import KINDS, VIEW, Item
from e5v_search.collection.ingest import Ingest
from e5v_search.collection.views import same_prompt
from e5v_search.errors import MediaError
from e5v_search.parallel import ahead, windows
from e5v_search.render import render

_BLOCK = 256


@dataclass
class _Prepared:
    item: Item
    input: Any = None
    problem: str | None = None


class Completion:
    """Items of any folder, whatever this run looked at. A photo serves only while its file is what it was."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest
        self._absent = 0

    def lacking(self) -> dict[int, tuple[str, ...]]:
        """Ids of the items that lack views, and which."""
        lacking: dict[int, tuple[str, ...]] = {}
        for view in self._ingest.catalog.views:
            if view != VIEW:
                for item_id in self._ingest.catalog.pending(view).tolist():
                    lacking[item_id] = (*lacking.get(item_id, ()), view)
        return lacking

    def run(self) -> None:
        ingest = self._ingest
        by_views: dict[tuple[str, ...], list[int]] = {}
        for item_id, views in self.lacking().items():
            by_views.setdefault(views, []).append(item_id)
        for views, ids in by_views.items():
            for block in windows(ids, _BLOCK):
                items = ingest.catalog.items(block).values()
                for kind in KINDS:
                    # a photo that has failed in this run, as a changed one may, would only fail again
                    usable = [item for item in items if item.kind == kind and (item.path, "image") not in ingest.failed]
                    self._complete(kind, usable, views)
        ingest.commit()
        if self._absent:
            ingest.report.warnings.append(
                f"{self._absent:,} of the photos are not there, or are not what they were, and still lack the views "
                f"{', '.join(ingest.catalog.views[1:])}: index their folders again"
            )

    def _complete(self, kind: str, items: Sequence[Item], views: Sequence[str]) -> None:
        ingest = self._ingest
        alike = same_prompt(ingest.catalog.views, kind)
        copied = [view for view in views if alike[view] not in views]
        for view in copied:  # the same prompt as that of a view that the items have
            for ids, x in ingest.catalog.vectors(ids=[item.id for item in items], view=alike[view]):
                for item_id, vector in zip(ids.tolist(), x, strict=True):
                    ingest.complete(item_id, view, vector)
        embedded = [view for view in views if view not in copied]
        if not embedded:
            self._done(len(items))
            return
        with (
            closing(ahead(self._prepare, items)) as prepared,
            closing(ingest.embedded(kind, self._usable(prepared), lambda one: one.input, embedded)) as done,
        ):
            for batch in done:
                for one, vectors in batch:
                    if isinstance(vectors, str):
                        self._fail(one.item, vectors)
                    else:
                        for view, vector in vectors.items():
                            ingest.complete(one.item.id, view, vector)
                        self._done(1)

    def _prepare(self, item: Item) -> _Prepared:
        embedder = self._ingest.embedder()
        try:
            if item.kind == "image":
                assert item.path is not None
                if not os.path.lexists(item.path):
                    return _Prepared(item)
                photo = media.read_photo(item.path, enough=embedder.enough)
                if photo.content_hash != item.content_hash:
                    return _Prepared(item)
                return _Prepared(item, embedder.prepare(photo.image, photo.facts.size))
            assert item.text is not None
            return _Prepared(item, item.text if item.kind == "text" else embedder.prepare(render(item.text)))
        except MediaError as error:
            return _Prepared(item, problem=str(error))

    def _usable(self, prepared: Iterator[_Prepared]) -> Iterator[_Prepared]:
        for one in prepared:
            if one.input is not None:
                yield one
            elif one.problem is not None:
                self._fail(one.item, one.problem)
            else:
                self._absent += 1

    def _fail(self, item: Item, reason: str) -> None:
        self._ingest.fail(item.path or f"item {item.id}", item.kind, reason, item.part or "")

    def _done(self, n: int) -> None:
        self._ingest.report.completed += n
        self._ingest.commit_if_due()
        self._ingest.progress()
