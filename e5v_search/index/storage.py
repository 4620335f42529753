"""Index files of any kind: built by a recipe, loaded by what they say of themselves."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from e5v_search.index import flat
from e5v_search.index.base import Index, Stamp
from e5v_search.index.flat import FlatIndex
from e5v_search.index.mapped import SCANS, MappedIndex
from e5v_search.index.recipe import Recipe
from e5v_search.index.sealed import IndexDamaged, read_facts


def build(path: Path, recipe: Recipe, d: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Index:
    """The index of all `blocks` of (ids (n,), x (n, d) float16), to be saved to `path`; until then that stays as it is.

    Of an id that comes again the later row counts. Raises DiskFull, CollectionReadOnly, CollectionError.
    """
    if recipe.kind == "exact":
        return FlatIndex.build(d, blocks)
    return MappedIndex.build(path, recipe, d, blocks)


def load(path: Path) -> Index:
    """The index in `path`. Raises IndexDamaged."""
    while True:
        facts = read_facts(path)
        try:
            if facts["kind"] == flat.KIND:
                return FlatIndex.load(path)
            if facts["kind"] in SCANS:
                return MappedIndex.load(path)
        except IndexDamaged:
            if read_facts(path) == facts:  # else a writer has put another in its place meanwhile
                raise
            continue
        raise IndexDamaged(f"it is of the kind {facts['kind']!r}, which is unknown here")


def read_stamp(path: Path) -> Stamp:
    """The stamp alone, in no time; the rest of the file is not looked at. Raises IndexDamaged."""
    facts = read_facts(path)
    return Stamp(facts["uid"], facts["state"])
