"""What finds candidates among mapped rows: the part of a `MappedIndex` in which its kinds differ."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found
from e5v_search.index.library import library, reason
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows
from e5v_search.index.sealed import IndexDamaged

BLOCK = 4096  # rows decoded at once
SEED = 20240717  # of rotations and of k-means: the same rows give the same index


class Scan(ABC):
    """Positions of the rows that are probably the nearest, with their exact scores.

    `head` is what of it FAISS writes and reads; `facts`, and a file in `folder` that they name, hold the rest. All positions
    are those of `rows`. Nothing of a scan ever changes but the part of the recipe that says how to search: `extended` makes
    a new one. The constructor raises IndexDamaged.
    """

    kind: ClassVar[str]
    filters: ClassVar[bool] = True  # finds as well among a part of the rows

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        self.rows = rows
        self.recipe = recipe
        self.head = head
        self.facts = facts

    @classmethod
    @abstractmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        """A scan of all rows; what it puts into a file goes to a new one whose name begins as `path`."""

    @abstractmethod
    def extended(self, rows: Rows, path: Path) -> Self:
        """A scan of `rows`, of which the first are those of this one."""

    @abstractmethod
    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        """D and positions I (nq, >= width), best first, among those `chosen` (n,) bool; -1 where no more were found.

        With more `effort` (1, 8, 64, …) more is found.
        """

    def outgrown(self, n: int) -> bool:
        """Whether for n rows it should rather be built anew than extended."""
        return False

    def problems(self) -> list[str]:
        """What is wrong with its file; reads all of it."""
        return []


def opened(head: bytes, flags: int = 0) -> Any:
    """What FAISS wrote as `head`. Raises IndexDamaged."""
    try:
        return library().deserialize_index(np.frombuffer(head, np.uint8), flags)
    except RuntimeError as error:
        raise IndexDamaged(f"FAISS cannot read it: {reason(error)}") from error


def serialised(index: Any, flags: int = 0) -> bytes:
    data: bytes = library().serialize_index(index, flags).tobytes()
    return data
