"""A collection: the one place where catalog and index meet."""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from e5v_search import backbones, media
from e5v_search.catalog import CATALOG, Catalog, Put
from e5v_search.collection.asking import Ask, answer_all
from e5v_search.collection.engine import Alone, Engine
from e5v_search.collection.indexes import Indexes
from e5v_search.collection.ingest import Ingest
from e5v_search.collection.report import Report
from e5v_search.collection.sources import canonical, check_sources, ingest_all
from e5v_search.collection.space import Space
from e5v_search.collection.views import check_taken, is_instructed
from e5v_search.config import ModelChoice, collection_path
from e5v_search.embedder import Embedder, Picture
from e5v_search.errors import (
    CollectionBusy,
    CollectionError,
    CollectionNotFound,
    CollectionReadOnly,
    DiskFull,
    E5VError,
    FingerprintMismatch,
    QueryError,
    StoreError,
)
from e5v_search.hits import Hits
from e5v_search.index import Recipe, check
from e5v_search.query import Query, TermLike, terms

_SYNC_AFTER = 20_000  # vectors that a search during a long run may have to fetch from the catalog itself


UNKNOWN_MODEL = "unknown"  # the fingerprint of vectors that were imported without one


def check_first_run(
    place: str | os.PathLike[str],
    sources: Sequence[tuple[str, str]],
    views: Sequence[str],
    choice: ModelChoice,
    store: str | None = None,
) -> None:
    """Refuse what `ingest_sources` would refuse, before an empty collection is made of it. Does nothing where there is one."""
    if not (collection_path(place) / CATALOG).exists():
        check_sources(sources, views, lambda path: False)
        if choice.name != "auto":
            from e5v_search.backbones import known, registry  # which knows torch

            source = registry.resolve(choice.name)
            if any(map(is_instructed, views)):
                known.check_takes(registry.family_name(source), "instruction", "--instruction", choice.name)
        if store is not None:
            check(Recipe("milvus", store=store), "", None)


