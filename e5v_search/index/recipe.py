"""Which index a collection gets: what a recipe can say, and the choice by size where nobody says anything."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from e5v_search.config import load_recipe, parse
from e5v_search.errors import UsageError

Kind = Literal["exact", "one-bit", "ivf", "hnsw", "gpu", "gpu-ivf", "gpu-cagra", "milvus"]
KINDS = ("exact", "one-bit", "ivf", "hnsw")  # that a processor searches
ON_GPUS = ("gpu", "gpu-ivf", "gpu-cagra")
NAMED = (*KINDS, *ON_GPUS)  # that need nothing but their name

# numbers (rows times d) up to which a kind is chosen: 20,000 and 1,000,000 rows of 4,096
EXACT_NUMBERS = 20_000 * 4096
ONE_BIT_NUMBERS = 1_000_000 * 4096
_SHRUNK = 0.7  # of a limit: below it the kind for fewer rows is right again; between them what is there stays

_OF_KIND = {
    "candidates": ("one-bit", "ivf", "milvus"),
    "query_bits": ("one-bit", "ivf"),
    "lists": ("ivf", "gpu-ivf"),
    "probes": ("ivf", "gpu-ivf"),
    "links": ("hnsw", "gpu-cagra"),
    "ef_build": ("hnsw",),
    "ef": ("hnsw", "gpu-cagra"),
    "newer": ("one-bit", "ivf", "hnsw", *ON_GPUS),
    "store": ("milvus",),
    "index": ("milvus",),
    "vectors": ("milvus",),
    "build": ("milvus",),
    "search": ("milvus",),
}


@dataclass(frozen=True)
class Recipe:
    """How an index is built and searched. Keys that do not belong to the kind keep their defaults."""

    kind: Kind
    candidates: int = 400  # rows whose exact score is taken, at least; more where more results are asked for
    query_bits: int = 2  # in which a number of the query is held while it is compared with the one-bit rows
    lists: int = 0  # into which the rows are divided; 0: about the square root of their number
    probes: int = 64  # lists that a search looks into
    links: int = 32  # of each row to near ones, twice as many on the lowest level
    ef_build: int = 80  # rows kept in view while the links of a new one are chosen
    ef: int = 128  # rows kept in view while searching
    newer: int = 4096  # rows newer than the files, at least, which a search takes from the catalog and scans
    store: str = ""  # where the rows are, see milvus.place
    index: str = "auto"  # of Milvus' own: AUTOINDEX, or FLAT in milvus-lite
    vectors: Literal["float32", "float16"] = "float32"  # as Milvus holds them; milvus-lite knows float32 alone
    build: dict[str, int] = field(default_factory=dict)  # Milvus' parameters of that index
    search: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What types cannot say, one line each."""
        limits = {
            "candidates": (1, 1_000_000),
            "query_bits": (1, 8),
            "lists": (0, 1_000_000),
            "probes": (1, 1_000_000),
            "links": (2, 256),
            "ef_build": (1, 10_000),
            "ef": (1, 1_000_000),
            "newer": (0, 10_000_000),
        }
        found = [
            f"{name}: {value} is not between {least:,} and {most:,}"
            for name, (least, most) in limits.items()
            if not least <= (value := getattr(self, name)) <= most
        ]
        default = Recipe("exact")
        return found + [
            f"{name}: this is a key of {' and '.join(kinds)}, not of {self.kind}"
            for name, kinds in _OF_KIND.items()
            if self.kind not in kinds and getattr(self, name) != getattr(default, name)
        ]

    def to_json(self) -> dict[str, Any]:
        """The kind, and what belongs to it."""
        return {"kind": self.kind} | {name: getattr(self, name) for name, kinds in _OF_KIND.items() if self.kind in kinds}


def lists_for(n: int) -> int:
    """Into how many lists n rows are divided: the power of two nearest to their square root, n at most."""
    return int(max(1, min(2 ** round(0.5 * max(n, 1).bit_length()), n)))


def codes_bytes(n: int, d: int) -> int:
    """Bytes that the one-bit codes of n rows take, with two numbers for each and its id."""
    return n * (d // 8 + 16)


def resident_bytes(recipe: Recipe, n: int, d: int) -> int:
    """Bytes of memory that a search works in, rows that it re-ranks from the disk not counted."""
    ids = 8 * n
    if recipe.kind == "exact":
        return 2 * d * n + ids
    links = n * (8 * recipe.links + 16)
    if recipe.kind == "hnsw":
        return ids + links + 2 * d * n  # it walks over the rows themselves
    centres = 4 * d * (recipe.lists or lists_for(n)) if recipe.kind in ("ivf", "gpu-ivf") else 0
    if recipe.kind in ON_GPUS:
        return ids + centres + (links if recipe.kind == "gpu-cagra" else 0)
    return ids + codes_bytes(n, d) + centres


def read_bytes(recipe: Recipe, n: int, d: int) -> int:
    """About how many bytes of codes and rows one search reads."""
    if recipe.kind in ("exact", "gpu"):
        return 2 * d * n
    if recipe.kind in ("hnsw", "gpu-cagra"):
        return 2 * d * min(recipe.ef, n)
    lists = recipe.lists or lists_for(n)
    scanned = n if recipe.kind == "one-bit" else min(recipe.probes, lists) * n // lists
    if recipe.kind == "gpu-ivf":
        return 2 * d * scanned
    return codes_bytes(scanned, d) + 2 * d * min(recipe.candidates, n)


def physical_memory() -> int:
    """Bytes of this machine's memory; where it does not say, 8 GB are assumed."""
    try:
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 8_000_000_000


def by_size(n: int, d: int, memory: int, used: str | None = None) -> tuple[Recipe, str]:
    """The recipe for n rows of d numbers on a machine with `memory` bytes, and why.

    A collection that has an index of the kind `used` keeps it until it has clearly left that kind's range.
    """
    half = memory // 2
    exact, one_bit = EXACT_NUMBERS, ONE_BIT_NUMBERS
    if used == "exact" or used is None:
        limits = (exact, one_bit)
    elif used == "one-bit":
        limits = (int(_SHRUNK * exact), one_bit)
    else:
        limits = (int(_SHRUNK * exact), int(_SHRUNK * one_bit))
    numbers = f"{n:,} vectors of {d:,} numbers"
    if n * d <= limits[0] and resident_bytes(Recipe("exact"), n, d) <= half:
        return Recipe("exact"), f"chosen by size: {numbers} are soon scanned whole"
    if n * d <= limits[1] and codes_bytes(n, d) <= half:
        return Recipe("one-bit"), f"chosen by size: {numbers} take {codes_bytes(n, d) / 1e6:,.0f} MB in one bit each"
    return Recipe("ivf"), f"chosen by size: {numbers} are too many to be scanned, even in one bit each"


def read_recipe(given: str) -> Recipe:
    """The recipe of a kind's name, as the program has it, or of a TOML file. Raises UsageError with all that is wrong."""
    if given in NAMED:
        return parse(Recipe, {"kind": given}, given)
    if not os.path.exists(given):
        raise UsageError(f"{given} is neither a file nor one of: {', '.join(NAMED)}")
    return load_recipe(Recipe, given)
