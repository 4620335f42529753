"""A filter as a value.

Logic has two values: a condition on a fact that an item lacks is false, and its negation true.
"""

from dataclasses import dataclass
from typing import TypeAlias

CHOICES = {"kind": ("image", "text", "rendered"), "orientation": ("landscape", "portrait", "square")}


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple["Filter", ...]


@dataclass(frozen=True, slots=True)
class Not:
    part: "Filter"


@dataclass(frozen=True, slots=True)
class Has:
    """The item has this fact at all: a name of `Choice`, `Compare` or `Match`, `place` or `facts.NAME`."""

    name: str


@dataclass(frozen=True, slots=True)
class Choice:
    name: str  # a key of CHOICES
    value: str  # one of its values


@dataclass(frozen=True, slots=True)
class Compare:
    """`taken` is compared by the digits given: "2023-05" equals every moment of that month."""

    name: str  # taken, width, height (pixels), megapixels, size (bytes)
    op: str  # = < <= > >=
    value: float | str  # text for taken


@dataclass(frozen=True, slots=True)
class Match:
    """A text matches `regex` from its start. What else is known of every match spares most texts the regex."""

    name: str  # camera, format, text, facts.NAME, path, folder (with a separator at its end)
    regex: str
    needle: str = ""  # is in every match
    start: str = ""  # begins every match
    folded: bool = True  # case is ignored; the needle is then in lower case and ASCII
    sufficient: bool = False  # the needle alone decides


@dataclass(frozen=True, slots=True)
class Near:
    """Within a great-circle distance of a point."""

    lat: float  # degrees
    lon: float
    metres: float


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact of the user's own. Numbers compare with numbers and texts with texts, by code point."""

    name: str
    op: str  # = < <= > >=
    text: str
    number: int | float | None = None  # the same value as a number, where it can be one


Filter: TypeAlias = And | Or | Not | Has | Choice | Compare | Match | Near | Fact
EVERYTHING = And(())
