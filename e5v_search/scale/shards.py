"""What workers elsewhere have embedded, on a disk that all can see: small folders, each as `e5v-search import` reads it.

A folder appears under its name when all is in it, so whatever happens to a run, those that are there need not be made again.
"""

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.catalog import VIEW, Put
from e5v_search.collection.exporting import description, vectors_file, write_folder
from e5v_search.collection.importing import open_vectors
from e5v_search.collection.inputs import Input, Outcome
from e5v_search.collection.rows import PARQUET, read, read_metadata
from e5v_search.errors import CollectionError
from e5v_search.media import Facts
from e5v_search.scale.team import Loaded, Task

_FACTS = [each.name for each in dataclasses.fields(Facts)]
_UNFINISHED = ".unfinished"


def write(folder: Path, model: Loaded, task: Task, outcomes: Sequence[Outcome]) -> str | None:
    """The shard of a task, without what has failed -> its name, or None when nothing is left. Called by workers."""
    done = [(given, outcome) for given, outcome in zip(task.inputs, outcomes, strict=True) if outcome.vectors is not None]
    if not done:
        return None
    name = secrets.token_hex(8)
    unfinished = folder / f".{name}{_UNFINISHED}"
    unfinished.mkdir()
    puts = [_put(i, given, outcome) for i, (given, outcome) in enumerate(done)]
    write_folder(unfinished, description(len(puts), task.of, model.fingerprint, model.recalled_by, model.dim), [puts])
    os.rename(unfinished, folder / name)
    return name


def _put(number: int, given: Input, outcome: Outcome) -> Put:
    what: dict[str, Any] = {"content_hash": given.content_hash, "path": given.path, "text": given.text}
    return Put(kind=given.kind, item_id=number, vectors=outcome.vectors or {}, **what, **outcome.facts)


class Shards:
    """Those in a folder, which is made, and rid of what killed workers have left unfinished. `note` is given a line about
    one that cannot be read, which is left alone.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder = folder
        self._note = note
        self._places: dict[str, dict[tuple[str, str], tuple[str, int]]] = {}  # by model: (kind, content) -> (shard, row)
        self._opened = lru_cache(maxsize=16)(self._open)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{_UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)

    def find(self, model: Loaded, given: Input, of: Sequence[str]) -> Outcome | None:
        """What an earlier run has made of the same content with the same model, in all views asked for."""
        if model.fingerprint not in self._places:
            self._places[model.fingerprint] = self._places_of(model)
        place = self._places[model.fingerprint].get((given.kind, given.content_hash))
        if place is None:
            return None
        found = self._outcome(*place)
        assert found.vectors is not None
        if any(view not in found.vectors for view in of):
            return None
        return Outcome({view: found.vectors[view] for view in of}, found.facts)

    def outcomes(self, name: str | None, problems: Sequence[str | None]) -> list[Outcome]:
        """Those of the task that a worker has written as `name`, given what was wrong with which input. CollectionError."""
        rows = iter(range(len(problems)))
        return [
            Outcome(problem=one) if one is not None or name is None else self._outcome(name, next(rows)) for one in problems
        ]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _places_of(self, model: Loaded) -> dict[tuple[str, str], tuple[str, int]]:
        places = {}
        for shard in sorted(self.folder.glob("[!.]*")):
            try:
                if (read_metadata(shard / PARQUET) or {}).get("fingerprint") == model.fingerprint:
                    for number, (_, row) in enumerate(read(shard / PARQUET)):
                        places[row["kind"], row["content_hash"]] = shard.name, number
            except CollectionError as error:
                self._note(f"{error}; what is in it is embedded again")
        return places

    def _open(self, name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        shard = self.folder / name
        described = read_metadata(shard / PARQUET) or {}
        x = {view: open_vectors(shard / vectors_file(view)) for view in described["files"]["vectors"]}
        return [row for _, row in read(shard / PARQUET)], x

    def _outcome(self, name: str, number: int) -> Outcome:
        rows, x = self._opened(name)
        row = rows[number]
        facts = {fact: row[fact] for fact in _FACTS} if row["kind"] == "image" else {}
        return Outcome({view: vectors[number] for view, vectors in x.items()}, facts)


def is_wanted(task: Task) -> bool:
    """Whether a shard can be made of it: a later view alone makes no export."""
    return VIEW in task.of
