"""The data sets on the model hub that the paper's code reads, through the package `datasets`."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

from e5v_search.errors import DataError, MissingPackage
from e5v_search.evaluation.read_captioned import CAPTIONS
from e5v_search.evaluation.read_composed import CATEGORIES
from e5v_search.evaluation.records import Caption, Captioned, Change, Composed, Encoded, Loaded


class Table(Protocol):
    """The part of `datasets.Dataset` that is used here. Pictures are in their encoded bytes: {"bytes", "path"}."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: Any) -> Any: ...
    def select_columns(self, names: list[str]) -> Self: ...


Open = Callable[[str, str], tuple[Table, str]]  # repository, split -> rows, commit


def open_table(repository: str, split: str) -> tuple[Table, str]:
    """Raises MissingPackage with the line that mends it, or DataError when the hub cannot be reached."""
    try:
        import datasets
    except ImportError:
        raise MissingPackage(
            "data sets of the hub need one more package: pip install 'e5v-search[eval]' (or give a local copy with --data)"
        ) from None
    try:
        table = datasets.load_dataset(repository, split=split)
    except Exception as error:  # the library passes on whatever its many parts raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{repository} could not be had from the hub ({reason}); check the network, or give a local copy with --data"
        ) from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    checksums = " ".join(table.info.download_checksums or {})
    commit = re.search(rf"{re.escape(repository)}@([0-9a-f]{{40}})", checksums)
    return table, commit[1] if commit else "unknown"


def flickr30k(open_: Open = open_table) -> Loaded:
    return _captioned("royokong/flickr30k_test", open_)


def coco(open_: Open = open_table) -> Loaded:
    return _captioned("royokong/coco_test", open_)


def cirr(split: str = "val", open_: Open = open_table) -> Loaded:
    """CIRR's split "val" or "test". The hub's tables do not name the sets that Recall_subset needs."""
    queries, commit = open_(f"royokong/cirr_{split}", split)
    images, commit_of_images = open_("royokong/cirr_imgs", split)
    data = _composed(queries, images, range(len(queries)), range(len(images)), secret=split == "test")
    note = "without CIRR's own files the members of its sets are not known: no Recall_subset"
    return Loaded(data, f"royokong/cirr_{split}", _revision(commit, commit_of_images), (note,))


def fashioniq(open_: Open = open_table) -> Loaded:
    queries, commit = open_("royokong/fashioniq_val", "val")
    images, commit_of_images = open_("royokong/fashioniq_val_imgs", "val")
    kinds, kinds_of_images = (list(table.select_columns(["category"])["category"]) for table in (queries, images))
    found = {
        category: _composed(
            queries,
            images,
            [i for i, kind in enumerate(kinds) if kind == category],
            [i for i, kind in enumerate(kinds_of_images) if kind == category],
        )
        for category in CATEGORIES
    }
    return Loaded(found, "royokong/fashioniq_val", _revision(commit, commit_of_images))


def _revision(commit: str, commit_of_images: str) -> str:
    return f"{commit}, pictures {commit_of_images}"


def _captioned(repository: str, open_: Open) -> Loaded:
    table, commit = open_(repository, "test")
    texts = list(table.select_columns(["text"])["text"])
    gallery = tuple(Encoded(f"{repository}/{i}", partial(_picture, table, i, "image")) for i in range(len(table)))
    captions = tuple(Caption(text, (i,)) for i, own in enumerate(texts) for text in own[:CAPTIONS])
    return Loaded(Captioned(gallery, captions), repository, commit)


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