class Collection:
    """Photos and texts that can be searched by meaning: a folder with a catalog (the truth) and an index (derived from it)."""

    def __init__(self, catalog: Catalog, embedder: Embedder | ModelChoice, allow_mismatch: bool) -> None:
        self.path = catalog.path.parent
        self.catalog = catalog
        self._allow_mismatch = allow_mismatch
        self._choice = embedder if isinstance(embedder, ModelChoice) else None
        self._embedder = None if isinstance(embedder, ModelChoice) else embedder
        self._engine: Engine = Alone(self.embedder)
        self._loading = threading.Lock()
        # read now: the model may be loaded by a thread that must not touch the catalog
        self._bound, self._made_by = catalog.fingerprint, catalog.model
        self.indexes = Indexes(catalog, self.writing)
        self.space = Space(self.embedder, catalog)
        if self._embedder is not None:
            self._check_fingerprint(self._embedder)

    @classmethod
    def open(
        cls,
        place: str | os.PathLike[str],
        embedder: Embedder | ModelChoice | None = None,
        *,
        create: bool = True,
        allow_mismatch: bool = False,
    ) -> "Collection":
        """Open the collection `place`: a name in the data home, or a path (with a separator).

        Without an embedder the model that made the collection is loaded when needed (for a new one: "auto").
        Raises CollectionNotFound with `create=False`, FingerprintMismatch, CatalogDamaged, SchemaTooNew.
        """
        folder = collection_path(place)
        if (folder / CATALOG).exists():
            try:
                catalog = Catalog.open(folder)
            except (CollectionReadOnly, DiskFull):
                catalog = Catalog.open(folder, readonly=True)  # it can be searched all the same
        elif create:
            catalog = Catalog.create(folder)
        else:
            raise CollectionNotFound(f"no collection at {folder}; make one with: e5v-search index FOLDER -c {place}")
        try:
            return cls(catalog, embedder or ModelChoice(), allow_mismatch)
        except BaseException:
            catalog.close()
            raise

    def close(self) -> None:
        self.catalog.close()

    def __enter__(self) -> "Collection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the model

    @property
    def fingerprint(self) -> str | None:
        """What made the vectors; None while there are none."""
        return self.catalog.fingerprint

    def embedder(self) -> Embedder:
        """The model, loaded on first use; FingerprintMismatch when it is not the one that made the collection."""
        with self._loading:
            if self._bound == UNKNOWN_MODEL and not self._allow_mismatch:
                raise FingerprintMismatch(
                    f"collection {self.path} holds vectors of a model that is not known: they can be searched by each other "
                    "(--image ID), not by texts or pictures; if you know the model, import them again with --model"
                )
            if self._embedder is None:
                assert self._choice is not None
                embedder = backbones.Embedder.of(self._resolve(self._choice))
                self._check_fingerprint(embedder)
                self._embedder = embedder
            return self._embedder

    def _resolve(self, choice: ModelChoice) -> ModelChoice:
        """`auto` on a collection that has a model means that model, as it was."""
        made_by = self._made_by
        if made_by is None or choice.name not in ("auto", made_by["name"]):
            return choice
        quantize = choice.quantize or (made_by["quantize"] if choice.name == "auto" else None)
        tiles = made_by.get("tiles", "auto") if choice.tiles == "auto" else choice.tiles
        adapter, dim = choice.adapter or made_by.get("adapter"), choice.dim or made_by.get("dim")
        return replace(choice, name=made_by["name"], quantize=quantize, tiles=tiles, adapter=adapter, dim=dim)

    @property
    def choice(self) -> ModelChoice | None:
        """The model that an embedding here would take, if there is a choice to make: this collection was opened without one."""
        return None if self._choice is None else self._resolve(self._choice)

    def embed_with(self, engine: Engine) -> None:
        """Have `engine` embed what is ingested from now on; queries go on being embedded here."""
        self._engine = engine

    def _accept(self, engine: Engine) -> None:
        self._bound = self.catalog.fingerprint
        self._check_fingerprint(engine)

    def _check_fingerprint(self, embedder: Embedder | Engine) -> None:
        if self._bound not in (None, embedder.fingerprint) and not self._allow_mismatch:
            raise FingerprintMismatch(
                f"collection {self.path} was made by {self._bound}, but the model here is {embedder.fingerprint}: their "
                "vectors do not compare. Leave --model, --quantize, --tiles, --adapter and --dim away to use what made it, "
                "take another collection with -c, or, for a search, insist with --allow-mismatch"
            )

    # writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock. Raises CollectionBusy, CollectionReadOnly."""
        lock = FileLock(self.path / "write.lock", timeout=0)
        note = self.path / "writer.json"
        try:
            lock.acquire()
        except Timeout:
            with suppress(OSError, ValueError):
                pid = json.loads(note.read_text())["pid"]
                raise CollectionBusy(
                    f"process {pid} is writing to {self.path}; wait until it has ended, then run this again"
                ) from None
            raise CollectionBusy(
                f"another process is writing to {self.path}; wait until it has ended, then run this again"
            ) from None
        except OSError as error:
            raise CollectionReadOnly(
                f"cannot write to {self.path} ({error.strerror or error}); choose another place with -c"
            ) from error
        try:
            with suppress(OSError):
                note.write_text(json.dumps({"pid": os.getpid()}))
            yield
        finally:
            lock.release()

    def ingest(
        self,
        paths: Sequence[str | os.PathLike[str]] | None = None,
        kind: str = "image",
        views: Iterable[str] | None = None,
        on_progress: Callable[[Report, int], None] | None = None,
        unfinished: Callable[[str], bool] | None = None,
    ) -> Report:
        """Bring what is under `paths` (files and folders) into the collection: new, changed, moved and vanished ones.

        `kind` says what it is: photos ("image"), or files of texts, taken as they are ("text") or drawn ("rendered").
        Without `paths` everything that was indexed before is looked through again, each path as what it was indexed as.
        `views` are prompt sets under which, from now on, every item is to have a vector too; "instruction:" and a text is one.

        `on_progress(report, photos and texts in all)` is called as it goes. What cannot be used is listed in
        `report.failed` and ends nothing; a file of which `unfinished(path)` says that it may still be being written is left
        as it is. Raises UsageError, UnreadableFile for a path that neither exists nor ever held items of this collection,
        DiskFull, CollectionBusy.
        """
        sources = self.catalog.roots() if paths is None else [(path, kind) for path in canonical(paths)]
        return self.ingest_sources(sources, views, on_progress, unfinished)

    def ingest_sources(
        self,
        sources: Sequence[tuple[str, str]],
        views: Iterable[str] | None = None,
        on_progress: Callable[[Report, int], None] | None = None,
        unfinished: Callable[[str], bool] | None = None,
    ) -> Report:
        """As `ingest`, of several kinds at once: (path, kind), the paths absolute and without links."""
        views = list(views or ())
        check_sources(sources, views, lambda path: next(self.catalog.paths_under([path]), None) is not None)
        self._refuse_another_model()
        if asked := [view for view in views if is_instructed(view) and view not in self.catalog.views]:
            check_taken(self.embedder(), {kind for _, kind in sources}, asked)
        with self.writing():
            self.catalog.add_roots(sources)
            if views:
                self.catalog.add_views(views)
            run = self.catalog.start_run()
            ingest = self._ingest(on_progress, unfinished)
            try:
                with ingest:
                    ingest_all(ingest, sources)
            finally:
                try:
                    self.catalog.finish_run(run, ingest.report.to_json())
                    self.indexes.sync()
                except StoreError as error:
                    ingest.report.behind = str(error)
                except CollectionError:
                    pass  # what failed first, a full disk say, is the error to report
        return ingest.report

    def ingest_changes(
        self, sources: Sequence[tuple[str, str]], below: Sequence[str], unfinished: Callable[[str], bool] | None = None
    ) -> Report:
        """As `ingest_sources`, of what was ingested before, but look only at what is, or lies below, the paths `below`.

        These are absolute and without links, too. The index files may stay behind the catalog, which searches make up for,
        until `save_index`.
        """
        with self.writing(), self._ingest(None, unfinished) as ingest:
            ingest_all(ingest, sources, below)
        return ingest.report

    def _ingest(self, on_progress: Callable[[Report, int], None] | None, unfinished: Callable[[str], bool] | None) -> Ingest:
        behind, serves = 0, True

        def committed(vectors: int) -> None:
            nonlocal behind, serves
            behind += vectors
            if serves and (behind >= _SYNC_AFTER or self.indexes.missing):
                try:
                    self.indexes.sync()
                except StoreError:  # what is embedded is safe without it
                    serves = False
                behind = 0

        return Ingest(self.catalog, self._engine, self._accept, committed, on_progress, unfinished)

    def save_index(self) -> None:
        """Bring the index files to the catalog's state. Raises CollectionBusy, DiskFull, CollectionReadOnly."""
        with self.writing():
            self.indexes.sync()

    def load(
        self,
        puts: Iterable[Put],
        fingerprint: str,
        dim: int,
        model: dict[str, Any],
        views: Iterable[str],
        roots: Iterable[tuple[str, str]],
    ) -> int:
        """Fill the empty collection with items that bring ids and vectors, all or none; see Catalog.load. Returns how many."""
        with self.writing():
            loaded = self.catalog.load(puts, fingerprint, dim, model, views, roots)
            self.indexes.rebuild()
        return loaded

    def _refuse_another_model(self) -> None:
        """A wrong --model is refused even when nothing needs embedding."""
        made_by, choice = self._made_by, self._choice
        if made_by is None or choice is None:
            return
        wanted = self._resolve(choice)
        made = ModelChoice(wanted.name, wanted.device, wanted.dtype, wanted.quantize)
        if wanted != replace(made, **made_by):
            self.embedder()

    def forget(self, paths: Sequence[str | os.PathLike[str]]) -> int:
        """Take the items of these files and folders out of the collection; the files stay. Returns how many items."""
        roots = canonical(paths)
        with self.writing():
            ids = [row.item_id for row in self.catalog.paths_under(roots)]
            self.catalog.commit(gone=ids)
            self.catalog.drop_roots(roots)
            self.indexes.sync()
        return len(ids)

    def rebuild(self, recipe: Recipe | Literal["auto"] | None = None, store: str | None = None) -> int:
        """Make the index anew from the catalog, embedding nothing. Returns the number of vectors.

        A `recipe` holds from now on; with "auto" the size of the collection decides again, as it does in new ones. `store` is
        where one of Milvus' is to be. Raises UsageError, StoreError.
        """
        with self.writing():
            if recipe == "auto":
                self.catalog.choose_recipe(None)
            elif recipe is not None:
                placed = self.indexes.placed(recipe, store)
                self.catalog.choose_recipe({"recipe": placed.to_json(), "why": _why(placed, "--recipe")})
            return self.indexes.rebuild()

    def store_in(self, store: str) -> int:
        """Keep the index in Milvus from now on: milvus://HOST:PORT/COLLECTION, or milvus:FILE.db/COLLECTION.

        What is there of this collection already stays, what it lacks is sent. Returns the number of items. Raises UsageError
        for what is no such place; StoreError where it does not serve, or holds something else, and nothing has changed then.
        """
        with self.writing():
            placed = self.indexes.placed(Recipe("milvus"), store)
            if placed.store != self.indexes.store:
                self.catalog.choose_recipe({"recipe": placed.to_json(), "why": _why(placed, "--store")})
            self.indexes.sync()
            return self.catalog.size()

    # reading

    def search(
        self,
        text: str | None = None,
        *,
        image: Picture | int | None = None,
        modify: str | None = None,
        plus: Sequence[TermLike] = (),
        minus: Sequence[TermLike] = (),
        where: Sequence[str] = (),
        k: int = 10,
        threshold: float | None = None,
        prompts: str | None = None,
        keep_reference: bool = False,
        explain: bool = False,
    ) -> Hits:
        """The k items nearest to a query, best first, none scored below `threshold`.

        `image` is a picture or an item's id; `modify` asks for that picture changed, and leaves the picture itself out unless
        `keep_reference`. `plus` and `minus` are texts, pictures (paths as Path), ids, or pairs of one and its weight; `where`
        are filters (docs/filters.md). `explain` gives each hit the words that it shares with the query.
        Raises QueryError, FingerprintMismatch, CollectionError.
        """
        query = Query(text, image, modify, terms(plus), terms(minus), tuple(where), prompts)
        return self.answer(query, k=k, threshold=threshold, keep_reference=keep_reference, explain=explain)

    def answer(
        self, query: Query, *, k: int = 10, threshold: float | None = None, keep_reference: bool = False, explain: bool = False
    ) -> Hits:
        """As `search`, for a query that is a value already."""
        [found] = self.answer_all([Ask(query, k, threshold, keep_reference, explain)])
        if isinstance(found, E5VError):
            raise found
        return found

    def answer_all(self, asks: Sequence[Ask]) -> list[Hits | E5VError]:
        """The hits of each question, or the error that `answer` would raise for it; the model is called for all at once."""
        return answer_all(asks, self.catalog, self.indexes, self.space)

    def thumbnail(self, item_id: int, size: int = 512) -> Path:
        """A small JPEG of a photo, at most `size` pixels wide and high, kept in the collection: it serves while the disk
        with the photo is away. Raises QueryError for what is no photo, MediaError when it has to be read and cannot be.
        """
        item = self.catalog.items([item_id]).get(item_id)
        if item is None or item.path is None or item.kind != "image":
            raise QueryError(f"item {item_id} of {self.path} is no photo")
        try:
            return media.thumbnail(item.path, item.content_hash, self.path / "thumbnails", size)
        except (CollectionReadOnly, DiskFull):
            return Path(item.path)

    def status(self) -> dict[str, Any]:
        """What is in the collection, as `status --json` prints it."""
        counts = self.catalog.count()
        return {
            "collection": str(self.path),
            "fingerprint": self.catalog.fingerprint,
            "items": {kind: counts.get(kind, 0) for kind in ("image", "text", "rendered")},
            "failed": len(self.catalog.failures()),
            "index": {"kind": self.indexes.kind, "vectors": sum(counts.values()), "stale": self.indexes.stale},
            "bytes": sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file()),
        }

    def verify(self) -> list[str]:
        """Every inconsistency found in catalog and index, one line each; an empty list means none."""
        return [*self.catalog.verify(), *self.indexes.problems()]


def _why(recipe: Recipe, option: str) -> str:
    where = f", in {recipe.store}" if recipe.store else ""
    return f"chosen with rebuild {option}{where}" if option == "--recipe" else f"chosen with {option}{where}"
