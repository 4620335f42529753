"""Items that have no vector in one of the collection's views, because it was asked for after them, get it."""

from collections.abc import Sequence
from contextlib import closing

from e5v_search.catalog import KINDS, VIEW, Item
from e5v_search.collection.ingest import Ingest
from e5v_search.collection.inputs import Input
from e5v_search.collection.views import same_prompt
from e5v_search.parallel import windows

_BLOCK = 256


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
        with closing(ingest.embedded(kind, iter(items), _input, embedded)) as done:
            for batch in done:
                for item, outcome in batch:
                    if outcome.vectors is not None:
                        for view, vector in outcome.vectors.items():
                            ingest.complete(item.id, view, vector)
                        self._done(1)
                    elif outcome.problem is not None:
                        self._fail(item, outcome.problem)
                    else:
                        self._absent += 1

    def _fail(self, item: Item, reason: str) -> None:
        self._ingest.fail(item.path or f"item {item.id}", item.kind, reason, item.part or "")

    def _done(self, n: int) -> None:
        self._ingest.report.completed += n
        self._ingest.commit_if_due()
        self._ingest.progress()


def _input(item: Item) -> Input:
    return Input(item.kind, item.content_hash, item.path if item.kind == "image" else None, item.text, unchanged=True)
