"""The data sets on the model hub that the paper's code reads, through the package `datasets`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

from e5v_search.errors import DataError, MissingPackage, UsageError
from e5v_search.evaluation.read_captioned import CAPTIONS
from e5v_search.evaluation.read_composed import CATEGORIES
from e5v_search.evaluation.records import Caption, Captioned, Change, Composed, Data, Encoded, Loaded


class Table(Protocol):
    """The part of `datasets.Dataset` that is used here. Pictures are in their encoded bytes: {"bytes", "path"}."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: Any) -> Any: ...
    def select_columns(self, names: list[str]) -> Self: ...


Open = Callable[[str, str, str | None], tuple[Table, str]]  # repository, split, revision -> rows, commit


def open_table(repository: str, split: str, revision: str | None = None) -> tuple[Table, str]:
    """A split at `revision` (a commit, tag or branch; None: as it is now), and the commit that this is.

    Raises MissingPackage with the line that mends it, or DataError when the hub cannot be reached or has no such revision.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackage(
            "data sets of the hub need one more package: pip install 'e5v-search[eval]' (or give a local copy with --data)"
        ) from None
    wanted = repository if revision is None else f"{repository}@{revision}"
    try:
        builder = datasets.load_dataset_builder(repository, revision=revision)
        # out of the hub's reach the library takes the copy that it has, of whatever revision
        if builder.name == "cache" and revision not in (None, builder.hash):
            raise DataError(f"only {repository}@{builder.hash} is on this machine")
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    except Exception as error:  # the library passes on whatever its many parts raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{wanted} could not be had from the hub ({reason}); check the network, or give a local copy with --data"
        ) from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table, builder.hash


@dataclass(frozen=True)
class Hub:
    """A data set on the hub: its tables, as (repository, split), and what makes the data from them."""

    tables: tuple[tuple[str, str], ...]
    build: Callable[..., Data]
    notes: tuple[str, ...] = ()

    def check(self, revisions: Mapping[str, str]) -> None:
        """Raises UsageError for a revision of a repository that is not read."""
        read = [repository for repository, _ in self.tables]
        for repository, revision in revisions.items():
            if repository not in read:
                raise UsageError(f"--revision {repository}@{revision}: the repositories here are {' and '.join(read)}")

    def __call__(self, revisions: Mapping[str, str], open_: Open = open_table) -> Loaded:
        """The data at `revisions`, by repository; one that has none is read as it is now."""
        self.check(revisions)
        found = [open_(repository, split, revisions.get(repository)) for repository, split in self.tables]
        commits = (f"{repository}@{commit}" for (repository, _), (_, commit) in zip(self.tables, found, strict=True))
        return Loaded(self.build(*(table for table, _ in found)), "the model hub", ", ".join(commits), self.notes)


def _captioned(table: Table) -> Captioned:
    texts = list(table.select_columns(["text"])["text"])
    gallery = tuple(Encoded(f"row {i}", partial(_picture, table, i, "image")) for i in range(len(table)))
    captions = tuple(Caption(text, (i,)) for i, own in enumerate(texts) for text in own[:CAPTIONS])
    return Captioned(gallery, captions)


def _cirr(queries: Table, images: Table, secret: bool = False) -> Composed:
    return _composed(queries, images, range(len(queries)), range(len(images)), secret)


def _fashioniq(queries: Table, images: Table) -> dict[str, Composed]:
    kinds, kinds_of_images = (list(table.select_columns(["category"])["category"]) for table in (queries, images))
    return {
        category: _composed(
            queries,
            images,
            [i for i, kind in enumerate(kinds) if kind == category],
            [i for i, kind in enumerate(kinds_of_images) if kind == category],
        )
        for category in CATEGORIES
    }


def _composed(queries: Table, images: Table, wanted: Any, wanted_images: Any, secret: bool = False) -> Composed:
    names = [str(name) for name in images.select_columns(["id"])["id"]]
    at = {names[i]: place for place, i in enumerate(wanted_images)}
    gallery = tuple(Encoded(names[i], partial(_picture, images, i, "img")) for i in wanted_images)
    columns = ["caption", "candidate_id"] + (["pairid"] if secret else ["target_id"])
    plain = queries.select_columns(columns)
    changes = []
    for i in wanted:
        row = plain[i]
        texts = tuple(row["caption"]) if isinstance(row["caption"], list) else (row["caption"],)
        try:
            target = None if secret else at[str(row["target_id"])]
            changes.append(Change(str(row.get("pairid", i)), at[str(row["candidate_id"])], texts, target))
        except KeyError as error:
            raise DataError(f"query {i} speaks of picture {error}, which the gallery does not have") from None
    return Composed(gallery, tuple(changes))


def _picture(table: Table, row: int, column: str) -> bytes:
    data: bytes = table[row][column]["bytes"]
    return data


_NO_SETS = ("without CIRR's own files the members of its sets are not known: no Recall_subset",)

FLICKR30K = Hub((("royokong/flickr30k_test", "test"),), _captioned)
COCO = Hub((("royokong/coco_test", "test"),), _captioned)
CIRR = Hub((("royokong/cirr_val", "val"), ("royokong/cirr_imgs", "val")), _cirr, _NO_SETS)
CIRR_TEST = Hub((("royokong/cirr_test", "test"), ("royokong/cirr_imgs", "test")), partial(_cirr, secret=True), _NO_SETS)
FASHIONIQ = Hub((("royokong/fashioniq_val", "val"), ("royokong/fashioniq_val_imgs", "val")), _fashioniq)
