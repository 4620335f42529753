"""Questions put to a collection, several at a time: what they need of the model is embedded in one go."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np

from e5v_search import filters
from e5v_search.catalog import VIEW, Catalog
from e5v_search.collection import narrow
from e5v_search.collection.chosen import stored
from e5v_search.collection.indexes import Indexes
from e5v_search.collection.report import Stopwatch
from e5v_search.collection.space import COMPOSED, Resolved, Space, combine
from e5v_search.errors import CollectionNotFound, E5VError, QueryError
from e5v_search.filters import Filter
from e5v_search.hits import Hit, Hits
from e5v_search.index import Index
from e5v_search.query import Query

_SHARED_WORDS = 5  # said of each hit when its score is to be explained


@dataclass(frozen=True)
class Ask:
    """A query and what is wanted of its answer. Raises QueryError for a k or a threshold that makes no sense."""

    query: Query
    k: int = 10
    threshold: float | None = None
    keep_reference: bool = False
    explain: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise QueryError(f"k must be at least 1, not {self.k}")
        if self.threshold is not None and not abs(self.threshold) <= (np.inf if self.query.signed else 1):
            raise QueryError(f"the threshold must be a number between -1 and 1, as cosines are, not {self.threshold:g}")


@dataclass
class _Asked:
    """A question on its way to its answer."""

    ask: Ask
    where: Filter
    watch: Stopwatch = field(default_factory=Stopwatch)
    total: int = 0  # items in the collection
    index: Index | None = None
    inputs: list[Resolved] = field(default_factory=list)
    signed: list[Resolved] = field(default_factory=list)
    error: E5VError | None = None

    @property
    def resolved(self) -> list[Resolved]:
        return [*self.inputs, *self.signed]


def answer_all(asks: Sequence[Ask], catalog: Catalog, indexes: Indexes, space: Space) -> list[Hits | E5VError]:
    """The hits of each question, or why there are none; one that fails takes no other with it."""
    asked = []
    for ask in asks:
        found = _Asked(ask, filters.EVERYTHING)
        asked.append(found)
        try:
            found.where = filters.parse(ask.query.where)
            with found.watch.phase("load"):
                _prepare(found, catalog, indexes, space)
        except E5VError as error:
            found.error = error
    vectors = _embed([each for each in asked if each.error is None], space)
    answers: list[Hits | E5VError] = []
    for each in asked:
        try:
            answers.append(each.error or _rank(each, vectors[id(each)], catalog, indexes, space))
        except E5VError as error:
            answers.append(error)
    return answers


def _prepare(asked: _Asked, catalog: Catalog, indexes: Indexes, space: Space) -> None:
    query = asked.ask.query
    view = _view(query, catalog)
    asked.index = indexes.current(view)
    asked.total = sum(catalog.count().values())
    if not asked.total:
        folder = catalog.path.parent
        raise CollectionNotFound(f"collection {folder} is empty; fill it with: e5v-search index FOLDER -c {folder}")
    asked.inputs = [space.resolve(each, query.prompts, view) for each in query.inputs]
    asked.signed = [space.resolve(each, query.prompts, view) for each, _ in query.signed]
    if asked.ask.explain or any(each.stored is None for each in asked.resolved):
        space.embedder()


def _embed(asked: Sequence[_Asked], space: Space) -> dict[int, np.ndarray]:
    """The vectors of each question's inputs, by the question's identity; where all together fail, each is tried alone."""
    with ExitStack() as stack:
        for each in asked:
            stack.enter_context(each.watch.phase("embed"))
        if len(asked) > 1:
            with suppress(E5VError):
                x = space.embed([one for each in asked for one in each.resolved])
                ends = np.cumsum([len(each.resolved) for each in asked])
                return {id(each): part for each, part in zip(asked, np.split(x, ends[:-1]), strict=True)}
        found = {}
        for each in asked:
            try:
                found[id(each)] = space.embed(each.resolved)
            except E5VError as error:
                each.error = error
        return found


def _rank(asked: _Asked, x: np.ndarray, catalog: Catalog, indexes: Indexes, space: Space) -> Hits:
    ask, query, index = asked.ask, asked.ask.query, asked.index
    assert index is not None
    with asked.watch.phase("search"):
        xq = combine(x[: len(asked.inputs)], x[len(asked.inputs) :], [weight for _, weight in query.signed])
        reference = asked.inputs[0].ids if query.image is not None else []
        excluded = set(reference) if query.composed and not ask.keep_reference else set()
        D, ids = narrow.search(index, catalog, xq, ask.k + len(reference), asked.where)
        scores = dict(zip(ids.tolist(), D.tolist(), strict=True))
        if index.ntotal < asked.total:  # what has no vector in this view yet is not to be missing: its other one serves
            pending = catalog.passing(catalog.pending(_view(query, catalog)), asked.where)
            more, others = indexes.current().search(xq[None], ask.k + len(reference), ids=pending)
            scores |= dict(zip(others[0].tolist(), more[0].tolist(), strict=True))
        items = catalog.items(scores)
        # among equals, as copies of a photo are, the picture that was asked about comes first
        order = sorted((i for i in scores if i in items), key=lambda i: (-scores[i], i not in reference[:1]))
        passing = (i for i in order if i not in excluded and (ask.threshold is None or scores[i] >= ask.threshold))
        found = list(passing)[: ask.k]
    words = _shared_words(found, xq, catalog, space) if ask.explain else {}
    # stored rows are of length 1 but for the rounding of half precision
    most = np.inf if query.signed else 1.0
    hits = [Hit.of(items[i], rank, min(scores[i], most), words.get(i)) for rank, i in enumerate(found, start=1)]
    return Hits(hits, query.to_json(), catalog.fingerprint or "", asked.watch.total())


def _view(query: Query, catalog: Catalog) -> str:
    """The view whose photos were read as the query asks; where the collection has none such, the one it always has."""
    prompts = query.prompts or (COMPOSED if query.composed else VIEW)
    return prompts if prompts in catalog.views else VIEW


def _shared_words(found: Sequence[int], xq: np.ndarray, catalog: Catalog, space: Space) -> dict[int, list[str]]:
    ids, x = stored(catalog, np.array(found, np.int64))
    shared = space.embedder().shared_words(xq, x, _SHARED_WORDS)
    return {i: [word.text for word in words] for i, words in zip(ids.tolist(), shared, strict=True)}
